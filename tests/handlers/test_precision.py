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
"""Training in bfloat16: the forward has reduced precision, the input of the loss has not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shared_iopfl.handlers.precision import AutocastInferer


@pytest.mark.parametrize("enabled", [True, False])
def test_the_forward_runs_in_bfloat16_only_if_enabled_and_returns_float32(enabled: bool) -> None:
    seen: list[torch.dtype] = []
    layer = nn.Conv2d(3, 2, 1)
    layer.register_forward_hook(lambda *call: seen.append(call[-1].dtype))

    def network(images: Tensor) -> Tensor:
        return layer(images)

    output = AutocastInferer(enabled)(torch.ones(1, 3, 4, 4), network)
    assert seen == [torch.bfloat16 if enabled else torch.float32]
    assert output.dtype == torch.float32
    output.mean().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
