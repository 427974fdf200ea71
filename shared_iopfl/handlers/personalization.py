# Copyright (c) MONAI Consortium
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The handler of the personalised model, a moving average of a site's local models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from shared_iopfl.models.files import save_atomically
from shared_iopfl.models.weights import is_weight


class PersonalizationHandler:
    r"""Updates a site's personalised model, the moving average of its local models, at the end of each round.

    .. math:: p \leftarrow \alpha \, p + (1 - \alpha) \, w

    w are the weights of the site after local training, which started from the global weights, so that p accumulates the
    global and the local gradients (Jiang et al. 2023). Floating-point buffers are averaged with the weights, integer
    buffers are copied. The personalised model never leaves the site.

    Args:
        network: Network that is trained.
        alpha: Factor of the earlier average, in [0, 1); 0 keeps the newest local model.
        start_epoch: Epoch after which the average begins; until then p is the newest local model. With a large alpha,
            the early rounds with their large learning rate would otherwise dominate the average.
        correct_start: Whether to correct the beginning of the average as Adam does, by ``(1 - alpha) / (1 - alpha^n)``
            instead of ``1 - alpha`` in the n-th update. Without it, an alpha near 1 keeps the first model.
        save_path: Path to which p is written after each round; None for no file.

    Attributes:
        ema_model: Personalised model p.
        count: Number of local models in the average.
    """

    state_name = "personalization"  # see `round_state`

    def __init__(
        self,
        network: nn.Module,
        alpha: float = 0.5,
        start_epoch: int = 0,
        correct_start: bool = True,
        save_path: str | None = None,
    ) -> None:
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha must be in [0, 1), but is {alpha}.")
        self.network = network
        self.alpha = alpha
        self.start_epoch = start_epoch
        self.correct_start = correct_start
        self.save_path = save_path
        self.count = 0
        if isinstance(network, nn.parallel.DistributedDataParallel):
            network = network.module  # so that the keys are those of a plain network, as in the global model
        self._average = AveragedModel(network, avg_fn=self._averaged, use_buffers=True).requires_grad_(False).eval()
        self.ema_model: nn.Module = self._average.module

    def attach(self, engine: Engine) -> None:
        """Register the handler with an ignite engine."""
        engine.add_event_handler(Events.COMPLETED, self.update)

    def update(self, engine: Engine) -> None:
        """Add the local model of the round to the average, and write the personalised model."""
        # until the average begins, p is the newest local model
        self.count = 0 if engine.state.epoch <= self.start_epoch else self.count + 1
        self._average.n_averaged.fill_(max(self.count - 1, 0))  # at 0, torch copies the local model
        self._average.update_parameters(self.network)
        if self.save_path is not None:
            save_atomically({key: tensor.cpu() for key, tensor in self.ema_model.state_dict().items()}, self.save_path)

    def _averaged(self, average: Tensor, local: Tensor, _: Tensor | int) -> Tensor:
        """A tensor of the average, updated by that of a local model."""
        if not is_weight(average):
            return local
        start = 1 - self.alpha**self.count if self.correct_start else 1
        return torch.lerp(average, local, (1 - self.alpha) / start)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"count": self.count, "model": self.ema_model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        self.count = int(state["count"])
        self.ema_model.load_state_dict(state["model"])
