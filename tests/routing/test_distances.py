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
"""Routes by distance, which prefer the expert that was trained on data like the scan."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import experts, images, unet, untouched
from torch import Tensor, nn

from shared_iopfl.routing.distances import distance_routes, distribution_distance
from shared_iopfl.utils.errors import InputError

SCALES = {"weak": 0.5, "plain": 1.0, "strong": 3.0}


@pytest.fixture(scope="module")
def sites() -> dict[str, dict[str, Tensor]]:
    """Experts with equal weights, and batch-norm statistics of images of different contrast."""
    states = {}
    for site, scale in SCALES.items():
        network = unet().train()
        with torch.no_grad():
            for step in range(60):
                network(scale * images(4, 3, 32, 32, seed=step))
        states[site] = dict(network.state_dict())
    return states


@pytest.mark.parametrize("site", SCALES)
def test_the_nearest_expert_is_the_one_trained_on_such_images(sites, site):
    """A scan with the contrast of a site is nearest to its expert; at the first batch norm the distance is almost 0."""
    scan = SCALES[site] * images(8, 3, 32, 32, seed=1000)
    distances = distribution_distance(unet(), sites, [scan])
    assert distances.shape == (3, sum(isinstance(module, nn.BatchNorm2d) for module in unet().modules()))
    routes = distance_routes(distances)
    assert list(sites)[int(routes.argmax())] == site
    assert routes.max() > 0.5
    own = list(sites).index(site)
    assert distances[own, 0] < 0.01 < min(distances[other, 0] for other in range(3) if other != own)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_distance_does_not_depend_on_the_batch_size(size):
    scan = images(7, 3, 32, 32) + 2
    whole = distribution_distance(unet(), experts(2), [scan])
    parts = distribution_distance(unet(), experts(2), iter(scan.split(size)))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_distance_equals_the_formula():
    """The mean over channels of the squared log ratio of variances at the input of the batch norm."""
    network = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2)).eval()
    state = copy.deepcopy(network.state_dict())
    state["1.running_var"] = torch.tensor([2.0, 0.5])
    scan = images(2, 1, 8, 8)
    weight = state["0.weight"].flatten()
    variance = weight**2 * scan.var(correction=0)
    expected = (torch.log((variance + 1e-5) / (state["1.running_var"] + 1e-5)) ** 2).mean()
    found = distribution_distance(network, {"a": state}, [scan])
    torch.testing.assert_close(found, expected.reshape(1, 1), rtol=1e-4, atol=1e-5)


def test_every_expert_is_run_with_its_own_weights_under_autocast():
    """Autocast caches half-precision weights, and must not use those of the first expert for the second."""
    space, scan = experts(2), [images(2, 3, 32, 32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together = distribution_distance(unet(), space, scan)
    for row, (site, state) in zip(together, space.items()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            alone = distribution_distance(unet(), {site: state}, scan)
        assert torch.equal(row, alone[0])


def test_network_and_global_randomness_are_untouched():
    network = unet().train()
    with untouched(network):
        distribution_distance(network, experts(2), [images(2, 3, 32, 32)])


@pytest.mark.parametrize("scan", [torch.zeros(2, 3, 32, 32), torch.full((2, 3, 32, 32), 1e4)])
def test_constant_images_give_finite_routes(scan):
    routes = distance_routes(distribution_distance(unet(), experts(2), [scan]))
    assert torch.isfinite(routes).all()
    torch.testing.assert_close(routes.sum(), torch.tensor(1.0))


def test_batch_norms_without_input_do_not_count():
    """An auxiliary branch that a forward leaves out has no distance, and not NaN."""

    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.auxiliary = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.main(inputs)

    network = Branched().eval()
    distances = distribution_distance(network, {"a": network.state_dict()}, [images(1, 3, 4, 4)])
    assert distances.shape == (1, 1)
    assert torch.isfinite(distances).all()


@pytest.mark.parametrize("dead", ["scan", "expert"])
def test_one_dead_channel_of_eight_does_not_dominate(dead):
    """A channel that is constant in the scan or in training counts as the farthest of the others."""
    network = nn.Sequential(nn.Conv2d(1, 8, 1, bias=False), nn.BatchNorm2d(8)).eval()
    scan = images(2, 1, 16, 16)
    weight = torch.ones(8, 1, 1, 1)
    variance = torch.full((8,), float(scan.var(correction=0))) * torch.linspace(0.5, 2, 8)
    if dead == "scan":
        weight[0] = 0
    else:
        variance[0] = 0
    state = {**network.state_dict(), "0.weight": weight, "1.running_var": variance}
    others = (torch.log(variance[1:] / scan.var(correction=0))) ** 2
    found = distribution_distance(network, {"a": state}, [scan])
    torch.testing.assert_close(found[0, 0], (others.sum() + others.max()) / 8, rtol=1e-3, atol=1e-4)


def test_statistics_that_cannot_be_compared_are_refused_with_layer_and_expert():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)).eval()
    damaged = {**network.state_dict(), "1.running_var": torch.tensor([1.0, -1.0])}
    with pytest.raises(InputError, match=r"at '1' .* expert 'B'"):
        distribution_distance(network, {"A": network.state_dict(), "B": damaged}, [images(1, 3, 16, 16)])


def test_network_without_batch_norm_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.InstanceNorm2d(2))
    with pytest.raises(InputError, match="start='uniform'"):
        distribution_distance(network, {"A": network.state_dict()}, [images(1, 3, 16, 16)])


# ---- from distances to routes ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=7), st.floats(0.01, 10))
@settings(max_examples=40, deadline=None)
def test_routes_sum_to_one_and_prefer_near_experts(distances, temperature):
    values = torch.tensor(distances)
    routes = distance_routes(values, temperature)
    torch.testing.assert_close(routes.sum(), torch.tensor(1.0))
    assert routes.min() >= 0
    assert routes[values.argmin()] == routes.max()


def test_equal_distances_give_uniform_routes_and_the_temperature_sharpens():
    torch.testing.assert_close(distance_routes(torch.full((4, 3), 0.7)), torch.full((4,), 0.25))
    near = torch.tensor([1.0, 2.0, 3.0])
    assert distance_routes(near, 0.01)[0] > 0.999
    assert distance_routes(near, 1e4).std() < 1e-3
    torch.testing.assert_close(distance_routes(near[:, None].expand(3, 5)), distance_routes(near))


def test_distances_that_hardly_differ_hardly_move_the_routes():
    """The size of the difference matters, not the rank: a relative difference of 0.0003 hardly changes the routes."""
    routes = distance_routes(torch.tensor([0.3, 0.3001]))
    assert 0.5 < routes[0] < 0.51
    apart = distance_routes(torch.tensor([0.3, 0.6]))
    torch.testing.assert_close(apart[0], torch.tensor(0.88), rtol=0.01, atol=0)
    torch.testing.assert_close(distance_routes(torch.tensor([3.0, 6.0])), apart)  # the unit does not matter
