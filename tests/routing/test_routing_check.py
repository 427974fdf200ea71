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
"""Any network is routed correctly, or refused by one line that names the layer."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import FlexibleUNet
from networks import ARCHITECTURES, experts, images, make, mixture, routes_of, spread, unet, untouched, volume
from tiny_inferers import routing
from torch import nn
from unusual_networks import (
    WORKS,
    Around,
    AsksForType,
    AsksForWeight,
    ClosesOver,
    Listed,
    Phase,
    ReadsWeight,
    Several,
    Spare,
    Tokens,
    Twice,
    Upsampling,
    hooked,
    space,
)

from shared_iopfl.federation.averaging import average_updates
from shared_iopfl.inferers.baselines import BatchStatisticsInferer, DaWinInferer, TentInferer, labelled_routes
from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.routing.network import collapse, route
from shared_iopfl.routing.settings import RoutingSettings
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.stacks import StackInferer


def default(build: Callable[[], nn.Module], **settings: object) -> TestTimeRoutingInferer:
    others = {f"s{n}": dict(make(build, n).state_dict()) for n in (1, 2)}
    return TestTimeRoutingInferer(others, settings=RoutingSettings(**settings), flips=[0], slices=None)  # type: ignore[arg-type]


def one_line(error: pytest.ExceptionInfo[InputError], *words: str) -> None:
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


# ---- what works ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", WORKS)
def test_unusual_layers_give_the_output_of_a_plain_network_with_the_mixed_weights(name):
    """For all kinds of routes; and the network collapses to this plain network."""
    network, states = space(WORKS[name])
    scan, routes = images(3, 3, 9, 9), routes_of(3)
    plain = make(WORKS[name], 0)
    mixed = {
        key: sum(float(r) * s[key] for r, s in zip(routes, states.values())) if like.is_complex() else tensor
        for (key, like), tensor in zip(network.state_dict().items(), mixture(list(states.values()), routes).values())
    }
    plain.load_state_dict(mixed)
    for per in ("layer", "volume", "sample"):
        routed = route(network, states, per=per, sample=scan)  # type: ignore[arg-type]
        routed.start_from(routes)
        torch.testing.assert_close(routed(scan), plain(scan), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(collapse(routed)(scan), plain(scan), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [Tokens, Upsampling, lambda: Around(Phase())])
def test_samples_of_a_batch_have_their_own_routes_with_gradients_too(build):
    network, states = space(build)
    scan = images(3, 3, 9, 9)
    routed = route(network, states, per="sample", random=True, sample=scan)
    with torch.no_grad():
        alone = torch.cat([routed(sample[None]) for sample in scan])
    torch.testing.assert_close(routed(scan), alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_batch_norm_without_input_keeps_its_running_statistics():
    """The default settings, which blend statistics, can segment with such a network."""
    network, states = space(Spare)
    routed = route(network, states, statistics=0.5)
    scan = images(3, 3, 9, 9)
    expected = routed(scan)
    torch.testing.assert_close(collapse(routed)(scan), expected, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(default(Spare)(scan, network)).all()


@pytest.mark.slow
@torch.no_grad()
def test_flexible_unet_runs_with_own_statistics_too(monkeypatch):
    """Its encoder has batch norms without input; a backbone with random weights needs no download."""

    def build() -> nn.Module:
        return FlexibleUNet(3, 2, "efficientnet-b0", pretrained=False, spatial_dims=2)

    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("something is downloaded"))
    network, states = space(build, 2)
    scan = images(2, 3, 64, 64)
    routed = route(network, states, statistics=0.5, sample=scan)
    expected = routed(scan)
    torch.testing.assert_close(collapse(routed)(scan), expected, rtol=1e-3, atol=1e-4)
    assert torch.isfinite(default(build)(scan, network)).all()


@torch.no_grad()
def test_complex_weights_are_averaged_as_complex_numbers():
    sent = {"A": {"w": torch.tensor([1 + 2j])}, "B": {"w": torch.tensor([3 - 4j])}, "C": {"w": torch.tensor([8 + 2j])}}
    assert average_updates(sent, dict.fromkeys("ABC", 1))["w"] == 4
    assert average_updates(sent, dict.fromkeys("ABC", 1), "median")["w"] == 3 + 2j


@torch.no_grad()
@pytest.mark.parametrize("norm", [lambda: nn.InstanceNorm2d(4, affine=True), lambda: nn.GroupNorm(2, 4)])
def test_without_running_statistics_the_advice_given_works(norm):
    network, scan = make(lambda: Around(norm()), 0), images(2, 3, 9, 9)
    with pytest.raises(InputError, match="start='uniform'"):
        default(lambda: Around(norm()), start="distance")(scan, network)
    inferer = default(lambda: Around(norm()), start="uniform")
    assert torch.isfinite(inferer(scan, network)).all()
    assert inferer.reports[-1]["statistics"] == [0.0]


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_passes_the_check_which_leaves_no_trace(name):
    network, states, scan = spread(name)
    network.train()
    with untouched(network):
        routed = route(network, states, sample=scan)
    fresh = route(network, states)
    assert torch.equal(routed.last_routes(), fresh.last_routes())
    assert all(torch.equal(a, b) for a, b in zip(routed.state_dict().values(), fresh.state_dict().values()))
    assert torch.equal(routed(scan), fresh(scan))


# ---- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "type": (lambda: AsksForType(), ["'first'", "layer's type"]),
    "hasattr": (lambda: AsksForWeight(), ["'last'", "attributes"]),
    "weight": (lambda: ReadsWeight(), ["'first'", "'weight'"]),
    "closure": (ClosesOver, ["'first'", "closes over"]),
    "list": (Listed, ["'scales'", "ParameterList", "no forward"]),
    "spectral": (lambda: Around(nn.utils.spectral_norm(nn.Conv2d(4, 4, 1))), ["'middle.0'", "remove_spectral_norm"]),
    "half": (lambda: Around().bfloat16(), ["'first'", "network.float()"]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_cannot_be_routed_is_refused_by_one_line_that_names_the_layer(name):
    build, words = REFUSED[name]
    network = build().eval()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        states = {f"e{n}": dict(build().state_dict()) for n in range(3)}
    with untouched(network), pytest.raises(InputError) as error:
        route(network, states, sample=images(2, 3, 9, 9))
    one_line(error, *words)


@torch.no_grad()
@pytest.mark.parametrize(
    "build, words", [(Twice, "more than once"), (WORKS["subclass"], "of its own"), (hooked, "hooks")]
)
def test_statistics_that_cannot_be_blended_are_refused_and_the_advice_works(build, words):
    """The inferer refuses them at the first scan, for any shift; the network refuses to keep them."""
    network, scan = make(build, 0), images(2, 3, 9, 9)
    with pytest.raises(InputError) as error:
        default(build, statistics=0.5)(scan, network)
    one_line(error, "'middle", words, "statistics=0")
    assert torch.isfinite(default(build, statistics=0.0)(scan, network)).all()


@torch.no_grad()
def test_a_batch_norm_used_twice_does_not_collapse_with_blended_statistics():
    network, states = space(Twice)
    routed = route(network, states, statistics=0.5)
    routed(images(2, 3, 9, 9))
    with pytest.raises(InputError, match=r"'middle.0'.*more than once"):
        collapse(routed)
    with pytest.raises(InputError, match=r"'middle.0'.*more than once"):
        routed.freeze_statistics(True)


def test_running_statistics_without_a_gradient_are_refused_for_steps():
    build = WORKS["tracked instance norm"]
    network, scan = make(build, 0), images(2, 3, 8, 8)
    with pytest.raises(InputError) as error:
        default(build, start="uniform", steps=1)(scan, network)
    one_line(error, "'middle.0'", "steps=0")
    assert torch.isfinite(default(build, start="uniform", route_norms=False, steps=1)(scan, network)).all()


@torch.no_grad()
@pytest.mark.parametrize("per", ["layer", "sample"])
def test_a_network_with_several_outputs_can_be_routed_but_not_used_by_inferers(per):
    network, states = space(Several)
    scan = images(2, 3, 8, 8)
    one, other = route(network, states, per=per, sample=scan)(scan)
    assert torch.equal(one, -other)
    for inferer in (StackInferer(slices=None), default(Several, start="uniform", per=per)):
        with pytest.raises(InputError, match="a tuple") as error:
            inferer(scan, network)
        one_line(error)


@torch.no_grad()
@pytest.mark.parametrize("baseline", [BatchStatisticsInferer, TentInferer, DaWinInferer])
def test_baselines_that_route_refuse_the_same_networks(baseline):
    """They are refused at every scan, not only at the first."""
    network, states = space(AsksForType)
    inferer = baseline(experts=states, slices=None) if baseline is DaWinInferer else baseline(slices=None)
    for _ in range(2):
        with pytest.raises(InputError) as error:
            inferer(images(2, 3, 9, 9), network)
        one_line(error, "'first'", "layer's type")


def test_labelled_routes_refuse_the_same_networks():
    network, states = space(AsksForType)
    batch = (images(2, 3, 9, 9), images(2, 2, 9, 9))
    with pytest.raises(InputError, match="layer's type"):
        labelled_routes(network, states, [batch], F.mse_loss, steps=1)


@torch.no_grad()
def test_a_baseline_checks_a_network_once(monkeypatch):
    seen: list[object] = []
    monkeypatch.setattr("shared_iopfl.routing.network.check_routed", lambda *args: seen.append(args))
    inferer, network = BatchStatisticsInferer(slices=None), make(lambda: Around(nn.BatchNorm2d(4)), 0)
    for scan in images(3, 3, 9, 9):
        inferer(scan[None], network)
    assert len(seen) == 1


# ---- in use ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_scan_is_checked_once_a_network(monkeypatch):
    """The check is not repeated for the next scan, but after a change of the network."""
    inferer, network, seen = routing(), unet(), []
    monkeypatch.setattr("shared_iopfl.routing.network.check_routed", lambda *args: seen.append(args))
    for _ in range(2):
        inferer(volume(3), network)
    assert len(seen) == 1
    network.load_state_dict(unet(7).state_dict())
    inferer(volume(3), network)
    assert len(seen) == 2


@torch.no_grad()
def test_one_warning_if_the_network_is_an_expert(caplog):
    inferer = routing()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            inferer(volume(2), unet(1))
    assert len(caplog.records) == 1
    assert re.search("model of 'A'.*plain inference", caplog.text)


@torch.no_grad()
def test_layers_with_two_names_and_shared_weights_pass_the_check():
    def build() -> nn.Module:
        network = Around(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        network.again = network.middle[0]
        network.middle[1].weight = network.middle[0].weight
        return network

    network, states = space(build)
    route(network, states, sample=images(1, 3, 9, 9))


@torch.no_grad()
def test_equal_experts_pass_the_check():
    network = unet()
    route(network, {"global": network.state_dict(), **experts(2)}, sample=images(1, 3, 32, 32))
    route(network, dict.fromkeys("AB", network.state_dict()), sample=torch.zeros(1, 3, 32, 32))
