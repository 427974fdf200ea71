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
"""What the tests of the fundus bundle are served: sites of disc crops in two codings, and whole photographs."""

from __future__ import annotations

from pathlib import Path

import pytest
from fundus_runs import as_dofe

from shared_iopfl.data.phantoms.sites import make_fundus_sites


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Disc crops: A, B and E coded 0, 1, 2; Domain1 and Domain2, the same eyes, as the public set codes them."""
    folder = tmp_path_factory.mktemp("sites")
    make_fundus_sites(folder, sites=("A", "B", "E"), cases=5, size=96)
    as_dofe(folder / "A", folder / "Domain1")
    as_dofe(folder / "B", folder / "Domain2")
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site of whole photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    make_fundus_sites(folder, sites=("E",), cases=3, size=192, photographs=True)
    return folder / "E"
