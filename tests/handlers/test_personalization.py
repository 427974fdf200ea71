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
"""The personalised model: its average, its state, and its files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from epochs import run_epoch
from hypothesis import given, settings
from hypothesis import strategies as st
from ignite.engine import Engine
from networks import images, unet, untouched
from torch import Tensor, nn

from shared_iopfl.handlers.personalization import PersonalizationHandler
from shared_iopfl.models.files import load_weights


def train(network: nn.Module, handler: PersonalizationHandler, rounds: int, first: int = 1) -> list[dict[str, Tensor]]:
    """Run rounds of one epoch as `MonaiAlgo` does; each ends with random local weights, which are returned."""
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
    """The mean of the values, weighted by alpha^age."""
    weights = [alpha ** (len(values) - 1 - n) for n in range(len(values))]
    return sum(w * value.double() for w, value in zip(weights, values)) / sum(weights)  # type: ignore[return-value]


def test_alpha_zero_keeps_the_local_model():
    """Exactly, after every round, with integer buffers."""
    network = unet()
    handler = PersonalizationHandler(network, alpha=0)
    for rounds in (1, 3):
        local = train(network, handler, rounds)[-1]
        assert all(torch.equal(tensor, local[key]) for key, tensor in handler.ema_model.state_dict().items())


def test_alpha_near_one_keeps_the_first_local_model():
    """Without the correction of the beginning, as in the released method."""
    network = unet()
    handler = PersonalizationHandler(network, alpha=1 - 1e-7, correct_start=False)
    first = train(network, handler, 4)[0]
    for key, tensor in handler.ema_model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, first[key], rtol=1e-5, atol=1e-5)


@given(alpha=st.floats(0, 0.999), rounds=st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_corrected_average_equals_the_closed_formula(alpha, rounds):
    """The weights are alpha^age, normalised."""
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
    """Each tensor of a network is interpolated once per round; counters are copied."""
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


def test_the_state_of_an_earlier_version_can_be_resumed():
    """A checkpoint has the count and the state_dict of the model, independent of the way the average is computed."""
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
    """Until then p is the newest local model; afterwards it averages only the models after that epoch."""
    network, alpha = nn.BatchNorm1d(3), 0.5
    handler = PersonalizationHandler(network, alpha, start_epoch=3)
    local = [state["weight"] for state in train(network, handler, 3)]
    assert torch.equal(handler.ema_model.state_dict()["weight"], local[2])
    local += [state["weight"] for state in train(network, handler, 2, first=4)]
    expected = averages(local[3:], alpha).float()
    torch.testing.assert_close(handler.ema_model.state_dict()["weight"], expected)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_integer_buffers_stay_integers_and_no_memory_is_shared_with_the_network(alpha):
    """Further training does not change the personalised model, and its keys are those of the network."""
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


def test_the_network_in_training_is_not_changed():
    network = unet()
    handler = PersonalizationHandler(network, 0.5)
    engine = Engine(lambda engine, batch: None)
    handler.attach(engine)
    with untouched(network):
        engine.run([0], max_epochs=1)


def test_the_average_continues_after_an_interruption(tmp_path):
    """A handler with the saved state gives the same average as one without interruption."""
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
