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
"""Mixed precision: under autocast a routed network runs the same layers in half precision as the plain network.

On a CPU a layer processes one sample after another, elsewhere all at once; both are tested here.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import pytest
import torch
from networks import spread
from torch import Tensor, nn

from shared_iopfl.routing import layers
from shared_iopfl.routing.network import RoutedNetwork, route

CPU = torch.device("cpu")
HALF = (torch.bfloat16, torch.float16)
NETWORKS = ("BasicUNet 2D", "UNet", "SegResNet", "DynUNet")
Per = Literal["sample", "volume", "layer"]


@pytest.fixture
def _together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process all samples at once, as on CUDA."""
    monkeypatch.setattr(layers, "WITHOUT_GROUPS", ())


def output_types(network: nn.Module, names: tuple[str, ...], scan: Tensor, half: torch.dtype) -> tuple[Counter, Tensor]:
    """The number of named layers by the type of their output under autocast, and the output of the network."""
    seen: Counter = Counter()
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda layer, inputs, output: seen.update([output.dtype]))
        for name in names
    ]
    with torch.autocast(scan.device.type, dtype=half):
        output = network(scan)
    for hook in hooks:
        hook.remove()
    return seen, output[0] if isinstance(output, list) else output


def moved(routed: RoutedNetwork) -> RoutedNetwork:
    """Routes that differ from sample to sample, and from layer to layer."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in routed.trainable():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return routed


@torch.no_grad()
def check_types(
    name: str, per: Per, half: torch.dtype, but: tuple[type[nn.Module], ...] = (), device: torch.device = CPU
) -> None:
    network, space, scan = spread(name, 2)
    network, scan = network.to(device), scan.to(device)
    routed = moved(route(network, space, per=per))
    counted = tuple(layer for layer in routed.layers if not isinstance(network.get_submodule(layer), but))
    expected, plain = output_types(network, counted, scan[:1], half)
    found, output = output_types(routed.network, counted, scan[:2], half)
    assert found == expected
    assert expected[half] > 0
    assert output.dtype == plain.dtype


@pytest.mark.parametrize("per", ["sample", "volume", "layer"])
@pytest.mark.parametrize("name", NETWORKS)
def test_as_many_layers_run_in_half_precision_as_in_the_plain_network(name: str, per: Per) -> None:
    check_types(name, per, torch.bfloat16)


@pytest.mark.usefixtures("_together")
@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_as_many_layers_run_in_half_precision_if_samples_share_a_forward(name: str, half: torch.dtype) -> None:
    """By the rules of CUDA, where a group norm returns float32; on a CPU it returns half precision."""
    check_types(name, "sample", half, but=(nn.GroupNorm,))


@pytest.mark.usefixtures("_together")
@pytest.mark.parametrize("name", ["UNet", "DynUNet"])
def test_gradients_to_the_routes_are_those_of_full_precision(name: str) -> None:
    """They are finite, in float32, and have the direction of the full-precision gradient."""
    network, space, scan = spread(name, 2)
    gradients = []
    for enabled in (False, True):
        routed = moved(route(network, space, per="sample", affine=True))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = routed(scan)
        output.float().square().mean().backward()
        rows = [parameter.grad for parameter in routed.trainable() if parameter.grad is not None]
        assert {row.dtype for row in rows} == {torch.float32}
        gradients.append(torch.cat([row.flatten() for row in rows]))
    full, half = gradients
    assert torch.isfinite(half).all()
    assert torch.cosine_similarity(full, half, dim=0) > 0.98


@pytest.mark.usefixtures("_together")
@torch.no_grad()
def test_variances_beyond_the_range_of_float16_do_not_overflow() -> None:
    """Inputs of 10^4 have a variance of 10^8, and the largest float16 is 65504."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)).eval()
    assert isinstance(network[0].running_var, Tensor)
    network[0].running_var.fill_(1e8)
    scan = 1e4 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for statistics in (0.0, 0.5, 1.0):
        routed = route(network, dict.fromkeys("AB", network.state_dict()), per="sample", statistics=statistics)
        expected = routed(scan)
        with torch.autocast("cpu", dtype=torch.float16):
            found = routed(scan.half())
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


class Squared(nn.Conv2d):
    """A layer with its own forward, whose types under autocast are not known."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).float() ** 2


@pytest.mark.usefixtures("_together")
@torch.no_grad()
def test_a_layer_with_its_own_forward_is_not_cast() -> None:
    network, scan = nn.Sequential(Squared(3, 2, 1)), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    routed = route(network, dict.fromkeys("AB", network.state_dict()), per="sample")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(routed(scan), network(scan))


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("per", ["sample", "volume", "layer"])
@pytest.mark.parametrize("name", NETWORKS)
def test_as_many_layers_run_in_half_precision_on_an_accelerator(
    gpu: torch.device, name: str, per: Per, half: torch.dtype
) -> None:
    check_types(name, per, half, device=gpu)
