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
"""Adaptation of a routed network: its steps over parts of a batch."""

import pytest
import torch
from networks import experts, images, unet

from shared_iopfl.routing import adaptation
from shared_iopfl.routing.adaptation import Adaptation
from shared_iopfl.routing.network import route
from shared_iopfl.routing.objectives import ViewSampler
from shared_iopfl.routing.settings import preset


@pytest.mark.parametrize("statistics", [0.0, 0.5])
def test_steps_over_parts_of_a_batch_equal_steps_over_the_whole(monkeypatch, statistics):
    """Each part uses the batch statistics of the whole scan."""

    def learnt(pixels: int) -> torch.Tensor:
        monkeypatch.setattr(adaptation, "STEP_PIXELS", pixels)
        network, settings = unet(), preset("default", {"steps": 2, "learning_rate": 0.1})
        routed = route(network, {"global": network.state_dict(), **experts(2)}, statistics=statistics)
        views = ViewSampler((0,), noise=0.0)
        Adaptation(settings, views, "softmax", 4, 0).adapt(routed, images(4, 3, 16, 16))
        return torch.cat([parameter.detach().flatten() for parameter in routed.trainable()])

    whole = learnt(4 * 16 * 16)
    assert whole.abs().max() > 0.1
    torch.testing.assert_close(learnt(16 * 16), whole, rtol=1e-3, atol=1e-3)
