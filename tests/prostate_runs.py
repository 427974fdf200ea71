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
"""What tests of the prostate bundle share: a short federation, and how to read what a run leaves."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigWorkflow

BUNDLE = Path(__file__).parents[1] / "bundles" / "prostate_iopfl"
FEDERATE: dict[str, Any] = {
    "sites": ["A", "B"],
    "own_rounds": 1,
    "shares": [],  # untrained, all would keep the global model
    "passes": 1,
    "batch_size": 2,
    "val_interval": 1,
    "rounds": 2,
}
Run = Callable[..., ConfigWorkflow]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def weights(path: Path) -> dict[str, torch.Tensor]:
    """A file's content, which has to be a plain state_dict."""
    state = torch.load(path, weights_only=True)
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    return state


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def load(path: str | Path) -> Any:
    return nib.load(path)


def mask_of(path: Path) -> np.ndarray:
    return np.asarray(load(path).dataobj)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))
