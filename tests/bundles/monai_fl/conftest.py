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
"""Both bundles as clients of MONAI's federated learning: copies of them, their sites' data, and clients."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fl_bundles import BUNDLES, TINY
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems


@pytest.fixture
def bundle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the bundle, as a federated system gives one to each client; the working folder is elsewhere.

    Without published models: what it is with them is a test of its own.
    """
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return Path(shutil.copytree(BUNDLES / name, tmp_path / name, ignore=shutil.ignore_patterns("models", "eval")))


@pytest.fixture
def make(bundle: Path, data: Path) -> Callable[..., MonaiAlgo]:
    """A client by MONAI's defaults: told where the data are, and its name."""

    def make(settings: dict[str, Any] | None = None, **options: Any) -> MonaiAlgo:
        own = {"dataset_dir": str(data), **TINY, **(settings or {})}
        algo = MonaiAlgo(str(bundle), train_kwargs=dict(own), eval_kwargs=dict(own), **options)
        algo.initialize({ExtraItems.CLIENT_NAME: "A"})
        return algo

    return make
