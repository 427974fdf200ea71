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
"""Objects for the tests of inside methods: a site that trains a tiny network on a few batches, and comparisons."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import set_determinism
from networks import images, unet
from torch import Tensor, nn

State = dict[str, Tensor]


def batches(seed: int = 0, count: int = 3) -> list[dict[str, Tensor]]:
    return [
        {"image": images(2, 3, 8, 8, seed=9 * seed + n), "label": images(2, 2, 8, 8, seed=99 + 9 * seed + n)}
        for n in range(count)
    ]


class Site:
    """A trainer with the handlers of a site, run as `MonaiAlgo` does: global weights in, local weights out."""

    def __init__(self, seed: int = 0, rate: float = 0.05, adam: bool = False) -> None:
        self.network = unet()
        kind: Any = torch.optim.Adam if adam else torch.optim.SGD
        self.optimizer: torch.optim.Optimizer = kind(self.network.parameters(), lr=rate)
        self.trainer = SupervisedTrainer(
            device="cpu",
            max_epochs=1,
            train_data_loader=batches(seed),
            network=self.network,
            optimizer=self.optimizer,
            loss_function=nn.MSELoss(),
            decollate=True,
            train_handlers=[],
        )
        self.losses: list[float] = []
        self.trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, self._note)

    def _note(self, engine: Any) -> None:
        output = engine.state.output
        self.losses.append(float((output[0] if isinstance(output, list) else output)["loss"]))

    def round(self, weights: Mapping[str, Tensor] | None = None) -> State:
        if weights is not None:
            self.network.load_state_dict(weights)
        self.trainer.state.max_epochs = self.trainer.state.epoch + 1
        self.trainer.run()
        return {key: tensor.clone() for key, tensor in self.network.state_dict().items()}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    """Restore the seeds and the handling of errors, which a config changes."""
    hook, path, benchmark = sys.excepthook, list(sys.path), torch.backends.cudnn.benchmark
    yield
    sys.excepthook, sys.path[:], torch.backends.cudnn.benchmark = hook, path, benchmark
    set_determinism(None)
