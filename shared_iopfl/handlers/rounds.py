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
"""The rounds of a trainer: learning rate, a fresh start of each round, and what is kept from round to round.

`MonaiAlgo` keeps one trainer through all rounds and runs it once a round: STARTED and COMPLETED are the round's ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd
from monai.handlers import StatsHandler

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


class OneLineStatsHandler(StatsHandler):
    """MONAI's `StatsHandler`, which logs no traceback of an error that ends the run in one line anyway."""

    def exception_raised(self, engine: Engine, e: Exception) -> None:
        """Log an error of the input as one line, and raise it."""
        if root_input_error(e) is not None:
            raise e
        super().exception_raised(engine, e)
