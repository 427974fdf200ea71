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
"""The folders of the package: small, and with imports that run down only."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from docs import file_list

PACKAGE = Path(__file__).parents[1] / "shared_iopfl"
# a folder imports from itself and from the folders before it
ORDER = (
    *("utils", "data", "models", "routing", "inferers"),
    *("evaluation", "report", "handlers", "federation", "comparison", "commands"),
)
FOLDERS = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" and path.parent != PACKAGE)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of the package that are imported anywhere in a file or a part of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shared_iopfl."):
            is_folder = (PACKAGE.parent / (node.module or "").replace(".", "/")).is_dir()
            yield from (f"{node.module}.{alias.name}" if is_folder else str(node.module) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("shared_iopfl."))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_every_folder_has_its_place() -> None:
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == set(ORDER)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(PACKAGE).as_posix())
def test_a_folder_is_small_and_says_what_is_in_it(folder: Path) -> None:
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 8
    said = ast.get_docstring(parsed(folder / "__init__.py"))
    assert said is not None and len(said.splitlines()) >= 3


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_down_only(path: Path) -> None:
    place = ORDER.index(path.relative_to(PACKAGE).parts[0])
    above = [module for module in imported(parsed(path)) if ORDER.index(module.split(".")[1]) > place]
    assert not above, f"{name_of(path)} imports {', '.join(above)}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {}
    for path in MODULES:
        graph[name_of(path)] = set(imported(parsed(path))) - {name_of(path)}
    list(TopologicalSorter(graph).static_order())


def test_only_the_flare_folder_imports_nvflare() -> None:
    for path in MODULES:
        nodes = list(ast.walk(parsed(path)))
        names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        if path.parent.name != "flare":
            assert not any(name.split(".")[0] == "nvflare" for name in names), path


def test_the_architecture_page_lists_every_file() -> None:
    """``python docs/file_list.py`` renews it."""
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert file_list.renewed(page) == page


@pytest.mark.parametrize(
    "name",
    ["inferers.TestTimeRoutingInferer", "routing.route", "routing.collapse", "handlers.PersonalizationHandler"],
)
def test_public_names_are_imported_from_their_folder(name: str) -> None:
    folder, attribute = name.split(".")
    assert hasattr(importlib.import_module(f"shared_iopfl.{folder}"), attribute)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_what_is_public_has_a_docstring(path: Path) -> None:
    def lacking(node: ast.Module | ast.ClassDef) -> Iterator[str]:
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
                if ast.get_docstring(child) is None:
                    yield f"{child.name}, line {child.lineno}"
                if isinstance(child, ast.ClassDef):
                    yield from lacking(child)

    assert not list(lacking(parsed(path)))
