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
"""Networks with unusual layers, which routing mixes or refuses."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from networks import make
from torch import Tensor, nn


class ShiftedNorm(nn.BatchNorm2d):
    """A batch norm with its own forward."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs) + 1


class Around(nn.Module):
    """A convolution, further layers, and a convolution."""

    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.middle = nn.Sequential(*middle)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.middle(self.first(inputs)))


class AsksForType(Around):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(
            self.first(inputs) if isinstance(self.first, nn.Conv2d) else inputs.mean(1, True).repeat(1, 4, 1, 1)
        )


class AsksForWeight(Around):
    def forward(self, inputs: Tensor) -> Tensor:
        first = self.first(inputs)
        return self.last(first if hasattr(self.last, "weight") else 2 * first)


class ReadsWeight(Around):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(F.conv2d(inputs, self.first.weight, padding=1))


class ClosesOver(Around):
    def __init__(self) -> None:
        super().__init__()
        first = self.first
        self.run = lambda inputs: first(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.run(inputs))


class Twice(Around):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(4))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.middle(torch.relu(3 * self.middle(self.first(inputs)) + 1)))


class Spare(Around):
    """A batch norm without input, as in the encoder of FlexibleUNet."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(4))
        self.spare = nn.BatchNorm2d(4)


class Phase(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs * self.turn[:, None, None]).real


class Upsampling(Around):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 4, 3, 2, 1), nn.ConvTranspose2d(4, 4, 3, 2, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.up(self.down(self.first(inputs)), output_size=inputs.shape[-2:]))


class Tokens(Around):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.middle(self.first(inputs).movedim(1, -1)).movedim(-1, 1))


class Listed(Around):
    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1))])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.first(inputs) * self.scales[0])


class Several(Around):
    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        output = self.last(self.first(inputs))
        return output, -output


def hooked() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.register_forward_hook(double)
    return Around(norm)


def double(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 2 * output


def space(build: Callable[[], nn.Module], count: int = 3) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
    return make(build, 0), {f"e{n}": dict(make(build, n).state_dict()) for n in range(count)}


WORKS: dict[str, Callable[[], nn.Module]] = {
    "subclass": lambda: Around(ShiftedNorm(4)),
    "hook": hooked,
    "complex": lambda: Around(Phase()),
    "output_size": Upsampling,
    "tokens": Tokens,
    "unused": Spare,
    "twice": Twice,
    "tracked instance norm": lambda: Around(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
}
