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
"""The handlers of FedProx, FedBN and Ditto, each compared with its formula."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from networks import unet
from torch import Tensor, nn
from trained_sites import Site, State, _process_as_it_was, batches, equal  # noqa: F401

from shared_iopfl.federation.averaging import average_updates
from shared_iopfl.handlers.methods import DittoHandler, LocalNormsHandler, ProximalHandler
from shared_iopfl.handlers.rounds import RoundHandler
from shared_iopfl.utils.errors import InputError


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The distance between the parameters of two states of the U-Net."""
    return sum(float((one[name] - other[name]).square().sum()) for name, _ in unet().named_parameters()) ** 0.5


def norm_keys(network: nn.Module) -> set[str]:
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    return {key for key in network.state_dict() if key.rpartition(".")[0] in norms}


# ---- FedProx --------------------------------------------------------------------------------------------------------


def test_proximal_term_is_the_formula():
    """Weights and losses of two rounds are those of a loop that writes mu / 2 * ||w - w_global||^2 out."""
    site, mu, start = Site(), 0.7, unet(5).state_dict()
    ProximalHandler(site.network, mu).attach(site.trainer)
    network, losses = unet(), []
    for weights in (start, unet(6).state_dict()):
        local = site.round(weights)
        network.load_state_dict(weights)
        network.train()
        anchor = [parameter.detach().clone() for parameter in network.parameters()]
        for batch in batches():
            term = sum((w - a).square().sum() for w, a in zip(network.parameters(), anchor))
            loss = nn.functional.mse_loss(network(batch["image"]), batch["label"]) + mu / 2 * term
            grads = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for parameter, grad in zip(network.parameters(), grads):
                    parameter -= 0.05 * grad
            losses.append(float(loss.detach()))
        for key, tensor in network.state_dict().items():
            torch.testing.assert_close(local[key], tensor, rtol=1e-4, atol=1e-5)
    assert site.losses == pytest.approx(losses, rel=1e-4)


def test_proximal_term_pulls_towards_the_global_model():
    def strayed(mu: float) -> float:
        site = Site()
        ProximalHandler(site.network, mu).attach(site.trainer)
        start = unet(5).state_dict()
        return distance(site.round(start), start)

    plain = Site()
    start = unet(5).state_dict()
    assert strayed(0) == pytest.approx(distance(plain.round(start), start), rel=1e-5)
    assert strayed(8) < 0.9 * strayed(1) < 0.9 * strayed(0)


# ---- FedBN ----------------------------------------------------------------------------------------------------------


class Seen(LocalNormsHandler):
    """Records the weights at which a round starts."""

    def restore(self, engine: Any) -> None:
        super().restore(engine)
        self.begun = {key: tensor.clone() for key, tensor in self.network.state_dict().items()}


def test_norm_layers_are_those_of_the_site_and_all_others_are_global():
    """Two sites, three rounds: after the first round, each site starts with its own norm layers of the round before."""
    sites = {name: Site(seed) for seed, name in enumerate("AB")}
    handlers = {name: Seen(site.network) for name, site in sites.items()}
    for name, site in sites.items():
        handlers[name].attach(site.trainer)
    own = norm_keys(unet())
    weights: State = dict(unet(5).state_dict())
    assert equal(handlers["A"].personal_state(weights), weights), "before any round it is the global model"
    local: dict[str, State] = {}
    for _ in range(3):
        before, local = local, {name: site.round(weights) for name, site in sites.items()}
        for name, handler in handlers.items():
            for key, tensor in handler.begun.items():
                expected = before[name] if before and key in own else weights
                assert torch.equal(tensor, expected[key]), key
        weights = average_updates(local, {"A": 1, "B": 1})
    personal = {name: handler.personal_state(weights) for name, handler in handlers.items()}
    for key, tensor in personal["A"].items():
        assert torch.equal(tensor, local["A"][key] if key in own else weights[key])
        if key in own and tensor.is_floating_point():
            assert not torch.equal(tensor, personal["B"][key])


def test_local_norms_survive_an_interruption(tmp_path):
    site, other = Site(), Site()
    first, second = LocalNormsHandler(site.network), LocalNormsHandler(other.network)
    first.attach(site.trainer)
    weights = site.round(unet(5).state_dict())
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    site.round(weights)  # goes on: what was saved does not change with it
    weights = dict(unet(6).state_dict())
    personal = second.personal_state(weights)
    assert not equal(personal, weights)
    for tensor in personal.values():
        tensor.zero_()
    second.attach(other.trainer)
    assert not equal(other.round(weights), Site().round(weights))


# ---- Ditto ----------------------------------------------------------------------------------------------------------


def ditto(pull: float, adam: bool = False, **kwargs: Any) -> tuple[Site, DittoHandler]:
    site = Site(adam=adam, **kwargs)
    RoundHandlerWithoutData(site.optimizer).attach(site.trainer)
    handler = DittoHandler(site.network, site.optimizer, pull)
    handler.attach(site.trainer)
    return site, handler


class RoundHandlerWithoutData(RoundHandler):
    """A `RoundHandler` without seeds, because the batches of these tests are fixed."""

    def start(self, engine: Any) -> None:
        self.forget(engine)


@pytest.mark.parametrize("adam", [False, True])
def test_without_pull_ditto_is_local_training_on_the_same_batches(adam):
    """The personalised model continues from its own weights, at the current learning rate of the trainer."""
    site, handler = ditto(0.0, adam)
    alone = Site(adam=adam)
    RoundHandlerWithoutData(alone.optimizer).attach(alone.trainer)
    start = unet(5).state_dict()
    for n, rate in enumerate((0.05, 0.01, 0.02)):
        for one in (site, alone):
            one.optimizer.param_groups[0]["lr"] = rate
        site.round(unet(5 + n).state_dict())
        expected = alone.round(start if n == 0 else None)
        for key, tensor in handler.personal_state().items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5)


def test_pull_keeps_the_personal_model_near_the_global_one():
    def strayed(pull: float) -> float:
        site, handler = ditto(pull)
        weights = unet(5).state_dict()
        for _ in range(3):
            site.round(weights)
        return distance(handler.personal_state(), weights)

    assert strayed(15) < 0.7 * strayed(1) < 0.7 * strayed(0)


def test_ditto_does_not_change_the_local_model():
    """The weights that the site sends are those without a personalised model, and are not the personalised ones."""
    site, handler = ditto(0.5, adam=True)
    plain = Site(adam=True)
    RoundHandlerWithoutData(plain.optimizer).attach(plain.trainer)
    for n in range(2):
        weights = unet(5 + n).state_dict()
        assert equal(site.round(weights), plain.round(weights))
    assert site.losses == plain.losses
    assert not equal(handler.personal_state(), site.network.state_dict())


def test_ditto_survives_an_interruption(tmp_path):
    weights = [unet(5 + n).state_dict() for n in range(3)]
    whole, handler = ditto(0.5, adam=True)
    for n, given_weights in enumerate(weights):
        whole.round(given_weights)
        if n == 1:
            torch.save(handler.state_dict(), tmp_path / "state.pt")
    resumed, other = ditto(0.5, adam=True)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.round(weights[2])
    assert equal(other.personal_state(), handler.personal_state())


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf")])
def test_factors_out_of_range_are_refused(wrong):
    site = Site()
    with pytest.raises(InputError, match="proximal"):
        ProximalHandler(site.network, wrong)
    with pytest.raises(InputError, match="ditto"):
        DittoHandler(site.network, site.optimizer, wrong)
