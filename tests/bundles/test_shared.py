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
"""What the two bundles must share is the same in both: the method lives in shared_iopfl, the task in JSON."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

ROOT = Path(__file__).parents[2]
CONFIGS = ("train", "federate", "evaluate", "inference", "personalise", "multi_gpu_train")
# what a task may have that the other has not: slices of a volume; how masks are coded and smoothed, photographs cropped
OWN_KEYS = {"field_of_view", "slices", "slices_per_case", "coding", "codings", "crop", "grey", "smooth_outlines"}
# what may differ: network channels, loss, transforms, sizes of batches, output and views of the inferer, the second
# look, and whether the scans of a folder are routed together
TASK_KEYS = {"imports", "site", "passes", "batch_size", "network_def", "loss", "preprocessing_transforms", *OWN_KEYS}
TASK_KEYS |= {"preprocessing", "postprocessing", "inferer", "handlers", "site_config", "scoring_config"}
TASK_KEYS |= {
    "norm_statistics",
    "sampling_transforms",
    "augmentation_transforms",
    "key_metric",
    "bundle_routing",
    "mode",
    "second_look",
}


def read(task: str, config: str) -> dict:
    return json.loads((ROOT / "bundles" / f"{task}_iopfl" / "configs" / f"{config}.json").read_text(encoding="utf-8"))


def same(one: dict, other: dict, where: str) -> None:
    for key in (set(one) | set(other)) - TASK_KEYS:
        assert key in one and key in other, f"{where}: only one bundle has '{key}'"
        if isinstance(one[key], dict) and isinstance(other[key], dict):
            same(one[key], other[key], f"{where}#{key}")
        else:
            # one task has pictures as scans, beside those of the other they are previews
            found = json.dumps(other[key]).replace("pictures=True", "pictures=False")
            assert one[key] == json.loads(found), f"{where}#{key}"


@pytest.mark.parametrize("config", CONFIGS)
def test_bundles_differ_in_their_task_only(config: str) -> None:
    """Keys, hyper-parameters, federation, routing, scoring and engines are the same in both bundles."""
    same(read("prostate", config), read("fundus", config), config)


@pytest.mark.parametrize("config", CONFIGS)
def test_keys_stand_in_the_same_order(config: str) -> None:
    """A reader of one bundle finds everything at the same place in the other."""
    one, other = ([key for key in read(task, config) if key not in OWN_KEYS] for task in ("prostate", "fundus"))
    assert one == other


@pytest.mark.parametrize("config", ["inference", "evaluate"])
def test_handlers_differ_in_measures_only(config: str) -> None:
    """Both bundles load, fit, record and write by the same handlers in the same order; one adds its measures."""
    kinds = []
    for task in ("prostate", "fundus"):
        content = read(task, config)
        handlers = content["handlers"] if config == "inference" else content["validate"]["handlers"]
        kinds.append(
            [handler["_target_"] for handler in handlers if not handler["_target_"].endswith("MeasureRecorder")]
        )
    assert kinds[0] == kinds[1]


def test_no_python_asks_which_task_it_serves() -> None:
    """No module but the phantoms compares anything with a task's name or imports from a bundle."""
    for path in (ROOT / "shared_iopfl").rglob("*.py"):
        if path.parent.name == "phantoms" or path.name == "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                strings = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
                named = [text for text in strings if "prostate" in text.lower() or "fundus" in text.lower()]
                assert not named, f"{path.name}:{node.lineno} asks for a task: {named}"


@pytest.mark.parametrize("config", ["train", "evaluate", "inference"])
@pytest.mark.parametrize("bundle", ["prostate_iopfl", "fundus_iopfl"])
def test_a_scan_of_a_fine_grid_is_smoothed_before_it_is_shrunk(bundle: str, config: str) -> None:
    """Otherwise noise of a fine grid goes into the network as it is: interpolation alone leaves half of it here."""
    parser = ConfigParser()
    parser.read_config(str(ROOT / "bundles" / bundle / "configs" / f"{config}.json"))
    parser["image_size"] = 32
    groups = [parser.get(key) for key in ("preprocessing_transforms", "preprocessing", "validate") if key in parser]
    transforms = [item for group in groups for item in _transforms(group)]
    resize = next(item for item in transforms if item.get("_target_", "").endswith("ResizedByParts"))
    parser["resize"] = {**resize, "allow_missing_keys": True}
    noise = torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(0))
    noise = noise if bundle == "fundus_iopfl" else noise[:1, ..., None].expand(-1, -1, -1, 4).clone()
    shrunk = parser.get_parsed_content("resize")({"image": noise})["image"]
    assert shrunk.shape[1:3] == (32, 32)
    assert float(shrunk.std()) < 0.3


def _transforms(group: Any) -> list[dict[str, Any]]:
    """All transforms of a part of a config, however deep they stand."""
    if isinstance(group, dict):
        inner = [item for value in group.values() for item in _transforms(value)]
        return ([group] if "_target_" in group else []) + inner
    return [item for value in group for item in _transforms(value)] if isinstance(group, list) else []
