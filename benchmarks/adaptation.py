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

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import fire
import torch
from torch import Tensor, nn

from benchmarks.networks import agree, make_experts, make_network, naive
from benchmarks.reference import NaiveInferer
from benchmarks.timing import alternate, machine, peak_memory, print_peak
from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.models.weights import copy_network
from shared_iopfl.routing.network import route
from shared_iopfl.routing.objectives import RoutingObjective, View, entropy, probabilities
from shared_iopfl.routing.settings import RoutingSettings, preset
from shared_iopfl.utils.stacks import StackInferer

__all__ = ["measure"]


def _volume(size: int, slices: int, device: torch.device) -> Tensor:
    """A scan (1, 1, size, size, slices) of smooth noise, as the inferer takes it."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 1, size // 8, size // 8, slices, generator=generator)
    return nn.functional.interpolate(coarse, size=(size, size, slices), mode="trilinear").to(device)


def _inferer(network: nn.Module, experts: int, settings: RoutingSettings, **options: Any) -> TestTimeRoutingInferer:
    return TestTimeRoutingInferer(make_experts(network, experts - 1), settings=settings, flips=(0,), **options)


def _check_masks(network: nn.Module, experts: int, settings: RoutingSettings, scan: Tensor) -> float:
    """The largest difference in probability between the fast episodic path and the naive one."""
    fast = _inferer(network, experts, settings)
    slow = NaiveInferer(fast.experts, settings=settings, flips=(0,))
    with torch.no_grad():
        masks = [probabilities(inferer(scan, network), "softmax") for inferer in (fast, slow)]
    return agree(masks[0], masks[1])


def _step_over_plain(network: nn.Module, experts: int, images: Tensor, repeats: int) -> tuple[dict[str, Any], float]:
    """One step on the routes, two views, against forward and backward of the plain network on the same two views.

    With it the largest difference between its gradient to the routes and that of the naive network.
    """
    space = {"global": network.state_dict(), **make_experts(network, experts - 1)}
    routed = route(network, space)
    objective = RoutingObjective(consistency=1.0, entropy=0.1)
    view = View(flips=(0,), gain=1.05)

    def gradient(module: nn.Module) -> Tensor:
        routed.zero_grad()
        objective(module, images[:1], view).backward()
        return torch.cat([parameter.grad for parameter in routed.trainable() if parameter.grad is not None])

    fast, slow = gradient(routed), gradient(naive(routed))
    difference = agree(fast / slow.abs().max(), slow / slow.abs().max())

    def optimiser(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-3)

    plain = copy_network(network)
    of_routes, of_plain = optimiser(routed), optimiser(plain)

    def adapt() -> None:
        of_routes.zero_grad(set_to_none=True)
        for term in objective.terms(routed, images, view):
            term.backward()
        of_routes.step()

    def train() -> None:
        of_plain.zero_grad(set_to_none=True)
        seen = [plain(images), plain(view.apply(images))]
        sum(entropy(probabilities(logits, "softmax"), "softmax") for logits in seen).backward()  # type: ignore[union-attr]
        of_plain.step()

    return alternate(adapt, train, images.device, repeats), difference


PARTS = ("step", "episodic", "adapted", "site", "memory")


def measure(
    device: str = "cpu",
    experts: int = 7,
    slices: int = 32,
    image_size: int = 128,
    features: int = 32,
    repeats: int = 5,
    memory_slices: int = 24,
    memory_size: int = 384,
    parts: str | Sequence[str] = PARTS,
) -> dict[str, Any]:
    """Time the episodic default on a volume, its parts, and the peak memory on a larger volume.

    Args:
        device: "cpu" or "cuda".
        experts: networks in the routing space, the global one among them.
        slices, image_size: of the volume that is timed.
        features: of BasicUNet.
        repeats: timed pairs.
        memory_slices, memory_size: of the volume whose peak memory is measured.
        parts: which of "step", "episodic", "adapted", "site" and "memory" to measure.
    """
    place = torch.device(device)
    network, scan = make_network(features, place), _volume(image_size, slices, place)
    plain = StackInferer()
    # as for volumes: half of the statistics are the scan's own
    default = preset("default", {"statistics": 0.5})
    ratios: dict[str, Any] = {}
    seconds: dict[str, Any] = {}
    differences: dict[str, float] = {}
    memory: dict[str, float] = {}

    def over_plain(name: str, inferer: StackInferer) -> None:
        @torch.no_grad()
        def masks(inferer: StackInferer) -> Tensor:
            return inferer(scan, network)

        timed = alternate(lambda: masks(inferer), lambda: masks(plain), place, repeats)
        ratios[f"{name}_over_plain"], seconds[name] = timed["ratio"], timed["seconds"]
        seconds["plain"] = timed["seconds_of_other"]

    if "step" in parts:
        # so many slices a step, by default
        shape = (min(16, slices), 3, image_size, image_size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        images = images.to(place, memory_format=torch.channels_last)
        step, differences["gradient"] = _step_over_plain(network, experts, images, repeats)
        ratios["step_over_plain"], seconds["step"] = step["ratio"], step["seconds"]
    if "episodic" in parts:
        differences["episodic"] = _check_masks(network, experts, default, scan[..., : min(4, slices)])
        over_plain("episodic", _inferer(network, experts, default))
        over_plain("episodic_one_view", _inferer(network, experts, replace(default, views="judge")))
    if "adapted" in parts:
        over_plain("adapted", _inferer(network, experts, preset("adapted", {"statistics": 0.5})))
    if "site" in parts:
        one_view = replace(default, views="none")
        differences["site"] = _check_masks(network, experts, one_view, scan[..., : min(4, slices)])
        site = _inferer(network, experts, one_view, mode="site")
        site.fit([scan], network)
        over_plain("site", site)
    if "memory" in parts:
        arguments = [device, str(experts), str(memory_slices), str(memory_size), str(features)]
        for name in ("default", "adapted"):
            memory[name] = peak_memory("benchmarks.adaptation", *arguments, name)
    return {
        "ratios": ratios,
        "seconds": seconds,
        "peak_memory_gib": memory,
        "differences": differences,
        "settings": {
            "experts": experts,
            "slices": slices,
            "image_size": image_size,
            "features": features,
            "memory_volume": [memory_slices, memory_size, memory_size],
            "repeats": repeats,
            "routing": asdict(default),
        },
        **machine(place),
    }


def memory(device: str, experts: int, slices: int, size: int, features: int, name: str) -> None:
    """Adapt to one volume and print the peak, in a process of its own; started by :func:`measure`."""
    place = torch.device(device)
    network = make_network(features, place)
    settings = preset(name, {"statistics": 0.5})
    # a second step takes the memory of a tenth
    inferer = _inferer(network, experts, replace(settings, steps=min(2, settings.steps)))
    with torch.no_grad():
        inferer(_volume(size, slices, place), network)
    print_peak(place)


if __name__ == "__main__":
    fire.Fire(memory)
