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
"""Routes of a layer: free parameters, fixed values, or the output of a router that sees the layer's input."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["softmax", "sigmoid"]


def _mixture(logits: Tensor, start: Tensor, activation: Activation) -> Tensor:
    """Routes ``r_e ~ start_e * gain(logit_e)``, normalised, so that zero logits give `start` for each activation.

    The gain is the exponential function or the sigmoid. It is computed as a logarithm, because the gains of all experts
    could otherwise underflow to zero.
    """
    gain = logits if activation == "softmax" else F.logsigmoid(logits)
    return torch.softmax(start.log() + gain, dim=-1)


class FreeRoutes(nn.Module):
    """Routes of a layer that are free parameters and do not depend on its input.

    Args:
        experts: Number E of experts.
        activation: "softmax", or "sigmoid" as in the paper; here both are normalised to sum to one.
    """

    def __init__(self, experts: int, activation: Activation = "softmax") -> None:
        super().__init__()
        self.activation = activation
        self.logits = nn.Parameter(torch.zeros(1, experts))
        self.start: Tensor
        self.register_buffer("start", torch.full((experts,), 1.0 / experts))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return routes (1, E)."""
        return _mixture(self.logits, self.start, self.activation)


class FixedRoutes(nn.Module):
    """Routes of a layer that are constant.

    Args:
        routes: Routes (E,).
    """

    def __init__(self, routes: Tensor) -> None:
        super().__init__()
        self.start = routes

    def forward(self, inputs: Tensor) -> Tensor:
        """Return routes (1, E)."""
        return self.start[None].to(inputs.device)


class Router(nn.Module):
    """Routes from a layer's input: global average pool, linear C -> 2C, ReLU, dropout, linear 2C -> E, normalised.

    Args:
        channels: Number C of channels of the layer's input.
        experts: Number E of experts.
        activation: "softmax", or "sigmoid" as in the paper; here both are normalised to sum to one.
        per_volume: Whether to pool over the batch as well, so that all slices of a volume have the same routes.
        random: Whether the last linear layer starts at random weights, as in the paper. Otherwise it starts at zero,
            and the routes exactly at `start`.
        dropout: Fraction of hidden units that are dropped while :attr:`generator` is set, which is during adaptation.
        generator: Source of the initial weights; the global random state is neither read nor changed.
        axis: Axis of the channels in the layer's input; -1 for a linear layer, whose input may be (B, tokens, C).
    """

    def __init__(
        self,
        channels: int,
        experts: int,
        activation: Activation = "softmax",
        per_volume: bool = False,
        random: bool = False,
        dropout: float = 0.2,
        generator: torch.Generator | None = None,
        axis: int = 1,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.per_volume = per_volume
        self.dropout = dropout
        self.axis = axis
        self.generator: torch.Generator | None = None
        # `skip_init`, because torch's own initialisation would draw from the global random state
        self.squeeze = nn.utils.skip_init(nn.Linear, channels, 2 * channels)
        self.excite = nn.utils.skip_init(nn.Linear, 2 * channels, experts)
        with torch.no_grad():
            for linear in (self.squeeze, self.excite):
                bound = linear.in_features**-0.5
                for parameter in linear.parameters():
                    parameter.uniform_(-bound, bound, generator=generator)
            if not random:
                self.excite.weight.zero_()
                self.excite.bias.zero_()
        self.start: Tensor
        self.register_buffer("start", torch.full((experts,), 1.0 / experts))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return routes (B, E), or (1, E) per volume, for a layer's input (B, C, *spatial) or (B, ..., C)."""
        # in full precision, which is fast enough; autocast would also cache the weights from before an adaptation
        with torch.autocast(inputs.device.type, enabled=False):
            # without `flatten`, which would copy channels-last images
            others = [axis for axis in range(1, inputs.ndim) if axis != self.axis % inputs.ndim]
            pooled = inputs.float().mean(others) if others else inputs.float()
            if self.per_volume:
                pooled = pooled.mean(0, keepdim=True)
            hidden = torch.relu(self.squeeze(pooled))
            if self.generator is not None and self.dropout > 0:
                # drawn on the CPU, so that a seed gives the same dropout on every device
                keep = torch.rand(hidden.shape, generator=self.generator) >= self.dropout
                hidden = hidden * keep.to(hidden) / (1 - self.dropout)
            return _mixture(self.excite(hidden), self.start, self.activation)
