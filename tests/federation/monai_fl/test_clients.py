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
"""A federated client finds its site by name or by its folder, and never reads another site."""

from __future__ import annotations

from pathlib import Path

import pytest
from site_folders import saml

from shared_iopfl.federation.monai_fl.bundle_client import own_site
from shared_iopfl.utils.errors import InputError

STARTED = "20260101_120000"


@pytest.fixture
def sites(tmp_path: Path) -> Path:
    for name in ("ISBI", "ISBI_1.5", "HK"):
        saml(tmp_path, name, 1)
    return tmp_path


@pytest.mark.parametrize("name", ["ISBI", "ISBI_1.5", "HK"])
def test_client_is_the_site_of_its_name(sites: Path, name: str) -> None:
    """The whole name is compared, because the name of a site may begin with that of another."""
    assert own_site(sites, f"{name}_{STARTED}", "UCL") == name


def test_client_with_one_site_in_its_folder_is_that_site(tmp_path: Path) -> None:
    saml(tmp_path, "HK", 1)
    assert own_site(tmp_path, f"site-1_{STARTED}", "UCL") == "HK"
    assert own_site(tmp_path, None, "UCL") == "HK"


def test_client_that_is_none_of_several_sites_is_refused(sites: Path) -> None:
    """It would train on the scans of another site; the message names the sites."""
    with pytest.raises(InputError, match=r"'site-1'.*HK, ISBI, ISBI_1\.5"):
        own_site(sites, f"site-1_{STARTED}", "HK")


@pytest.mark.parametrize("run_name", [None, "", "my experiment", "HK"])
def test_outside_a_federation_the_default_site_is_used(sites: Path, run_name: str | None) -> None:
    assert own_site(sites, run_name, "ISBI") == "ISBI"


def test_without_data_the_default_site_is_used(tmp_path: Path) -> None:
    """Tools with their own data resolve the config before any data exist."""
    assert own_site(tmp_path / "nowhere", None, "UCL") == "UCL"
    assert own_site(tmp_path, f"HK_{STARTED}", "UCL") == "UCL"
