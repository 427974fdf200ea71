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
"""What test-time adaptation costs: a step, an episodic mask, serving a site; and how much memory it takes."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from typing import Any

import fire
import torch
from torch import Tensor, nn

from benchmarks.networks import make_experts, make_network
from benchmarks.timing import alternate, machine, peak_memory, print_peak
from shared_iopfl.inferers import TestTimeRoutingInferer
from shared_iopfl.objectives import RoutingObjective, View, ViewSampler, entropy, probabilities
from shared_iopfl.routing import route
from shared_iopfl.settings import RoutingSettings, preset
from shared_iopfl.stacks import StackInferer

__all__ = ["measure"]


def _volume(size: int, slices: int, device: torch.device) -> Tensor:
    """A scan (1, 1, size, size, slices) of smooth noise, as the inferer takes it."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 1, size // 8, size // 8, slices, generator=generator)
    return nn.functional.interpolate(coarse, size=(size, size, slices), mode="trilinear").to(device)


def _inferer(network: nn.Module, experts: int, settings: RoutingSettings, mode: Any = "episodic") -> Any:
    return TestTimeRoutingInferer(make_experts(network, experts - 1), mode, settings, flips=(0,))


def _step_over_plain(network: nn.Module, experts: int, images: Tensor, repeats: int) -> dict[str, Any]:
    """One step on the routes, two views, against forward and backward of the plain network on the same two views."""
    space = {"global": network.state_dict(), **make_experts(network, experts - 1)}
    routed = route(network, space)
    objective = RoutingObjective(consistency=1.0, entropy=0.1, views=ViewSampler())
    view = View(flips=(0,), gain=1.05)

    def optimiser(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-3)

    plain = make_network(network.final_conv.in_channels, images.device)  # type: ignore[union-attr, arg-type]
    of_routes, of_plain = optimiser(routed), optimiser(plain)

    def adapt() -> None:
        of_routes.zero_grad(set_to_none=True)
        objective(routed, images, view).backward()
        of_routes.step()

    def train() -> None:
        of_plain.zero_grad(set_to_none=True)
        seen = [plain(images), plain(view.apply(images))]
        sum(entropy(probabilities(logits, "softmax"), "softmax") for logits in seen).backward()  # type: ignore[union-attr]
        of_plain.step()

    return alternate(adapt, train, images.device, repeats)


def measure(
    device: str = "cpu",
    experts: int = 7,
    slices: int = 32,
    image_size: int = 128,
    features: int = 32,
    repeats: int = 5,
    memory_slices: int = 24,
    memory_size: int = 384,
) -> dict[str, Any]:
    """Time the episodic default on a volume, its parts, and the peak memory on a larger volume.

    Args:
        device: "cpu" or "cuda".
        experts: networks in the routing space, the global one among them.
        slices, image_size: of the volume that is timed.
        features: of BasicUNet.
        repeats: timed pairs.
        memory_slices, memory_size: of the volume whose peak memory is measured; 0 slices: not measured.
    """
    place = torch.device(device)
    network, scan = make_network(features, place), _volume(image_size, slices, place)
    plain = StackInferer()

    @torch.no_grad()
    def masks(inferer: StackInferer) -> Tensor:
        return inferer(scan, network)

    ratios, seconds = {}, {}
    settings = preset("default")
    # the dial shut off: random networks have no usual shift, and the default's dearest case is an open dial
    for name, chosen in {
        "episodic": replace(settings, usual_shift=0.0),
        "episodic_one_view": replace(settings, usual_shift=0.0, average_views=False),
        "adapted": replace(preset("adapted"), usual_shift=0.0),
    }.items():
        inferer = _inferer(network, experts, chosen)
        timed = alternate(lambda inferer=inferer: masks(inferer), lambda: masks(plain), place, repeats)  # type: ignore[misc]
        ratios[f"{name}_over_plain"], seconds[name] = timed["ratio"], timed["seconds"]
        seconds["plain"] = timed["seconds_of_other"]
    site = _inferer(network, experts, replace(settings, average_views=False), "site")
    site.fit([scan], network)
    ratios["site_over_plain"] = alternate(lambda: masks(site), lambda: masks(plain), place, repeats)["ratio"]
    images = torch.randn(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    images = images.to(place, memory_format=torch.channels_last)
    step = _step_over_plain(network, experts, images, repeats)
    ratios["step_over_plain"], seconds["step"] = step["ratio"], step["seconds"]
    memory = {}
    if memory_slices:
        arguments = [device, str(experts), str(memory_slices), str(memory_size), str(features)]
        for name in ("default", "adapted"):
            memory[name] = peak_memory("benchmarks.adaptation", *arguments, name)
    return {
        "ratios": ratios,
        "seconds": seconds,
        "peak_memory_gib": memory,
        "settings": {
            "experts": experts,
            "slices": slices,
            "image_size": image_size,
            "features": features,
            "memory_volume": [memory_slices, memory_size, memory_size],
            "repeats": repeats,
            "routing": asdict(settings),
        },
        **machine(place),
    }


def memory(device: str, experts: int, slices: int, size: int, features: int, name: str) -> None:
    """Adapt to one volume and print the peak, in a process of its own; started by :func:`measure`."""
    place = torch.device(device)
    network = make_network(features, place)
    inferer = _inferer(network, experts, replace(preset(name), usual_shift=0.0))
    with torch.no_grad():
        inferer(_volume(size, slices, place), network)
    print_peak(place)


if __name__ == "__main__":
    sys.exit(fire.Fire(memory))
