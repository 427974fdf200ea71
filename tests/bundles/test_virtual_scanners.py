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
"""A virtual scanner changes the image alone: its size, type and file stay, and it is the same at every call."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from config_start import BUNDLES
from monai.bundle import ConfigParser
from monai.data import MetaTensor

SHAPES = {"fundus_iopfl": (3, 40, 44), "prostate_iopfl": (1, 40, 44, 6)}


def scanners(bundle: str) -> dict[str, Any]:
    content = json.loads((BUNDLES / bundle / "configs" / "virtual.json").read_text(encoding="utf-8"))
    return dict(content["virtual"])


@pytest.mark.parametrize("bundle, name", [(bundle, name) for bundle in SHAPES for name in scanners(bundle)])
def test_virtual_scanner_changes_the_image_and_nothing_else(bundle: str, name: str) -> None:
    config = {"imports": ["$import monai", "$import torch"], "scanner": scanners(bundle)[name]}
    shape = SHAPES[bundle]
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 200
    seen = []
    for _ in range(2):
        scanner = ConfigParser(config).get_parsed_content("scanner")
        seen.append(scanner({"image": MetaTensor(image.clone(), meta={"filename_or_obj": "a.png"})})["image"])
    changed, again = seen
    assert changed.meta["filename_or_obj"] == "a.png", "the recorders name the case by it"
    assert tuple(changed.shape) == shape and torch.isfinite(changed).all()
    assert not torch.equal(changed.as_tensor(), image) and torch.equal(changed.as_tensor(), again.as_tensor())
