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
"""The README's picture: made of what two runs leave behind, and small enough to be loaded at once."""

from __future__ import annotations

import runpy
from pathlib import Path

from PIL import Image
from runs import make_run

DOCS = Path(__file__).parents[1] / "docs"
MOST_BYTES = 300_000


def test_picture_of_two_runs(tmp_path: Path) -> None:
    for task in ("prostate", "fundus"):
        make_run(tmp_path / task)
    script = runpy.run_path(str(DOCS / "routed_picture.py"))
    script["main"](str(tmp_path), str(tmp_path / "routed.png"))
    with Image.open(tmp_path / "routed.png") as made, Image.open(DOCS / "routed.png") as kept:
        assert made.size[0] == kept.size[0] > 800
    assert (DOCS / "routed.png").stat().st_size < MOST_BYTES
