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
"""The configs of a bundle are generated from the common configs and the bundle's task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typed import typed

from shared_iopfl.models.bundle_configs import as_text, generate_configs, write_configs
from shared_iopfl.utils.errors import InputError

BUNDLES = Path(__file__).parents[2] / "bundles"


def common_of(folder: Path, config: Any, base: dict[str, Any] | None = None) -> Path:
    """A folder of common configs with one config and one base."""
    (folder / "tasks").mkdir(parents=True)
    (folder / "train.json").write_text(json.dumps(config))
    (folder / "tasks" / "pictures.json").write_text(json.dumps(base or {}))
    return folder


def generated(folder: Path, config: Any, task: dict[str, Any], base: dict[str, Any] | None = None) -> Any:
    """What becomes of one common config with a task."""
    common = common_of(folder / "common", config, base)
    (folder / "task.json").write_text(json.dumps({"base": "pictures", **task}))
    return json.loads(generate_configs(folder / "task.json", common)["train.json"])


@pytest.mark.parametrize("bundle", ["prostate_iopfl", "fundus_iopfl"])
def test_the_checked_in_configs_are_generated(bundle: str, tmp_path: Path) -> None:
    """``python -m shared_iopfl configs bundles/NAME`` renews them."""
    written = write_configs(str(BUNDLES / bundle), str(tmp_path))
    checked_in = BUNDLES / bundle / "configs"
    assert {Path(path).name for path in written} == {path.name for path in checked_in.iterdir()}
    for path in map(Path, written):
        text = (checked_in / path.name).read_text(encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text, f"{bundle}/configs/{path.name} is not as generated"


def test_the_command_writes_beside_the_task(tmp_path: Path) -> None:
    common_of(tmp_path / "common", {"a": "%task#a"})
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "task.json").write_text('{"base": "pictures", "a": 1}')
    assert typed("-m", "shared_iopfl", "configs", tmp_path / "own").returncode == 0
    assert json.loads((tmp_path / "own" / "configs" / "train.json").read_text()) == {"a": 1}


def test_macros(tmp_path: Path) -> None:
    """A macro is replaced by a value, in a list by items, in text by text, and `**` by keys, wherever they stand."""
    config = {
        "network": "%task#network",
        "transforms": ["first", "%task#transforms", "last"],
        "size": ["%task#number", ["%task#pair"]],
        "site": "$own('%task#site', %task#flag)",
        "%task#output": True,
        "**": "%task#settings",
        "metric": "%validate#metric",
        "end": {"**": "%task#none"},
    }
    task = {
        "network": {"in": "%task#number"},
        "number": 3,
        "transforms": [{"n": 1}, {"n": "%task#number"}],
        "pair": [1, 2],
        "site": "A",
        "flag": False,
        "output": "softmax",
        "settings": {"slices": 3, "crop": "auto"},
        "none": {},
    }
    config = generated(tmp_path, config, task)
    assert config == {
        "network": {"in": 3},
        "transforms": ["first", {"n": 1}, {"n": 3}, "last"],
        "size": [3, [1, 2]],
        "site": "$own('A', False)",
        "softmax": True,
        "slices": 3,
        "crop": "auto",
        "metric": "%validate#metric",  # MONAI's own macros stay
        "end": {},
    }
    assert list(config)[3:7] == ["site", "softmax", "slices", "crop"]  # in their place


def test_a_task_changes_its_base_as_monai_merges_configs(tmp_path: Path) -> None:
    base = {"train": {"spatial": ["a"], "settings": {"x": 1}}, "size": 2}
    task = {"train#spatial": ["b"], "+train#settings": {"y": 2}}
    config = {"spatial": "%task#train#spatial", "settings": "%task#train#settings", "size": "%task#size"}
    assert generated(tmp_path, config, task, base) == {"spatial": ["b"], "settings": {"x": 1, "y": 2}, "size": 2}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ('{"base": "pictures"}', "lacks a#b, which .*train.json needs: add it"),
        ('{"base": "videos"}', "has the base 'videos': set its key 'base' to one of pictures"),
        ("{", "cannot be read as a task"),
        ("[]", "must be a JSON object"),
    ],
)
def test_a_faulty_task_is_refused_by_one_line(task: str, message: str, tmp_path: Path) -> None:
    common = common_of(tmp_path / "common", {"a": "%task#a#b"})
    (tmp_path / "task.json").write_text(task)
    with pytest.raises(InputError, match=message) as raised:
        write_configs(str(tmp_path), common_dir=str(common))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "configs").exists()


def test_short_lists_stand_in_one_line() -> None:
    config = {"short": [1, "ä"], "long": ["x" * 60, "y" * 60], "nested": [{"a": []}], "none": {}}
    text = as_text(config)
    assert json.loads(text) == config
    assert text.splitlines()[1:4] == ['    "short": [1, "ä"],', '    "long": [', f'        "{60 * "x"}",']
