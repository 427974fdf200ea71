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
"""Networks and experts to time: random, near each other, with statistics of their own; and routing written plainly."""

from __future__ import annotations

from typing import cast

import torch
from monai.networks.nets import BasicUNet
from torch import Tensor, nn

from shared_iopfl.models.weights import copy_network
from shared_iopfl.routing.network import RoutedBatchNorm, RoutedLayer, RoutedNetwork

__all__ = ["agree", "make_experts", "make_network", "naive"]

States = dict[str, dict[str, Tensor]]


def make_network(features: int, device: torch.device, channels: int = 3, classes: int = 2) -> nn.Module:
    """The bundles' network, with random weights from a fixed seed."""
    widths = tuple(features * k for k in (1, 2, 4, 8, 16, 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = BasicUNet(2, channels, classes, widths, norm="batch", upsample="deconv")
    return network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def make_experts(network: nn.Module, count: int) -> States:
    """So many models near the network: routing mixes `count` + 1, the network's own among them."""
    experts: States = {}
    for index in range(count):
        generator = torch.Generator().manual_seed(index)

        def near(tensor: Tensor, generator: torch.Generator = generator) -> Tensor:
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            return tensor * (1 + 0.1 * noise).clamp(0.5, 1.5) if tensor.is_floating_point() else tensor.clone()

        experts[f"site{index}"] = {key: near(tensor) for key, tensor in network.state_dict().items()}
    return experts


class _NaiveLayer(nn.Module):
    """A routed layer as one would first write it: a loop over samples, in it a loop over experts.

    Where it blends the images' own statistics, those of the first images it saw stay.
    """

    def __init__(self, routed: RoutedLayer) -> None:
        super().__init__()
        self.routed = routed
        self.own: tuple[Tensor, Tensor] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        routes = self.routed.routes(inputs)
        routes = routes.expand(len(inputs), -1)
        if self.own is None and isinstance(self.routed, RoutedBatchNorm) and self.routed.blends:
            values = inputs.transpose(0, 1).flatten(1)
            self.own = values.mean(1), values.var(1, correction=0)
        outputs = []
        for sample, row in zip(inputs, routes):
            weights = {}
            for index, name in enumerate(self.routed.names):
                stack = self.routed.get_buffer(f"stack_{index}")
                mixed = torch.zeros_like(stack[0])
                for share, expert in zip(row, stack):
                    mixed = mixed + share * expert
                weights[name] = mixed + self.routed.shifts[name] if name in self.routed.shifts else mixed
            outputs.append(self._plain(weights, sample[None]))
        return torch.cat(outputs)

    def _plain(self, weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        if not isinstance(self.routed, RoutedBatchNorm):
            return cast(Tensor, torch.func.functional_call(self.routed.layer, weights, (sample,)))
        mean, var = weights["running_mean"], weights["running_var"]
        if self.own is not None:
            share = self.routed.statistics
            mean, var = ((1 - share) * kept + share * own for kept, own in zip((mean, var), self.own))
        normal = (sample - mean[:, None, None]) / torch.sqrt(var[:, None, None] + self.routed.eps)
        return normal * weights["weight"][:, None, None] + weights["bias"][:, None, None]


def naive(network: RoutedNetwork) -> nn.Module:
    """The same routed network with all its layers in the naive form, sharing what adaptation trains."""
    return copy_network(
        network.network,
        {id(layer): _NaiveLayer(layer) for layer in network.modules() if isinstance(layer, RoutedLayer)},
    )


def agree(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> float:
    """The largest difference between two outputs; an error when it is more than `tolerance`, relative to their size."""
    difference = float((one - other).abs().max())
    if not difference <= tolerance * max(1.0, float(other.abs().max())):
        raise SystemExit(f"error: the fast and the naive path differ by {difference:.2g}; nothing was timed.")
    return difference
