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
"""A network that averages the predictions of several plain networks, which is how a site may be served."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from shared_iopfl.models.weights import Weights, check_experts, copy_network
from shared_iopfl.routing.objectives import Output, mean_prediction


class MeanOfNetworks(nn.Module):
    """A network whose probabilities are the mean of those of several networks.

    Args:
        networks: Networks of one architecture.
        output: "softmax" for exclusive classes, "sigmoid" for overlapping targets.
    """

    def __init__(self, networks: Sequence[nn.Module], output: Output = "softmax") -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.output: Output = output

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, C, *spatial) for network inputs (B, C_in, *spatial)."""
        return mean_prediction([network(inputs) for network in self.networks], self.output)


def members_of(network: nn.Module) -> list[nn.Module]:
    """Return the networks of a `MeanOfNetworks`, or a list of any other network alone."""
    return list(network.networks) if isinstance(network, MeanOfNetworks) else [network]


def load_members(network: nn.Module, state: Weights, output: Output, name: str) -> nn.Module:
    """Make the network that a state belongs to: one like `network`, or a `MeanOfNetworks` of such networks.

    Args:
        network: Network that defines the architecture; it is not changed.
        state: State of a network of either kind.
        output: Kind of the network's output.
        name: Name of the file that the state was read from, for the error message.

    Raises:
        InputError: If the state fits neither.
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
        networks.append(copy_network(network).eval())
        networks[-1].load_state_dict(weights)
    return MeanOfNetworks(networks, output) if members else networks[0]
