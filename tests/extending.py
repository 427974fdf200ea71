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
"""A page of ``docs/extending`` followed to the letter: its files are written and its commands are run, in this order.

A block after a line that ends in ``Write `FILE`:`` is the content of that file. Two blocks after lines that end in ``In
`FILE`, find:`` and ``In `FILE`, replace it by:`` change a file. A block of bash is run. Other blocks have no language.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

from typed import typed

ROOT = Path(__file__).parents[1]
# what makes the commands of a page quick
TINY = {"image_size": "32", "features": "4"}
SMALLER = {
    "train.json": {**TINY, "epochs": "1", "passes": "1"},
    "federate.json": {**TINY, "rounds": "1", "own_rounds": "1", "shares": "[]", "passes": "1"},
    "compare.json": {**TINY, "rounds": "1", "own_rounds": "1", "fine_tuning": "1", "passes": "1", "folds": "1"},
    "inference.json": {"empty_masks": "allow"},
    "evaluate.json": TINY,
    "job.py": {**TINY, "rounds": "1"},
}
PLACES = re.compile(r"(?<![\w/.-])(DIR|OUT|MASKS)(?=[\s/_]|$)")
STEP = re.compile(r"^([^\n]*)\n\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def follow(page: str, folder: Path) -> str:
    """Do what a page says, in a copy of the bundles; return what the commands print."""
    shutil.copytree(ROOT / "bundles", folder / "bundles", ignore=shutil.ignore_patterns("eval", "__pycache__"))
    printed, anchor = "", ""
    for said, language, block in STEP.findall((ROOT / "docs" / "extending" / page).read_text(encoding="utf-8")):
        if written := re.search(r"Write `([^`]+)`:$", said):
            (folder / written[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / written[1]).write_text(block, encoding="utf-8")
        elif found := re.search(r"In `([^`]+)`, find:$", said):
            anchor = block
            assert (folder / found[1]).read_text(encoding="utf-8").count(anchor) == 1, f"{found[1]}: {anchor}"
        elif changed := re.search(r"In `([^`]+)`, replace it by:$", said):
            text = (folder / changed[1]).read_text(encoding="utf-8")
            (folder / changed[1]).write_text(text.replace(anchor, block), encoding="utf-8")
        elif language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                printed += run(line, folder)
        else:
            raise AssertionError(f"{page} does not say what to do with a block: {said}")
    return printed


def run(line: str, folder: Path) -> str:
    """Run one command of a page, on a tiny network."""
    words = shlex.split(PLACES.sub(lambda found: str(folder / found[1]), line))
    for config, settings in SMALLER.items():
        if any(config in word for word in words):
            words += [word for name, value in settings.items() for word in (f"--{name}", value)]
    assert words[0] == "python"
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(folder)}
    process = typed(*words[1:], cwd=folder, environment=environment)
    assert process.returncode == 0, f"{shlex.join(words)}\n{process.stdout[-800:]}{process.stderr[-1500:]}"
    return process.stdout + process.stderr
