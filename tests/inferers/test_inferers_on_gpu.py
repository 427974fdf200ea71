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
"""Outside methods on an accelerator: logits as on a CPU, half precision, and few waits for the device per scan.

The tests run on CUDA, or on the pretended device (``tests/conftest.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import experts, images, unet, volume
from tiny_inferers import ADAPTING, SOUPS, routing

from shared_iopfl.inferers.baselines import (
    BatchStatisticsInferer,
    DaWinInferer,
    EnsembleInferer,
    TentInferer,
    ViewsInferer,
    labelled_routes,
)
from shared_iopfl.routing.settings import PRESETS
from shared_iopfl.utils.stacks import StackInferer

pytestmark = pytest.mark.gpu

LOGITS = {"rtol": 1e-2, "atol": 1e-2}  # CUDA rounds the products of a convolution to ten bits
# of the host for the device, a scan of two experts on a network of four batch norms; 37 of the default's are the
# distances', which look at each batch norm of each expert
WAITS = {"default": 11, "adapted": 19, "soup": 8, "paper": 14}
METHODS: dict[str, Callable[[], StackInferer]] = {
    "plain": StackInferer,
    "views": lambda: ViewsInferer(flips=(0,)),
    "ensemble": lambda: EnsembleInferer(experts(2)),
    "DaWin": lambda: DaWinInferer(experts(2)),
    "batch statistics": BatchStatisticsInferer,
    "TENT": lambda: TentInferer(steps=2),
    **{name: lambda name=name: routing("soup", SOUPS[name]) for name in SOUPS},  # type: ignore[misc]
    **{
        f"routes a {per}": lambda per=per: routing("paper", {**ADAPTING, "per": per})
        for per in ("sample", "volume", "layer")
    },  # type: ignore[misc]
}


def on(gpu: torch.device, network: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(network).to(gpu)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_logits_of_the_cpu(gpu: torch.device, name: str) -> None:
    network, scan = unet(), volume(3)
    expected = METHODS[name]()(scan, network)
    found = METHODS[name]()(scan.to(gpu), on(gpu, network))
    assert found.device == gpu
    torch.testing.assert_close(found.cpu(), expected, **LOGITS)


@torch.no_grad()
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_in_half_precision_is_close_to_full(gpu: torch.device, name: str, half: torch.dtype) -> None:
    network, scan = unet(), volume(3).to(gpu)
    expected = METHODS[name]()(scan, on(gpu, network))
    with torch.autocast(gpu.type, half):
        found = METHODS[name]()(scan, on(gpu, network))
    assert found.dtype == torch.float32
    difference = (torch.softmax(found, 1) - torch.softmax(expected, 1)).abs().mean()
    assert difference < 0.02, f"mean difference in probability {difference:.4f}"


@torch.no_grad()
@pytest.mark.parametrize("mode", ["site", "off"])
def test_a_mode_gives_the_logits_of_the_cpu(gpu: torch.device, mode: Any) -> None:
    network, scan = unet(), volume(3)
    masks = []
    for device in (torch.device("cpu"), gpu):
        inferer, here = routing(mode=mode), on(device, network)
        if mode == "site":
            inferer.fit([scan.to(device)], here)
        masks.append(inferer(scan.to(device), here).cpu())
    torch.testing.assert_close(masks[1], masks[0], **LOGITS)


def test_routes_from_labels_are_those_of_the_cpu(gpu: torch.device) -> None:
    def fitted(device: torch.device) -> dict[str, torch.Tensor]:
        batches = [(images(2, 3, 16, 16).to(device), (images(2, 2, 16, 16, seed=1) > 0).float().to(device))]
        loss = torch.nn.functional.binary_cross_entropy_with_logits
        return labelled_routes(unet().to(device), experts(2), batches, loss, steps=3)

    expected, found = fitted(torch.device("cpu")), fitted(gpu)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor.cpu(), expected[key], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "self_trained"])
def test_the_host_waits_seldom_for_the_device(
    gpu: torch.device, waits: Callable[[Callable[[], object]], int], name: str
) -> None:
    """The device is idle during each wait; the number is bounded per scan, after the routed network is built."""
    network, scan, inferer = on(gpu, unet()), volume(3).to(gpu), routing(name)
    inferer(scan, network)
    counted = waits(lambda: inferer(scan, network))
    assert counted <= WAITS[name], f"{counted} waits"
