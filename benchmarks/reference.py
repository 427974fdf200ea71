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
"""Test-time routing as one would first write it, to hold the fast path against."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from benchmarks.networks import naive
from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.routing.network import RoutedNetwork
from shared_iopfl.utils.stacks import Network

__all__ = ["NaiveInferer"]


class NaiveInferer(TestTimeRoutingInferer):
    """`TestTimeRoutingInferer` with its three costly parts written plainly; what they decide is decided as there.

    Each expert is measured in a network of its own; every slice of every view has its kernels mixed anew, by a loop
    over the experts; nothing is collapsed. It does not adapt.
    """

    def _distances(self, some: Tensor, network: nn.Module, models: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        rows = []
        for state in models.values():
            expert = copy.deepcopy(network).eval()
            expert.load_state_dict(state)
            distances: list[Tensor] = []

            def compare(norm: nn.Module, inputs: tuple[Tensor], distances: list[Tensor] = distances) -> None:
                assert isinstance(norm, nn.BatchNorm2d) and norm.running_var is not None
                seen = inputs[0].double().transpose(0, 1).flatten(1).var(1, correction=0)
                ratio = torch.log((seen + norm.eps) / (norm.running_var.double() + norm.eps))
                alive, squares = torch.minimum(seen, norm.running_var.double()) > norm.eps, ratio**2
                squares = squares.clamp(max=squares[alive].max()) if alive.any() else squares
                distances.append(squares.mean())

            for layer in expert.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.register_forward_pre_hook(compare)
            expert(some)
            rows.append(torch.stack(distances).mean())
        return torch.stack(rows).float().cpu()

    def _plain_for(self, routed: RoutedNetwork, some: Tensor) -> nn.Module:
        assert not self.settings.steps, "the naive path does not adapt"
        slow = naive(routed)
        slow(some)  # for the statistics of the scan
        return slow

    def _batches(self, stack: Tensor, network: Network) -> Iterable[Tensor]:
        return stack.split(1)
