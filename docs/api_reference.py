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
"""The API reference: one block for each public module of the package, under the folder that holds it.

    python docs/api_reference.py

prints the page's Markdown, in which mkdocstrings fills in the docstrings. The package is walked and never imported, so
that no path is written down twice.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "shared_iopfl"


def modules() -> Iterator[tuple[str, list[str]]]:
    """Each folder of the package, as a dotted name, with its modules; folders are sorted, the top one comes first."""
    folders = sorted({path.parent for path in PACKAGE.rglob("*.py")})
    for folder in folders:
        package = ".".join(folder.relative_to(PACKAGE.parent).parts)
        files = sorted(path for path in folder.glob("*.py") if not path.stem.startswith("_"))
        yield package, [f"{package}.{path.stem}" for path in files]


def summary(package: str) -> str:
    """The docstring of a folder's ``__init__.py``: what is in it and what it may know."""
    path = PACKAGE.parent.joinpath(*package.split("."), "__init__.py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.is_file() else None) or ""


def page() -> str:
    """The page's Markdown."""
    lines: list[str] = []
    for package, names in modules():
        lines += [f"## `{package}`", "", summary(package), ""]
        for name in names:
            lines += [f"### `{name.rpartition('.')[2]}` {{ #module-{name.replace('.', '-')} }}", "", f"::: {name}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
