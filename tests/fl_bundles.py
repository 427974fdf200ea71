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

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from monai.fl.utils.exchange_object import ExchangeObject
from torch import Tensor

BUNDLES = Path(__file__).parents[1] / "bundles"
NAMES = sorted(path.parents[1].name for path in BUNDLES.glob("*/configs/metadata.json"))
TINY: dict[str, Any] = {"image_size": 32, "features": 4, "device": "cpu", "passes": 1, "batch_size": 2}
FILTERS = "configs/fl_filters.json"


@pytest.fixture(scope="module", params=NAMES, name="name")
def _name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", name="data")
def _data(name: str, tmp_path_factory: pytest.TempPathFactory, make_sites: Callable[[str, Path], Path]) -> Path:
    return make_sites(name, tmp_path_factory.mktemp("data"))


@pytest.fixture(name="bundle")
def _bundle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the bundle, as a federated system gives one to each client; the working folder is elsewhere.

    Without published models: what it is with them is a test of its own.
    """
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return Path(shutil.copytree(BUNDLES / name, tmp_path / name, ignore=shutil.ignore_patterns("models", "eval")))


@pytest.fixture(name="make")
def _make(bundle: Path, data: Path) -> Callable[..., MonaiAlgo]:
    """A client by MONAI's defaults: told where the data are, and its name."""

    def make(settings: dict[str, Any] | None = None, **options: Any) -> MonaiAlgo:
        own = {"dataset_dir": str(data), **TINY, **(settings or {})}
        algo = MonaiAlgo(str(bundle), train_kwargs=dict(own), eval_kwargs=dict(own), **options)
        algo.initialize({ExtraItems.CLIENT_NAME: "A"})
        return algo

    return make


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
