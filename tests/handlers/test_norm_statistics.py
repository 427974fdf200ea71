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
"""The statistics of batch norm during local training, each choice compared with its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import images, unet
from torch import Tensor, nn
from trained_sites import Site, State, batches, equal

from shared_iopfl.handlers.norm_statistics import NormStatisticsHandler, batch_norms, with_own_statistics
from shared_iopfl.utils.errors import InputError


def site(statistics: str = "batch", **options: Any) -> Site:
    made = Site()
    NormStatisticsHandler(made.network, statistics, **options).attach(made.trainer)  # type: ignore[arg-type]
    return made


def statistics_of(state: State) -> State:
    return {key: tensor for key, tensor in state.items() if "running" in key or "num_batches" in key}


def by_hand(weights: State, normalise: Any) -> State:
    """Train one round by SGD, with `normalise` called for each batch norm before each step."""
    network = unet()
    network.load_state_dict(weights)
    for batch in batches():
        network.train()
        for layer in batch_norms(network).values():
            normalise(layer)
        loss = nn.functional.mse_loss(network(batch["image"]), batch["label"])
        grads = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(network.parameters(), grads):
                parameter -= 0.05 * grad
    return dict(network.state_dict())


@pytest.fixture
def weights() -> State:
    """The weights of a network whose running statistics differ from those of its first batch."""
    return {key: tensor.clone() for key, tensor in Site().round(unet(5).state_dict()).items()}


def test_batch_statistics_are_plain_training(weights):
    assert equal(site("batch").round(weights), Site().round(weights))


def test_global_statistics_normalise_and_stay(weights):
    """Weights and gradients are those of a loop in which every batch norm is in evaluation mode."""
    local = site("global").round(weights)
    expected = by_hand(weights, lambda layer: layer.eval())
    for key, tensor in expected.items():
        torch.testing.assert_close(local[key], tensor, rtol=1e-4, atol=1e-6)
    assert equal(statistics_of(local), statistics_of(weights))
    assert not equal(local, Site().round(weights))


@pytest.mark.parametrize("statistics", ["global", "blend"])
def test_the_choice_holds_from_the_start_epoch_on(weights, statistics):
    """The start is counted over all rounds: the first of three rounds trains with batch statistics."""
    chosen, plain = site(statistics, start_epoch=1), Site()
    same = [equal(chosen.round(weights), plain.round(weights)) for _ in range(3)]
    assert same == [True, False, False]


def test_blend_is_the_formula(weights, monkeypatch):
    """With one share for all layers, the gradient is that of a network with the weighted mean of both statistics."""
    share = 0.3
    monkeypatch.setattr(NormStatisticsHandler, "draw", lambda self, engine: setattr(self, "share", share))
    local = site("blend").round(weights)

    # torch's batch norm gives no gradient to given statistics: written out instead
    def blend(layer: nn.Module) -> None:
        def forward(inputs: Tensor) -> Tensor:
            var, mean = torch.var_mean(inputs, (0, 2, 3), correction=0)
            mean = share * layer.running_mean + (1 - share) * mean
            var = share * layer.running_var + (1 - share) * var
            row = (inputs - mean[:, None, None]) / torch.sqrt(var + layer.eps)[:, None, None]
            return row * layer.weight[:, None, None] + layer.bias[:, None, None]

        layer.forward = forward  # type: ignore[method-assign, assignment]

    expected = by_hand(weights, blend)
    for key, tensor in expected.items():
        torch.testing.assert_close(local[key], tensor, rtol=1e-3, atol=1e-5)
    assert equal(statistics_of(local), statistics_of(weights))


def test_blend_draws_new_shares_and_resumes(weights):
    """Half of the steps use the global statistics alone; a new handler draws the same shares in a later round."""
    handler = NormStatisticsHandler(unet(), "blend")
    shares = []
    for _ in range(400):
        handler.draw(None)  # type: ignore[arg-type]
        shares.append(handler.share)
    assert 150 < shares.count(1.0) < 250 and len({*shares}) > 100
    whole, resumed = site("blend", seed=3), site("blend", seed=3)
    whole.round(weights)
    resumed.trainer.state.epoch = 1
    assert equal(whole.round(weights), resumed.round(weights))


@pytest.mark.parametrize("statistics", ["global", "blend"])
def test_no_hook_is_left_on_the_network(weights, statistics, monkeypatch):
    """After a round, and after a round that fails, the network has no hooks and evaluates as before."""
    made = site(statistics)
    made.round(weights)
    assert not any(layer._forward_pre_hooks for layer in batch_norms(made.network).values())
    monkeypatch.setattr(made.trainer, "loss_function", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.round(weights)
    assert not any(layer._forward_pre_hooks for layer in batch_norms(made.network).values())


def test_own_statistics_are_those_of_the_inputs(weights):
    """The running mean of the first batch norm becomes that of its inputs; the weights do not change."""
    network = unet()
    network.load_state_dict(weights)
    own = with_own_statistics(network, [images(4, 3, 8, 8, seed=1), images(4, 3, 8, 8, seed=2)])
    assert equal(dict(network.state_dict()), weights), "the network is untouched"
    assert set(statistics_of(own)) == {key for key in own if not torch.equal(own[key], weights[key])}
    name, layer = next(iter(batch_norms(network).items()))
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.eval()(torch.cat([images(4, 3, 8, 8, seed=1), images(4, 3, 8, 8, seed=2)]))
    torch.testing.assert_close(own[f"{name}.running_mean"], seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_an_unknown_choice_is_refused_by_one_line():
    with pytest.raises(InputError, match="norm_statistics must be one of batch, global, blend, but is 'frozen'"):
        NormStatisticsHandler(unet(), "frozen")  # type: ignore[arg-type]
