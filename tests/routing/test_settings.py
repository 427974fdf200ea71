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
"""Presets, the settings that a bundle adjusts, and those that a user replaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from shared_iopfl.routing.settings import ADJUSTED, PRESETS, preset
from shared_iopfl.utils.errors import InputError

BUNDLES = Path(__file__).parents[2] / "bundles"


@pytest.mark.parametrize("name", PRESETS)
def test_a_bundle_adjusts_only_the_default_and_what_is_built_on_it(name: str):
    adjusted = preset(name, bundle={"statistics": 0.25})
    assert (adjusted.statistics == 0.25) == (name in ADJUSTED)
    assert preset(name, {"statistics": 0.75}, {"statistics": 0.25}).statistics == 0.75


def test_a_misspelt_setting_of_a_bundle_is_refused():
    with pytest.raises(InputError, match="unknown routing setting 'statistic'"):
        preset("default", bundle={"statistic": 0.5})


@pytest.mark.parametrize(("bundle", "share"), [("prostate_iopfl", 0.5), ("fundus_iopfl", "auto")])
def test_one_setting_on_the_command_line_keeps_the_others_of_the_bundle(bundle: str, share: Any):
    """`--routing "{'steps': 2}"` must not switch off the share of a volume's own statistics."""
    for config, inferer in (("inference", "inferer"), ("evaluate", "validate#inferer")):
        parser = ConfigParser()
        parser.read_config(str(BUNDLES / bundle / "configs" / f"{config}.json"))
        parser.update({"routing": {"steps": 2}, "preset": "default"})
        settings = parser.get_parsed_content(f"{inferer}#settings")
        assert (settings.steps, settings.statistics, settings.views) == (2, share, "average")
