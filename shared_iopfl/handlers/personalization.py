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
"""The personalised model, a moving average of a site's local models, updated at the end of each round.

`MonaiAlgo` keeps one trainer through all rounds and runs it once a round: STARTED and COMPLETED are the round's ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd
from monai.handlers import StatsHandler
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from shared_iopfl.models.files import save_atomically
from shared_iopfl.models.weights import is_weight
from shared_iopfl.utils.errors import root_input_error


class DecayThenTail:
    """A learning-rate factor for `LambdaLR`: cosine from 1 to `floor`, then constant for the last part of the run.

    The small-rate tail matters more than alpha: a personalised model should be the average of a site's models there.
    A `SequentialLR` of `CosineAnnealingLR` and `ConstantLR` would need three components for one formula.

    Args:
        epochs: of the whole run, over all rounds.
        tail: last part of the epochs, in [0, 1), at the constant small rate.
        floor: the factor there.
    """

    def __init__(self, epochs: int, tail: float = 0.25, floor: float = 0.1) -> None:
        # rounded down, as the epoch after which a personalised model is averaged: no model above the floor is in it
        self.decay = max(1, math.floor((1 - tail) * epochs))
        self.floor = floor

    def __call__(self, epoch: int) -> float:
        progress = min(1.0, epoch / self.decay)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


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


class OneLineStatsHandler(StatsHandler):
    """MONAI's `StatsHandler`, which logs no traceback of an error that ends the run in one line anyway."""

    def exception_raised(self, engine: Engine, e: Exception) -> None:
        """Log an error of the input as one line, and raise it."""
        if root_input_error(e) is not None:
            raise e
        super().exception_raised(engine, e)


class RoundHandler:
    """Makes each round start afresh: a new optimiser, and randomness that depends on seed and epoch alone.

    Shuffling and augmentation are seeded from (seed, epoch), so that a round gives the same weights whether the process
    has run since the first round or was resumed a moment ago; the global random state is not touched.

    Args:
        optimizer: its moments are forgotten (Jiang et al. 2023 make a new one each round); None keeps it.
        seed: of shuffling and augmentation.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None, seed: int = 0) -> None:
        self.optimizer = optimizer
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.COMPLETED, self.forget)

    def start(self, engine: Engine) -> None:
        """Begin a round: seed shuffling and augmentation, forget the moments of the optimiser."""
        seed = int(np.random.SeedSequence((self.seed, engine.state.epoch)).generate_state(1)[0])
        loader: Any = engine.state.dataloader
        if getattr(loader, "generator", None) is not None:
            loader.generator.manual_seed(seed)
        set_rnd(loader.dataset, seed=seed)
        self.forget(engine)

    def forget(self, engine: Engine) -> None:
        """Forget the moments of the optimiser, and the gradients: other sites may train in this process."""
        if self.optimizer is not None:
            self.optimizer.state.clear()
            self.optimizer.zero_grad()


def round_state(optimizer: Any, lr_scheduler: Any, handlers: Iterable[Any]) -> dict[str, Any]:
    """What a site keeps from round to round, by name, for a federation to continue from after an interruption.

    Args:
        optimizer, lr_scheduler: of the trainer.
        handlers: of the trainer. Those with a state to be kept have the attribute ``state_name``, and the methods
            ``state_dict`` and ``load_state_dict``.
    """
    named = {handler.state_name: handler for handler in handlers if hasattr(handler, "state_name")}
    return {"optimizer": optimizer, "lr_scheduler": lr_scheduler, **named}
