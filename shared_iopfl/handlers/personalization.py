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
"""The personalised model, a moving average of a site's local models, updated at the end of each round."""

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
    r"""Keeps a site's personalised model: a moving average of its own local models, updated after each round.

    .. math:: p \leftarrow \alpha \, p + (1 - \alpha) \, w

    with w the site's weights after the round's local training, which started from the global ones: p accumulates the
    global and the local gradients (Jiang et al. 2023). Floating-point buffers are averaged with the weights, integer
    ones copied. The personalised model never leaves the site.

    Args:
        network: the network that is trained.
        alpha: in [0, 1); 0 keeps the newest local model.
        start_epoch: up to this epoch p is the newest local model; the average begins after it. Otherwise, with a large
            alpha, the early rounds of large learning rate would dominate the average.
        correct_start: weigh as if the average had no beginning, as Adam does: the n-th update uses
            ``(1 - alpha) / (1 - alpha^n)`` in place of ``1 - alpha``. Without it, alpha -> 1 keeps the first model.
        save_path: where p is written after each round; None: nowhere.

    Attributes:
        ema_model: the personalised model.
        count: how many local models the average holds.
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
            network = network.module  # the personalised model is a plain one, as the global model that is saved
        self._average = AveragedModel(network, avg_fn=self._averaged, use_buffers=True).requires_grad_(False).eval()
        self.ema_model: nn.Module = self._average.module

    def attach(self, engine: Engine) -> None:
        """Register the handler with an ignite engine."""
        engine.add_event_handler(Events.COMPLETED, self.update)

    def update(self, engine: Engine) -> None:
        """Take the round's local model into the average, and write the personalised model."""
        # a model from before the start is what p is until then, but no part of the average
        self.count = 0 if engine.state.epoch <= self.start_epoch else self.count + 1
        self._average.n_averaged.fill_(max(self.count - 1, 0))  # none before: copied
        self._average.update_parameters(self.network)
        if self.save_path is not None:
            save_atomically({key: tensor.cpu() for key, tensor in self.ema_model.state_dict().items()}, self.save_path)

    def _averaged(self, average: Tensor, local: Tensor, _: Tensor | int) -> Tensor:
        """One tensor of the average with that of a further local model."""
        if not is_weight(average):
            return local
        start = 1 - self.alpha**self.count if self.correct_start else 1
        return torch.lerp(average, local, (1 - self.alpha) / start)

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept to go on after an interruption."""
        return {"count": self.count, "model": self.ema_model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        self.count = int(state["count"])
        self.ema_model.load_state_dict(state["model"])
