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
"""What else could make inference faster: the memory format, bfloat16, `torch.compile`; each over plain inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.networks import agree, make_network
from benchmarks.timing import alternate, machine, now

__all__ = ["measure"]


@torch.no_grad()
def measure(
    device: str = "cpu",
    slices: int = 6,
    image_size: int = 384,
    features: int = 32,
    batch_size: int = 3,
    repeats: int = 3,
    compiled: bool = True,
) -> dict[str, Any]:
    """Time plain forwards in float32, eager and channels last, against each of them another way.

    Args:
        device: "cpu" or "cuda".
        slices, image_size: of the volume.
        features: of BasicUNet.
        batch_size: slices a forward.
        repeats: timed pairs.
        compiled: `torch.compile` too, which needs a C++ compiler and a minute.
    """
    place = torch.device(device)
    network = make_network(features, place)
    inputs = torch.randn(slices, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(place)
    last = inputs.contiguous(memory_format=torch.channels_last)

    def through(module: Callable[[Tensor], Tensor], images: Tensor) -> Any:
        return lambda: [module(batch) for batch in images.split(batch_size)]

    def in_bf16() -> list[Tensor]:
        with torch.autocast(place.type, torch.bfloat16):
            return [network(batch) for batch in last.split(batch_size)]

    contiguous = make_network(features, place).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    ways: dict[str, Any] = {"contiguous": through(contiguous, inputs), "bf16": in_bf16}
    seconds: dict[str, Any] = {}
    if compiled:
        ways["compiled"] = through(torch.compile(network), last)
        began = now()
        ways["compiled"]()
        seconds["compiling"] = round(now() - began, 1)
    plain = through(network, last)
    expected = torch.cat(plain()).softmax(1)
    ratios, differences = {}, {}
    for name, way in ways.items():
        # bfloat16 has three digits: what that does to masks is for `accuracy` to say
        probability = torch.cat(way()).float().softmax(1)
        differences[name] = agree(probability, expected, 1.0 if name == "bf16" else 1e-4)
        timed = alternate(way, plain, place, repeats)
        ratios[f"{name}_over_plain"], seconds[name] = timed["ratio"], timed["seconds"]
        seconds["plain"] = timed["seconds_of_other"]
    settings = {"slices": slices, "image_size": image_size, "features": features, "batch_size": batch_size}
    return {"ratios": ratios, "seconds": seconds, "differences": differences, "settings": settings, **machine(place)}
