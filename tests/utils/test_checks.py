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
"""A value that a hyper-parameter may not have is one line that names key, range and value, in every config."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from config_start import BUNDLES, start

import shared_iopfl.utils.config_values as config_values
from shared_iopfl.commands.tools import prepare
from shared_iopfl.utils.checks import RULES, check_values
from shared_iopfl.utils.errors import InputError, root_input_error

WRONG: dict[str, tuple[Any, ...]] = {
    "batch_size": (0, -1, 1.5, "4", True, None),
    "alpha": (2, 1, -0.1, float("nan"), "half"),
    "learning_rate": (float("nan"), float("inf"), -1, 0, 10**400),
    "seed": (-1, 0.5, 2**63, "x"),
    "own_rounds": (-1, 1.5),
    "passes": (0, -2),
    "slices_per_case": (0,),
    "rounds": (0, -1, True),
    "tail": (2, -1, float("nan")),
    "val_interval": (-1, 0.5),
    "num_workers": (-1, 1e9),
    "split_seed": ("zero", -1, None),
    "normalise": ("yes", "False", 2, None),
    "soft_labels": ("area", None),
    "bf16": ("true", "no"),
    "recompute": ("true", 2, None),
    "role": ("inner", "", None),
    "sites": ([], "", [""], 0.0 == 1),
    "device": ("cuda:99", "banana", "meta", 1.5),
    "image_size": (9999, 0, 64.0, "64"),
    "features": (0, [1, 2], [8, 8, 8, 8, 8, 0], 10**6),
    "fractions": ([1], [0, 0.5, 0.5], [0.5, 0.6, 0.1], [1, float("nan"), 0]),
    "averaging": ("krum", None),
    "max_update_norm": (-1, float("inf"), float("nan")),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named_with_its_range(name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(InputError, match=f"^{name} must be {re.escape(RULES[name].allowed)}, but is ") as error:
            check_values({name: value})
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400


CONFIGS = [
    pytest.param(path.parents[1], path.stem, id=f"{path.parents[1].name}-{path.stem}")
    for path in sorted(BUNDLES.glob("*_iopfl/configs/*.json"))
    if path.stem in ("train", "evaluate", "inference", "federate", "compare", "personalise")
]


@pytest.fixture(autouse=True)
def hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle's first step, `one_line_errors`, sets the process's."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.mark.parametrize("bundle, config", CONFIGS)
def test_every_config_checks_every_hyper_parameter_that_it_has(
    bundle: Path, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: set[str] = set()
    monkeypatch.setattr(config_values, "check_values", lambda settings: seen.update(settings))
    sites = {"sites": ["A", "B"]} if config in ("federate", "compare") else {"dataset_dir": str(tmp_path / "none")}
    given: dict[str, Any] = {**sites, **({"site": "A"} if config == "personalise" else {})}
    start(config, bundle=bundle, **given)
    keys = json.loads((bundle / "configs" / f"{config}.json").read_text()).keys()
    assert seen == keys & RULES.keys()


def test_prepare_checks_its_seed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^split_seed must be"):
        prepare(str(tmp_path), split_seed=-1)


@pytest.mark.parametrize("config", ["inference", "evaluate", "train"])
@pytest.mark.parametrize("bundle", ["prostate_iopfl", "fundus_iopfl"])
def test_a_manifest_s_values_are_checked_as_settings_are(bundle: str, config: str, tmp_path: Path) -> None:
    manifest = json.loads((BUNDLES / bundle / "models" / "manifest.json").read_text())
    manifest["architecture"]["image_size"] = 9999
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    given = {} if config == "inference" else {"site": "A"}
    with pytest.raises((InputError, RuntimeError)) as raised:
        start(config, bundle=BUNDLES / bundle, ckpt_dir=str(tmp_path), dataset_dir=str(tmp_path), **given)
    assert "manifest.json has image_size 9999" in str(root_input_error(raised.value))
