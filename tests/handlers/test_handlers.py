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
"""The ends of a round: how the personalised model moves on, and that a round starts afresh."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Engine, Events
from monai.data import CacheDataset, DataLoader
from monai.transforms import Compose, RandGaussianNoise, ToTensor
from networks import images, unet, untouched
from torch import Tensor, nn

from shared_iopfl.handlers.personalization import PersonalizationHandler
from shared_iopfl.handlers.rounds import DecayThenTail, RoundHandler
from shared_iopfl.models.files import load_weights


def run_epoch(engine: Engine, data: Any, epoch: int) -> None:
    """One round of one epoch, as `MonaiAlgo` runs it, in a process that may have been resumed a moment ago."""
    engine.state.epoch, engine.state.iteration = epoch - 1, (epoch - 1) * len(data)
    engine.state.max_epochs, engine.state.epoch_length = epoch, len(data)
    engine.run(data)


def train(network: nn.Module, handler: PersonalizationHandler, rounds: int, first: int = 1) -> list[dict[str, Tensor]]:
    """Rounds of one epoch as `MonaiAlgo` runs them, each ending in random local weights, which are returned."""
    local = []

    def step(engine: Engine, batch: Any) -> None:
        with torch.no_grad():
            for n, tensor in enumerate(network.state_dict().values()):
                if tensor.is_floating_point():
                    tensor.copy_(images(*tensor.shape, seed=100 * engine.state.epoch + n).abs())  # variances too
                else:
                    tensor.fill_(engine.state.epoch)
        local.append({key: tensor.clone() for key, tensor in network.state_dict().items()})

    engine = Engine(step)
    handler.attach(engine)
    for epoch in range(first, first + rounds):
        run_epoch(engine, [0], epoch)
    return local


def averages(values: list[Tensor], alpha: float) -> Tensor:
    """The closed formula: values weighed by alpha^age, normalised."""
    weights = [alpha ** (len(values) - 1 - n) for n in range(len(values))]
    return sum(w * value.double() for w, value in zip(weights, values)) / sum(weights)  # type: ignore[return-value]


# ---- the personalised model -----------------------------------------------------------------------------------------


def test_alpha_zero_keeps_the_local_model():
    """To the bit, after every round, integer buffers included."""
    network = unet()
    handler = PersonalizationHandler(network, alpha=0)
    for rounds in (1, 3):
        local = train(network, handler, rounds)[-1]
        assert all(torch.equal(tensor, local[key]) for key, tensor in handler.ema_model.state_dict().items())


def test_alpha_near_one_keeps_the_first_local_model():
    """Without the correction of the start, as the released method has it."""
    network = unet()
    handler = PersonalizationHandler(network, alpha=1 - 1e-7, correct_start=False)
    first = train(network, handler, 4)[0]
    for key, tensor in handler.ema_model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, first[key], rtol=1e-5, atol=1e-5)


@given(alpha=st.floats(0, 0.999), rounds=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_corrected_average_equals_the_closed_formula(alpha, rounds):
    """Weights alpha^age, normalised: as if the average had no beginning."""
    network = nn.BatchNorm1d(3)
    handler = PersonalizationHandler(network, alpha)
    local = train(network, handler, rounds)
    for key in ("weight", "running_mean"):
        expected = averages([state[key] for state in local], alpha).float()
        torch.testing.assert_close(handler.ema_model.state_dict()[key], expected, rtol=1e-4, atol=1e-5)


def test_uncorrected_average_is_the_recursion():
    """p <- alpha p + (1 - alpha) w, from the first local model on."""
    network, alpha = nn.BatchNorm1d(3), 0.7
    handler = PersonalizationHandler(network, alpha, correct_start=False)
    local = train(network, handler, 4)
    p = local[0]["weight"].double()
    for state in local[1:]:
        p = alpha * p + (1 - alpha) * state["weight"].double()
    torch.testing.assert_close(handler.ema_model.state_dict()["weight"], p.float())


@pytest.mark.parametrize("correct_start", [True, False])
@pytest.mark.parametrize("start_epoch", [0, 2])
@pytest.mark.parametrize("alpha", [0.0, 1 / 3, 0.9])
def test_average_is_the_formula_to_the_bit(alpha, start_epoch, correct_start):
    """Each tensor of a whole network, by one interpolation a round; counters are copied."""
    network = unet()
    handler = PersonalizationHandler(network, alpha, start_epoch, correct_start)
    local = train(network, handler, 5)
    first = max(start_epoch - 1, 0)  # the newest up to the start epoch is replaced by the first one after it
    expected = {key: tensor.clone() for key, tensor in local[first].items()}
    for count, state in enumerate(local[start_epoch:], start=1):
        weight = (1 - alpha) / (1 - alpha**count if correct_start else 1)
        for key, p in expected.items():
            p.copy_(state[key] if count == 1 or not p.is_floating_point() else p.lerp(state[key], weight))
    own = handler.ema_model.state_dict()
    assert list(own) == list(expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in own.items())


def test_weights_that_two_layers_share_are_averaged_once():
    network, alpha = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)), 0.5
    network[1].weight = network[0].weight
    handler = PersonalizationHandler(network, alpha)
    local = [state["1.weight"] for state in train(network, handler, 3)]
    for tensor in handler.ema_model.state_dict().values():
        torch.testing.assert_close(tensor, averages(local, alpha).float())


def test_state_of_an_earlier_release_is_resumed():
    """A checkpoint has the count and the model's state_dict, and nothing of how the average is computed."""
    network = nn.BatchNorm1d(3)
    handler = PersonalizationHandler(network, 0.5)
    model = {key: tensor + 1 for key, tensor in network.state_dict().items()}
    handler.load_state_dict({"count": 2, "model": model})
    local = train(network, handler, 1, first=3)[0]
    expected = model["weight"].lerp(local["weight"], 0.5 / (1 - 0.5**3))
    assert torch.equal(handler.ema_model.state_dict()["weight"], expected)
    assert list(handler.state_dict()) == ["count", "model"]
    assert list(handler.state_dict()["model"]) == list(model)


