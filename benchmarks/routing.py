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
"""What a routed forward costs over a plain one: routes a sample, a volume, a layer, and collapsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.networks import agree, make_experts, make_network, naive
from benchmarks.timing import alternate, machine
from shared_iopfl.routing.network import collapse, route

__all__ = ["measure"]

KINDS = ("sample", "volume", "layer", "collapsed")


@torch.no_grad()
def measure(
    device: str = "cpu",
    experts: int = 7,
    slices: int = 24,
    image_size: int = 384,
    features: int = 32,
    batch_size: int = 4,
    repeats: int = 5,
    naive_too: bool = False,
    kinds: str | Sequence[str] = KINDS,
) -> dict[str, Any]:
    """Time forwards of `slices` in batches of `batch_size`, seven experts (six sites and the global model).

    Args:
        device: "cpu" or "cuda".
        experts: networks in the routing space, the global one among them.
        slices, image_size: of the volume.
        features: of BasicUNet.
        batch_size: slices a forward.
        repeats: timed pairs.
        naive_too: time the loop over samples and experts as well.
        kinds: which to time: a router's routes for each "sample" or "volume", free routes a "layer", "collapsed".
    """
    place = torch.device(device)
    network = make_network(features, place)
    space = {"global": network.state_dict(), **make_experts(network, experts - 1)}
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(slices, 3, image_size, image_size, generator=generator).to(
        place, memory_format=torch.channels_last
    )

    def through(module: torch.nn.Module) -> Any:
        return lambda: [module(batch) for batch in inputs.split(batch_size)]

    ratios: dict[str, Any] = {}
    seconds: dict[str, Any] = {}
    differences: dict[str, float] = {}
    few = inputs[: min(3, slices)]
    for kind in (kind for kind in KINDS if kind in kinds):
        per: Any = "layer" if kind == "collapsed" else kind
        routed = route(network, space, per=per, random=True)
        slow = naive(routed)
        fast = collapse(routed).eval() if kind == "collapsed" else routed
        differences[kind] = agree(fast(few), slow(few))
        timed = alternate(through(fast), through(network), place, repeats)
        ratios[f"routed_{kind}_over_plain"], seconds[kind] = timed["ratio"], timed["seconds"]
        seconds["plain"] = timed["seconds_of_other"]
        if naive_too:
            ratios[f"naive_{kind}_over_plain"] = alternate(through(slow), through(network), place, 1, 0)["ratio"]
    settings = {
        "experts": experts,
        "slices": slices,
        "image_size": image_size,
        "features": features,
        "batch_size": batch_size,
        "repeats": repeats,
    }
    return {"ratios": ratios, "seconds": seconds, "differences": differences, "settings": settings, **machine(place)}
