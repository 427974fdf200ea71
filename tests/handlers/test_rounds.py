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
"""The rounds of a trainer: seeds, optimiser and learning rate of each round, and the state between rounds."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from epochs import run_epoch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from monai.data import CacheDataset, DataLoader
from monai.transforms import Compose, RandGaussianNoise, ToTensor
from networks import unet, untouched
from torch import Tensor, nn

from shared_iopfl.handlers.methods import DittoHandler, LocalNormsHandler, ProximalHandler
from shared_iopfl.handlers.personalization import PersonalizationHandler
from shared_iopfl.handlers.rounds import DecayThenTail, RoundHandler, round_state


def loader() -> DataLoader:
    generator = torch.Generator()
    noise = Compose([ToTensor(), RandGaussianNoise(prob=0.9, std=1.0)])
    dataset = CacheDataset([np.full(2, float(n), np.float32) for n in range(5)], noise, progress=False)
    return DataLoader(dataset, batch_size=2, shuffle=True, generator=generator, num_workers=0)


def draws(rounds: list[int], seed: int = 0) -> dict[int, list]:
    """The batches, after shuffling and augmentation, in a process that runs these epochs as one round each."""
    seen: dict[int, list] = {}
    engine = Engine(lambda engine, batch: seen.setdefault(engine.state.epoch, []).append(batch.tolist()))
    RoundHandler(seed=seed).attach(engine)
    data = loader()
    for epoch in rounds:
        run_epoch(engine, data, epoch)
    return seen


def test_randomness_depends_on_seed_and_epoch_alone():
    """A process that resumes at round 3 draws the same as an uninterrupted one; other rounds and seeds differ."""
    with untouched():
        whole = draws([1, 2, 3])
        resumed = draws([3])
    assert whole[3] == resumed[3]
    assert whole[1] != whole[2] != whole[3]
    assert draws([3], seed=1)[3] != whole[3]


def test_optimizer_starts_each_round_without_moments():
    """Its steps are those of a new optimiser with the same learning rate; between rounds there are no gradients."""

    def run(rounds: int, fresh: bool) -> Tensor:
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.Adam([weight], lr=0.1, amsgrad=True)

        def step(engine: Engine, batch: Any) -> None:
            optimizer.zero_grad()
            (weight * torch.tensor([1.0, float(engine.state.epoch)])).square().sum().backward()
            optimizer.step()

        engine = Engine(step)
        RoundHandler(optimizer if fresh else None).attach(engine)
        for epoch in range(1, rounds + 1):
            if not fresh:
                optimizer = torch.optim.Adam([weight], lr=0.1, amsgrad=True)
            run_epoch(engine, loader(), epoch)
            if fresh:
                assert not optimizer.state and weight.grad is None
        return weight.detach()

    assert torch.equal(run(3, fresh=True), run(3, fresh=False))


def test_rounds_fire_as_monai_runs_them():
    """An engine that is run again with a larger max_epochs fires STARTED and COMPLETED once, on which handlers rely."""
    engine, seen = Engine(lambda engine, batch: None), []
    engine.add_event_handler(Events.STARTED, lambda engine: seen.append(("started", engine.state.epoch)))
    engine.add_event_handler(Events.COMPLETED, lambda engine: seen.append(("completed", engine.state.epoch)))
    for epoch in (1, 2):
        run_epoch(engine, [0], epoch)
    assert seen == [("started", 0), ("completed", 1), ("started", 1), ("completed", 2)]


@given(st.integers(1, 200), st.floats(0, 0.9), st.floats(0.01, 1))
@settings(max_examples=40, deadline=None)
def test_learning_rate_falls_and_then_stays_small(epochs, tail, floor):
    """It falls from 1 to `floor`, never rises, and is `floor` in the last part of the epochs."""
    schedule = DecayThenTail(epochs, tail, floor)
    factors = [schedule(epoch) for epoch in range(epochs + 1)]
    assert factors[0] == pytest.approx(1)
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(factors))
    assert factors[-1] == pytest.approx(floor)
    assert all(factor == pytest.approx(floor) for factor in factors[max(1, math.floor((1 - tail) * epochs)) :])


@pytest.mark.parametrize("epochs", [4, 10, 15, 32, 61])
def test_the_first_averaged_model_is_trained_at_the_rate_of_the_tail(epochs):
    """With the start_epoch of the configs, also if a quarter of the epochs is not a whole number."""
    start_epoch = math.floor((1 - 0.25) * epochs)
    assert DecayThenTail(epochs, 0.25, 0.1)(start_epoch) == pytest.approx(0.1)


def test_the_state_of_a_round_includes_that_of_handlers() -> None:
    """The handlers define the names; handlers without a state are left out."""
    network = unet()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    kept = [LocalNormsHandler(network), DittoHandler(network, optimizer, 0.1), PersonalizationHandler(network, 0.5)]
    state = round_state(optimizer, None, [RoundHandler(optimizer), ProximalHandler(network, 0.1), *kept])
    assert list(state) == ["optimizer", "lr_scheduler", "local_norms", "ditto", "personalization"]
    assert list(state.values()) == [optimizer, None, *kept]
