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

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import fire
import torch
from torch import Tensor

from benchmarks.networks import agree, make_experts, make_network, naive
from benchmarks.timing import alternate, machine, peak_memory, print_peak
from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.routing.network import RoutedNetwork, route
from shared_iopfl.routing.settings import preset
from shared_iopfl.utils.stacks import from_stack

__all__ = ["measure"]

KINDS = ("volume", "sample", "mask", "memory")


def _routed(features: int, experts: int, place: torch.device, per: Any = "volume") -> RoutedNetwork:
    network = make_network(features, place)
    return route(network, {"global": network.state_dict(), **make_experts(network, experts - 1)}, per, random=True)


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
    kinds: str | Sequence[str] = KINDS,
) -> dict[str, Any]:
    """Time forwards of a volume in batches of 4, and measure the memory of each in a process of its own.

    Args:
        device: "cpu" or "cuda".
        few, many: numbers of experts.
        slices, image_size: of the volume.
        features: of BasicUNet.
        repeats: timed pairs.
        kinds: which to measure: a forward with routes a "volume" (one set a batch) and a "sample"; the time from a
            scan to its "mask" by the default for volumes; and "memory".
    """
    place = torch.device(device)
    inputs = _volume(slices, image_size, place)
    part = inputs[:2]
    ratios: dict[str, Any] = {}
    seconds: dict[str, Any] = {}
    differences: dict[str, float] = {}
    memory: dict[str, float] = {}

    def through(network: RoutedNetwork) -> Any:
        return lambda: [network(batch) for batch in inputs.split(4)]

    for kind in (kind for kind in ("volume", "sample") if kind in kinds):
        small, large = (_routed(features, count, place, kind) for count in (few, many))
        for name, network in (("few", small), ("many", large)):
            differences[f"{name}_{kind}"] = agree(network(part), naive(network)(part))
        timed = alternate(through(large), through(small), place, repeats)
        ratios[f"many_over_few_{kind}"] = timed["ratio"]
        seconds.update({f"many_{kind}": timed["seconds"], f"few_{kind}": timed["seconds_of_other"]})
    if "mask" in kinds:
        # a scan from its slices to its mask, by the default for volumes, whose routed copy is built beforehand as for
        # the second scan of a folder
        plain, scan = make_network(features, place), from_stack(inputs[:, :1])[None]
        routing = preset("default", {"statistics": 0.5})
        inferers = [
            TestTimeRoutingInferer(make_experts(plain, count - 1), settings=routing, flips=(0,))
            for count in (few, many)
        ]
        masks = [partial(inferer, scan, plain) for inferer in inferers]
        timed = alternate(masks[1], masks[0], place, repeats)
        ratios["many_over_few_mask"] = timed["ratio"]
        seconds.update({"many_mask": timed["seconds"], "few_mask": timed["seconds_of_other"]})
    if "memory" in kinds:
        for name, count, batch in (("few", few, 1), ("many", many, 1), ("few_4", few, 4), ("many_4", many, 4)):
            arguments = [device, str(count), str(batch), str(image_size), str(features)]
            memory[name] = peak_memory("benchmarks.scaling", *arguments)
    weights = sum(tensor.numel() * 4 for tensor in make_network(features, place).state_dict().values()) / 2**30
    # what a sample more adds must not depend on how many experts there are
    more = {name: round(memory[f"{name}_4"] - memory[name], 3) for name in ("few", "many") if name in memory}
    return {
        "ratios": ratios,
        "seconds": seconds,
        "peak_memory_gib": memory,
        "three_samples_more_gib": more,
        "weights_of_one_expert_gib": round(weights, 4),
        "differences": differences,
        "settings": {"few": few, "many": many, "slices": slices, "image_size": image_size, "features": features},
        **machine(place),
    }


class _Unread(Mapping[str, Tensor]):
    """A model whose tensors are made as they are asked for, so that the routed network alone takes memory."""

    def __init__(self, like: dict[str, Tensor], seed: int) -> None:
        self.like, self.seed = like, seed

    def __getitem__(self, key: str) -> Tensor:
        if not self.like[key].is_floating_point():
            return self.like[key]
        # positive, as variances are; what the weights are does not matter here
        return self.like[key].abs() + torch.rand(
            self.like[key].shape, generator=torch.Generator().manual_seed(self.seed)
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


@torch.no_grad()
def memory(device: str, experts: int, batch: int, image_size: int, features: int) -> None:
    """Run one batch and print the peak, in a process of its own; started by :func:`measure`."""
    place = torch.device(device)
    network = make_network(features, place)
    like = {key: tensor.cpu() for key, tensor in network.state_dict().items()}
    route(network, {str(n): _Unread(like, n) for n in range(experts)}, "volume")(_volume(batch, image_size, place))
    print_peak(place)


if __name__ == "__main__":
    fire.Fire(memory)
