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
"""Several plain networks whose predictions are averaged, as one network: what a site is served by."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from shared_iopfl.models.weights import check_experts
from shared_iopfl.routing.objectives import Output, mean_prediction


class MeanOfNetworks(nn.Module):
    """Logits whose probabilities are the mean of those of several networks.

    Args:
        networks: of one architecture.
        output: "softmax" for exclusive classes, "sigmoid" for overlapping targets.
    """

    def __init__(self, networks: Sequence[nn.Module], output: Output = "softmax") -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.output: Output = output

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits (B, C, *spatial) of network inputs (B, C_in, *spatial)."""
        return mean_prediction([network(inputs) for network in self.networks], self.output)


def members_of(network: nn.Module) -> list[nn.Module]:
    """The networks of a `MeanOfNetworks`; any other network alone."""
    return list(network.networks) if isinstance(network, MeanOfNetworks) else [network]


def load_members(network: nn.Module, state: Mapping[str, Tensor], output: Output, name: str) -> nn.Module:
    """The network that a state belongs to: one like `network`, or a `MeanOfNetworks` of such.

    Args:
        network: the architecture; untouched.
        state: of one or the other.
        output: of the network.
        name: of the state's file, for the error.

    Raises:
        InputError: where it fits neither.
    """
    prefix = "networks."
    members: dict[str, dict[str, Tensor]] = {}
    if state.keys() != network.state_dict().keys() and all(key.startswith(prefix) for key in state):
        for key, tensor in state.items():
            number, _, rest = key.removeprefix(prefix).partition(".")
            members.setdefault(number, {})[rest] = tensor
    networks = []
    for weights in members.values() or [state]:
        check_experts(network, {name: weights})
        networks.append(copy.deepcopy(network).eval())
        networks[-1].load_state_dict(weights)
    return MeanOfNetworks(networks, output) if members else networks[0]
