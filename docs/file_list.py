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
"""The list of files in ``architecture.md``, from the first lines of modules; run as a script, it renews the list."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "shared_iopfl"
PAGE = Path(__file__).with_name("architecture.md")
BEGIN, END = "<!-- files: begin -->\n", "<!-- files: end -->\n"


def file_list() -> str:
    """A table of file and content for each folder, in Markdown."""
    lines: list[str] = []
    for folder in sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE):
        lines += ["", f"### `{folder.relative_to(PACKAGE).as_posix()}/`", "", "| file | content |", "|---|---|"]
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
                first = " ".join(said.split("\n\n")[0].split())
                lines.append(f"| `{path.name}` | {first.replace('|', chr(92) + '|').replace('``', '`')} |")
    return "\n".join(lines[1:]) + "\n"


def renewed(page: str) -> str:
    """The page with the list as it is today."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + file_list() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
