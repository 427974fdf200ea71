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
"""The rounds of a trainer: learning rate, new optimiser and seeds in each round, and the state between rounds.

`MonaiAlgo` keeps one trainer for all rounds and runs it once per round: STARTED and COMPLETED are the ends of a round.
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
    """A factor of the learning rate for `LambdaLR`: a cosine from 1 to `floor`, then constant to the end of the run.

    A personalised model should average the models of this last part, which matters more than its alpha. A
    `SequentialLR` of `CosineAnnealingLR` and `ConstantLR` would need three components for one formula.

    Args:
        epochs: Epochs of the whole run, over all rounds.
        tail: Last fraction of the epochs, in [0, 1), with the constant rate.
        floor: Factor in this part.
    """

    def __init__(self, epochs: int, tail: float = 0.25, floor: float = 0.1) -> None:
        # rounded down as the `start_epoch` of a personalised model, so that the average has no model of a higher rate
        self.decay = max(1, math.floor((1 - tail) * epochs))
        self.floor = floor

    def __call__(self, epoch: int) -> float:
        progress = min(1.0, epoch / self.decay)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))


class RoundHandler:
    """Starts each round with a new optimiser, and with randomness that depends on seed and epoch alone.

    Shuffling and augmentation are seeded by (seed, epoch), so that a round gives the same weights in an uninterrupted
    and in a resumed process; the global random state is not changed.

    Args:
        optimizer: Optimiser whose moments are cleared, as Jiang et al. 2023 use a new one in each round; None to keep
            them.
        seed: Seed of shuffling and augmentation.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None = None, seed: int = 0) -> None:
        self.optimizer = optimizer
        self.seed = seed

    def attach(self, engine: Engine) -> None:
        """Register the handler with an ignite engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.COMPLETED, self.forget)

    def start(self, engine: Engine) -> None:
        """Seed shuffling and augmentation, and clear the optimiser."""
        seed = int(np.random.SeedSequence((self.seed, engine.state.epoch)).generate_state(1)[0])
        loader: Any = engine.state.dataloader
        if getattr(loader, "generator", None) is not None:
            loader.generator.manual_seed(seed)
        set_rnd(loader.dataset, seed=seed)
        self.forget(engine)

    def forget(self, engine: Engine) -> None:
        """Clear moments and gradients, whose memory other sites in this process need."""
        if self.optimizer is not None:
            self.optimizer.state.clear()
            self.optimizer.zero_grad()


def round_state(optimizer: Any, lr_scheduler: Any, handlers: Iterable[Any]) -> dict[str, Any]:
    """Collect the state that a site keeps between rounds, for a federation to resume after an interruption.

    Args:
        optimizer: Optimiser of the trainer.
        lr_scheduler: Learning-rate scheduler of the trainer.
        handlers: Handlers of the trainer. Those with a state have an attribute ``state_name`` and the methods
            ``state_dict`` and ``load_state_dict``.

    Returns:
        The objects with a state, by name.
    """
    named = {handler.state_name: handler for handler in handlers if hasattr(handler, "state_name")}
    return {"optimizer": optimizer, "lr_scheduler": lr_scheduler, **named}


class OneLineStatsHandler(StatsHandler):
    """MONAI's `StatsHandler` without the traceback of an input error, which ends the run with one line."""

    def exception_raised(self, engine: Engine, e: Exception) -> None:
        """Raise an input error without logging it here; log and raise any other error."""
        if root_input_error(e) is not None:
            raise e
        super().exception_raised(engine, e)
