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
"""Folders of sites in the public layouts, for the tests: files of one byte each."""

from __future__ import annotations

import json
from pathlib import Path


def touch(root: Path, *names: str, content: bytes = b"x") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def saml(root: Path, site: str, count: int, mask: str = "_segmentation") -> None:
    for number in range(count):
        touch(root, f"{site}/Case{number:02d}.nii.gz", f"{site}/Case{number:02d}{mask}.nii.gz")


def dofe(root: Path, train: int, test: int) -> None:
    for part, count in (("train", train), ("test", test)):
        for number in range(count):
            touch(root, *(f"D/{part}/ROIs/{kind}/{part[:2]}{number:02d}.png" for kind in ("image", "mask")))


def datalist(root: Path, **lists: list) -> None:
    (root / "L.json").write_text(json.dumps(lists))


def names(cases: list[dict[str, str]]) -> list[str]:
    return [case["case"] for case in cases]
