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
"""Both bundles as clients of MONAI's federated learning: copies of them, their sites' data, and weights to exchange."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.fl.utils.exchange_object import ExchangeObject
from torch import Tensor

BUNDLES = Path(__file__).parents[1] / "bundles"
NAMES = sorted(path.parents[1].name for path in BUNDLES.glob("*/configs/metadata.json"))
TINY: dict[str, Any] = {"image_size": 32, "features": 4, "device": "cpu", "passes": 1, "batch_size": 2}
FILTERS = "configs/fl_filters.json"


def weights_of(workflow: ConfigWorkflow | None) -> dict[str, Tensor]:
    """Initial weights, by a second parser over a client's config, as MONAI's own tests make them."""
    assert workflow is not None
    parser = ConfigParser(config=deepcopy(workflow.parser.get()))
    parser.parse()
    return parser.get_parsed_content("network").state_dict()


def exchange(weights: dict[str, Tensor]) -> ExchangeObject:
    return ExchangeObject(weights={key: tensor.clone() for key, tensor in weights.items()})


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def load(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)
