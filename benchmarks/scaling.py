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
"""What many experts cost: a routed forward with 64 against one with 7, and the memory that they take."""

from __future__ import annotations

import sys
from typing import Any

import fire
import torch

from benchmarks.networks import agree, make_experts, make_network, naive
from benchmarks.timing import alternate, machine, peak_memory, print_peak
from shared_iopfl.routing import RoutedNetwork, route

__all__ = ["measure"]


def _routed(features: int, experts: int, place: torch.device) -> RoutedNetwork:
    network = make_network(features, place)
    return route(network, {"global": network.state_dict(), **make_experts(network, experts - 1)}, per="volume")


def _volume(slices: int, image_size: int, place: torch.device) -> torch.Tensor:
    inputs = torch.randn(slices, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    return inputs.to(place, memory_format=torch.channels_last)


@torch.no_grad()
def measure(
    device: str = "cpu",
    few: int = 7,
    many: int = 64,
    slices: int = 24,
    image_size: int = 384,
    features: int = 32,
    repeats: int = 3,
) -> dict[str, Any]:
    """Time forwards of a volume in batches of 4, and measure the memory of each in a process of its own.

    Args:
        device: "cpu" or "cuda".
        few, many: numbers of experts.
        slices, image_size: of the volume.
        features: of BasicUNet.
        repeats: timed pairs.
    """
    place = torch.device(device)
    inputs = _volume(slices, image_size, place)
    small, large = (_routed(features, count, place) for count in (few, many))
    part = inputs[:2]
    differences = {"few": agree(small(part), naive(small)(part)), "many": agree(large(part), naive(large)(part))}

    def through(network: RoutedNetwork) -> Any:
        return lambda: [network(batch) for batch in inputs.split(4)]

    timed = alternate(through(large), through(small), place, repeats)
    memory = {
        name: peak_memory("benchmarks.scaling", device, str(count), str(batch), str(image_size), str(features))
        for name, count, batch in (("few", few, 1), ("many", many, 1), ("few_4", few, 4), ("many_4", many, 4))
    }
    weights = sum(tensor.numel() * 4 for tensor in make_network(features, place).state_dict().values()) / 2**30
    # what a sample more adds must not depend on how many experts there are
    more = {name: round(memory[f"{name}_4"] - memory[name], 3) for name in ("few", "many")}
    return {
        "ratios": {"many_over_few": timed["ratio"]},
        "seconds": {"many": timed["seconds"], "few": timed["seconds_of_other"]},
        "peak_memory_gib": memory,
        "three_samples_more_gib": more,
        "weights_of_one_expert_gib": round(weights, 4),
        "differences": differences,
        "settings": {"few": few, "many": many, "slices": slices, "image_size": image_size, "features": features},
        **machine(place),
    }


@torch.no_grad()
def memory(device: str, experts: int, batch: int, image_size: int, features: int) -> None:
    """Run one batch and print the peak, in a process of its own; started by :func:`measure`."""
    place = torch.device(device)
    _routed(features, experts, place)(_volume(batch, image_size, place))
    print_peak(place)


if __name__ == "__main__":
    sys.exit(fire.Fire(memory))
