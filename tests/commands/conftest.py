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
"""Models of random weights for the commands, as the bundles' tests have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bundles.conftest import process_as_it_was, random_models


@pytest.fixture(autouse=True)
def _process_as_it_was():
    with process_as_it_was():
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the prostate bundle."""
    return random_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def fundus_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_models(tmp_path_factory.mktemp("models"), "fundus_iopfl")
