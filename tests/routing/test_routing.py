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
"""The routing space: identity, routes per sample, volume and layer, reset, and refusals."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ARCHITECTURES, experts, images, make, mixture, routes_of, spread, unet, untouched
from torch import nn

from shared_iopfl.routing.network import RoutedBatchNorm, collapse, route
from shared_iopfl.routing.routers import FreeRoutes, Router
from shared_iopfl.utils.errors import InputError

PER: tuple[Literal["sample", "volume", "layer"], ...] = ("sample", "volume", "layer")
ACTIVATIONS = ("softmax", "sigmoid")


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_experts_give_the_plain_network(name, per, activation):
    """For any normalised routes, equal experts give the output of the plain network."""
    build, shape = ARCHITECTURES[name]
    network = make(build, 0)
    routed = route(network, dict.fromkeys("ABC", network.state_dict()), per=per, activation=activation, random=True)
    routed.start_from(routes_of(3, layers=len(routed.layers)))
    scan = images(*shape)
    torch.testing.assert_close(routed(scan), network(scan), rtol=1e-4, atol=1e-5)
    routes = routed.last_routes()
    torch.testing.assert_close(routes.sum(1), torch.ones(len(routes)))
    assert routes.std(0).min() > 1e-3, "the routes should differ from layer to layer for this to say anything"


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_weight_is_routed(name):
    """With routes of one expert alone, the output is that of this expert, so that no layer is left out."""
    network, space, scan = spread(name)
    other = copy.deepcopy(network)
    other.load_state_dict(space["e1"])
    for per in PER:
        routed = route(network, space, per=per)
        routed.start_from(torch.tensor([0.0, 1.0, 0.0]))
        torch.testing.assert_close(routed(scan), other(scan), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_soup_is_the_network_of_the_averaged_weights(activation):
    """Without steps, the weights are the mean of the experts weighted by the routes (E,)."""
    network, space, scan = unet(), experts(3), images(2, 3, 32, 32)
    for start in (torch.full((3,), 1 / 3), torch.tensor([0.7, 0.3, 0.0])):
        plain = copy.deepcopy(network)
        plain.load_state_dict(mixture(list(space.values()), start))
        for per in PER:
            routed = route(network, space, per=per, activation=activation)
            routed.start_from(start)
            torch.testing.assert_close(routed(scan), plain(scan), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(routed.last_routes(), start.expand(len(routed.layers), 3), rtol=0, atol=1e-6)


@torch.no_grad()
def test_norm_layers_that_are_not_routed_keep_the_weights_of_the_network():
    """route_norms=False mixes all layers except norm layers, which are those of the given network."""
    network, space, scan = unet(), experts(2), images(2, 3, 32, 32)
    norms = {name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    mean = mixture(list(space.values()), [0.5, 0.5])
    own = {key: value for key, value in network.state_dict().items() if key.rpartition(".")[0] in norms}
    plain = copy.deepcopy(network)
    plain.load_state_dict({**mean, **own})
    for per in PER:
        routed = route(network, space, per=per, route_norms=False)
        torch.testing.assert_close(routed(scan), plain(scan), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_routes_per_sample_differ_and_equal_a_loop_over_samples(name):
    network, space, scan = spread(name)
    routed = route(network, space, per="sample", random=True)
    alone, routes = [], []
    for sample in scan:
        alone.append(routed(sample[None]))
        routes.append(routed.last_routes())
    torch.testing.assert_close(routed(scan), torch.cat(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routed.last_routes(), torch.stack(routes).mean(0))
    assert (routes[0] - routes[1]).abs().max() > 1e-4


@torch.no_grad()
def test_all_slices_of_a_volume_share_its_routes():
    """With one set of routes per layer, the volume is segmented by one plain network, the result of `collapse`."""
    network, space, scan = unet(), experts(3), images(4, 3, 32, 32)
    routed = route(network, space, per="volume", random=True)
    together = routed(scan)
    torch.testing.assert_close(collapse(routed)(scan), together, rtol=1e-4, atol=1e-5)
    assert (routed(scan[:1]) - together[:1]).abs().max() > 1e-5, "another volume, other routes"


@given(seed=st.integers(0, 2**31), random=st.booleans(), activation=st.sampled_from(ACTIVATIONS))
@settings(max_examples=20, deadline=None)
def test_routers_normalise(seed, random, activation):
    """For any input and start, routes are non-negative and sum to one; without random weights they equal the start."""
    generator = torch.Generator().manual_seed(seed)
    start = routes_of(4, seed)
    for routes in (
        FreeRoutes(4, activation),
        Router(3, 4, activation, random=random, generator=generator),
    ):
        routes.start.copy_(start)
        with torch.no_grad():
            if random:
                for parameter in routes.parameters():
                    parameter.normal_(0, 10, generator=generator)
            given_routes = routes(100 * images(5, 3, 4, 4, seed=seed))
        assert given_routes.min() >= 0
        torch.testing.assert_close(given_routes.sum(1), torch.ones(len(given_routes)))
        if not random:
            torch.testing.assert_close(given_routes, start.expand_as(given_routes), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_router_dropout_is_seeded_and_off_without_a_generator():
    router = Router(8, 3, random=True, dropout=0.5, generator=torch.Generator().manual_seed(0))
    scan = images(2, 8, 4, 4)
    plain = router(scan)

    def dropped(seed: int) -> torch.Tensor:
        router.generator = torch.Generator().manual_seed(seed)
        return router(scan)

    assert torch.equal(dropped(1), dropped(1))
    assert not torch.equal(dropped(1), dropped(2))
    router.generator = None
    assert torch.equal(router(scan), plain)


@torch.no_grad()
def test_routers_look_at_the_input_in_full_precision():
    """Autocast caches half-precision weights, and must not return the routes of a router from before a change."""
    router = Router(8, 3, generator=torch.Generator().manual_seed(0))
    scan = images(2, 8, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        router(scan)
        router.excite.bias.add_(torch.tensor([3.0, 0.0, 0.0]))
        inside = router(scan)
    assert torch.equal(inside, router(scan))


def test_same_seed_same_routers():
    network, space = unet(), experts(2)
    one, same, other = (route(network, space, per="sample", random=True, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_reset_discards_what_was_learnt():
    """After reset, the output is that of the new network, although all trainable parameters had changed."""
    network, space, scan = unet(), experts(2), images(2, 3, 32, 32)
    routed = route(network, space, per="sample", random=True, affine=True)
    routed.start_from(torch.tensor([0.2, 0.8]))
    with torch.no_grad():
        before = routed(scan)
        for parameter in routed.trainable():
            parameter.add_(0.5)
        moved = routed(scan)
        routed.reset()
        assert torch.equal(routed(scan), before)
    assert not torch.allclose(moved, before)


def test_adaptation_can_only_change_routes_and_norm_shifts():
    """The weights of the experts are buffers, and every trainable parameter has a gradient."""
    network, space, scan = unet(), experts(2), images(2, 3, 32, 32)
    for per in PER:
        routed = route(network, space, per=per, random=True, affine=True)
        assert not any(parameter.requires_grad for layer in routed._routed for parameter in layer.layer.parameters())
        routed(scan).square().mean().backward()
        norms = [layer for layer in routed._routed if isinstance(layer, RoutedBatchNorm)]
        assert {len(layer.shifts) for layer in norms} == {2}
        assert all(not layer.shifts for layer in routed._routed if layer not in norms)
        idle = [
            name
            for name, parameter in routed.named_parameters()
            if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
        ]
        assert not idle


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_network_and_global_randomness_are_untouched(name):
    """Routing, forward, backward and collapse change neither the network, nor the experts, nor the random state."""
    network, space, scan = spread(name)
    network.train()
    kept = copy.deepcopy(space)
    with untouched(network):
        routed = route(network, space, per="sample", random=True, affine=True)
        routed.set_dropout(torch.Generator().manual_seed(0))
        routed(scan).sum().backward()
        with torch.no_grad():
            for parameter in routed.trainable():
                parameter.add_(1)
            collapse(routed)
    assert all(torch.equal(tensor, kept[site][key]) for site, state in space.items() for key, tensor in state.items())


def test_starting_routes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="shape"):
        route(unet(), experts(2)).start_from(torch.ones(3) / 3)


def test_experts_that_do_not_fit_are_named():
    """The message has one line with the expert and the first key that differs."""
    network, space = unet(), experts(2)
    key = "model.0.conv.weight"
    cases: list[tuple[dict, str]] = [
        ({k: v for k, v in space["B"].items() if k != key}, "lacks"),
        ({**space["B"], key: space["B"][key][:1]}, "shape"),
        ({**space["B"], key: space["B"][key] * torch.nan}, "NaN"),
    ]
    for state, word in cases:
        with pytest.raises(InputError) as error:
            route(network, {"A": space["A"], "B": state})
        assert "'B'" in str(error.value)
        assert key in str(error.value)
        assert word in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"'B'.*'extra.weight'"):
        route(network, {"A": space["A"], "B": {**space["B"], "extra.weight": torch.ones(1)}})
    with pytest.raises(InputError, match="at least one expert"):
        route(network, {})


def test_module_with_children_and_weights_is_refused_by_name():
    class Scaled(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(1, 1, 1))
            self.scale = nn.Parameter(torch.ones(1))

    network = nn.Sequential(Scaled())
    with pytest.raises(InputError, match=r"'0' \(Scaled\)"):
        route(network, {"A": network.state_dict()})


@pytest.mark.gpu
def test_identity_on_cuda(gpu):
    network, scan = unet().to(gpu), images(2, 3, 32, 32).to(gpu)
    for per in PER:
        routed = route(network, dict.fromkeys("AB", network.state_dict()), per=per, random=True)
        torch.testing.assert_close(routed(scan), network(scan), rtol=1e-3, atol=1e-3)
        with torch.autocast(gpu.type):
            torch.testing.assert_close(routed(scan).float(), network(scan).float(), rtol=5e-2, atol=5e-2)
