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
"""The server's step: plain averaging, or averaging with momentum (FedAvgM).

In FedAvg each site makes a few steps per round, and their average moves no further than one site does. Training on
pooled data makes as many steps per epoch as all sites together. Momentum at the server compensates for much of this
difference, at no cost for the sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from shared_iopfl.utils.checks import check_values


class ServerMomentum:
    r"""FedAvgM (Hsu et al. 2019, arXiv 1909.06335) in Nesterov's form.

    With w the global weights that a round began with and a the average of the sites' local ones,

    .. math:: v \leftarrow \beta \, v + (a - w), \qquad w \leftarrow a + \beta \, v

    for the network's parameters. Its buffers, such as the running statistics of batch norm, are as averaged: they
    describe a, and a step beyond it could make a variance negative.

    Args:
        momentum: beta, in [0, 1); 0 is plain FedAvg.

    Attributes:
        velocity: v, parameter name -> tensor; empty before the first round.
    """

    def __init__(self, momentum: float = 0.0) -> None:
        check_values({"server_momentum": momentum})
        self.momentum = momentum
        self.velocity: dict[str, Tensor] = {}

    def step(
        self, weights: Mapping[str, Tensor], average: Mapping[str, Tensor], parameters: Iterable[str]
    ) -> dict[str, Tensor]:
        """The next global weights.

        Args:
            weights: that the round began with.
            average: of the sites' local weights.
            parameters: names of the network's parameters among the keys; all else is taken from the average.
        """
        following = dict(average)
        if not self.momentum:
            return following
        for name in parameters:
            moved = average[name] - weights[name].to(average[name])
            if name in self.velocity:
                moved = self.momentum * self.velocity[name] + moved
            self.velocity[name] = moved
            following[name] = average[name] + self.momentum * moved
        return following

    def state_dict(self) -> dict[str, Any]:
        """The state to be kept in a checkpoint."""
        return {"velocity": dict(self.velocity)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        self.velocity = dict(state["velocity"])
