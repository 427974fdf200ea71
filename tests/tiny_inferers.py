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
"""Objects for the tests of test-time routing: an inferer of two experts, settings, and a harmful adaptation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from networks import experts, images
from torch import Tensor

from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.routing.network import RoutedNetwork
from shared_iopfl.routing.settings import preset

ADAPTING = {"steps": 2, "agreement": 0.0}
# an adaptation that improves its objective on any network, so that the guard lets it pass
ENTROPY = {"consistency": 0.0, "entropy": 1.0, "shape": 0.0}
COMPARE = Path(__file__).parents[1] / "bundles" / "common" / "compare.json"
# methods of a comparison that are settings of the preset soup
SOUPS: dict[str, dict[str, Any]] = {
    name: method["routing"]
    for name, method in json.loads(COMPARE.read_text(encoding="utf-8"))["outside"].items()
    if method.get("preset") == "soup" and isinstance(method["routing"], dict)
}
LEARNT = {"steps": 3, "learning_rate": 0.1, "agreement": 0.0, "objective": ENTROPY}


def routing(name: str = "default", overrides: Mapping[str, Any] | None = None, **kwargs: Any) -> TestTimeRoutingInferer:
    """An inferer, by default with distance routes and running statistics, because most tests concern routes."""
    if name in ("default", "adapted"):
        overrides = {"start": "distance", "statistics": 0.0, **(overrides or {})}
    return TestTimeRoutingInferer(experts(2), settings=preset(name, overrides), **{"flips": [0], **kwargs})


def harmful(routed: RoutedNetwork, some: Tensor) -> None:
    with torch.no_grad():
        for parameter in routed.trainable():
            parameter.add_(images(*parameter.shape, seed=4))