def test_average_begins_after_the_start_epoch():
    """Up to it, p is the newest local model; then the average of those after it, with none from before."""
    network, alpha = nn.BatchNorm1d(3), 0.5
    handler = PersonalizationHandler(network, alpha, start_epoch=3)
    local = [state["weight"] for state in train(network, handler, 3)]
    assert torch.equal(handler.ema_model.state_dict()["weight"], local[2])
    local += [state["weight"] for state in train(network, handler, 2, first=4)]
    expected = averages(local[3:], alpha).float()
    torch.testing.assert_close(handler.ema_model.state_dict()["weight"], expected)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_integer_buffers_stay_integers_and_nothing_aliases_the_live_network(alpha):
    """From the first round on: training further does not change the personalised model, and keys stay the same."""
    network = unet()
    handler = PersonalizationHandler(network, alpha)
    train(network, handler, 2)
    own = handler.ema_model.state_dict()
    assert list(own) == list(network.state_dict())
    assert [t.dtype for t in own.values()] == [t.dtype for t in network.state_dict().values()]
    counters = [tensor for key, tensor in own.items() if key.endswith("num_batches_tracked")]
    assert counters
    assert all(int(counter) == 2 for counter in counters)
    kept = {key: tensor.clone() for key, tensor in own.items()}
    live = {tensor.data_ptr() for tensor in network.state_dict().values()}
    assert not live & {tensor.data_ptr() for tensor in own.values()}
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.add_(1)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in handler.ema_model.state_dict().items())


def test_personalised_model_is_written_after_each_round(tmp_path):
    """A plain state_dict that loads with weights_only, equal to the one in memory."""
    network, path = unet(), tmp_path / "models" / "model_BIDMC.pt"
    handler = PersonalizationHandler(network, 0.5, save_path=str(path))
    assert not path.exists()
    for rounds in (1, 2):
        train(network, handler, rounds)
        saved = load_weights(path)
        assert all(torch.equal(tensor, saved[key]) for key, tensor in handler.ema_model.state_dict().items())
    unet().load_state_dict(saved)


def test_training_is_not_disturbed():
    network = unet()
    handler = PersonalizationHandler(network, 0.5)
    engine = Engine(lambda engine, batch: None)
    handler.attach(engine)
    with untouched(network):
        engine.run([0], max_epochs=1)


def test_average_goes_on_after_an_interruption(tmp_path):
    """A handler with the saved state goes on as the old one would have."""
    network, other = unet(), unet(5)
    whole, part, resumed = (PersonalizationHandler(n, 0.6) for n in (network, network, other))
    train(network, whole, 4)
    train(network, part, 2)
    torch.save(part.state_dict(), tmp_path / "state.pt")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(other, resumed, 2, first=3)
    assert resumed.count == whole.count == 4
    for one, two in zip(whole.ema_model.state_dict().values(), resumed.ema_model.state_dict().values()):
        assert torch.equal(one, two)


@pytest.mark.parametrize("alpha", [-0.1, 1.0, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        PersonalizationHandler(unet(), alpha)


# ---- rounds ---------------------------------------------------------------------------------------------------------


def loader() -> DataLoader:
    generator = torch.Generator()
    noise = Compose([ToTensor(), RandGaussianNoise(prob=0.9, std=1.0)])
    dataset = CacheDataset([np.full(2, float(n), np.float32) for n in range(5)], noise, progress=False)
    return DataLoader(dataset, batch_size=2, shuffle=True, generator=generator, num_workers=0)


def draws(rounds: list[int], seed: int = 0) -> dict[int, list]:
    """What a process that runs these epochs, one a round, sees of shuffling and augmentation."""
    seen: dict[int, list] = {}
    engine = Engine(lambda engine, batch: seen.setdefault(engine.state.epoch, []).append(batch.tolist()))
    RoundHandler(seed=seed).attach(engine)
    data = loader()
    for epoch in rounds:
        run_epoch(engine, data, epoch)
    return seen


def test_randomness_depends_on_seed_and_epoch_alone():
    """A process resumed at round 3 draws what one from the first round does; rounds and seeds differ."""
    with untouched():
        whole = draws([1, 2, 3])
        resumed = draws([3])
    assert whole[3] == resumed[3]
    assert whole[1] != whole[2] != whole[3]
    assert draws([3], seed=1)[3] != whole[3]


def test_optimizer_starts_each_round_without_moments():
    """The second round's steps are those of a new optimiser from the same weights; its learning rate stays. Between
    rounds a site holds neither moments nor gradients."""

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
    """Run on with a larger max_epochs, an engine fires STARTED and COMPLETED once a round: all this rests on it."""
    engine, seen = Engine(lambda engine, batch: None), []
    engine.add_event_handler(Events.STARTED, lambda engine: seen.append(("started", engine.state.epoch)))
    engine.add_event_handler(Events.COMPLETED, lambda engine: seen.append(("completed", engine.state.epoch)))
    for epoch in (1, 2):
        run_epoch(engine, [0], epoch)
    assert seen == [("started", 0), ("completed", 1), ("started", 1), ("completed", 2)]


@given(st.integers(1, 200), st.floats(0, 0.9), st.floats(0.01, 1))
@settings(max_examples=40, deadline=None)
def test_learning_rate_falls_and_then_stays_small(epochs, tail, floor):
    """From 1 down to `floor`, never up, and there for the last part of the epochs."""
    schedule = DecayThenTail(epochs, tail, floor)
    factors = [schedule(epoch) for epoch in range(epochs + 1)]
    assert factors[0] == pytest.approx(1)
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(factors))
    assert factors[-1] == pytest.approx(floor)
    assert all(factor == pytest.approx(floor) for factor in factors[max(1, math.floor((1 - tail) * epochs)) :])


@pytest.mark.parametrize("epochs", [4, 10, 15, 32, 61])
def test_the_first_averaged_model_is_trained_at_the_rate_of_the_tail(epochs):
    """By the configs' start_epoch; where the quarter is no whole number of epochs too."""
    start_epoch = math.floor((1 - 0.25) * epochs)
    assert DecayThenTail(epochs, 0.25, 0.1)(start_epoch) == pytest.approx(0.1)
