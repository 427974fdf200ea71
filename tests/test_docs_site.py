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
"""The README stays short, links resolve, the reference of the configs is complete, and the site builds."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MOST_LINES = 150
NEEDED = ("mkdocs", "material", "mkdocstrings_handlers")
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
MADE = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}  # pages made from files at the top
CONFIGS = sorted(path for path in ROOT.glob("bundles/*/configs/*.json") if path.stem != "metadata")


def prose(text: str) -> str:
    """The text without fenced blocks and code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def slug(heading: str) -> str:
    """The anchor that a heading gets, on the site as on GitHub."""
    words = re.sub(r"[^\w\s-]", "", heading.strip().lower())
    return re.sub(r"\s+", "-", words)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_relative_links_resolve(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | MADE.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_every_config_key_is_in_the_reference(path: Path) -> None:
    """A new setting needs a line in docs/config_reference.py."""
    reference = runpy.run_path(str(DOCS / "config_reference.py"))
    page = reference["page"]()
    section = page[page.index(f"## {path.name}\n") :].split("\n## ")[0]
    for key, value in json.loads(path.read_text(encoding="utf-8")).items():
        assert f"| `{key}` |" in section, key
        if not isinstance(value, (dict, list)) and "#" not in key and "@" not in str(value):
            assert key in reference["SETTINGS"], f"say in docs/config_reference.py what {key} means"


def test_the_reference_is_that_of_the_configs() -> None:
    """``python docs/config_reference.py`` renews it."""
    page = (DOCS / "reference" / "config.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(DOCS / "config_reference.py"))["renewed"](page) == page


def test_the_api_reference_has_every_public_module() -> None:
    page = runpy.run_path(str(DOCS / "api_reference.py"))["page"]()
    for path in (ROOT / "shared_iopfl").rglob("*.py"):
        if not path.stem.startswith("_"):
            assert f"::: {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}\n" in page


def test_the_citation_names_paper_and_authors() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert all(f"family-names: {name}" in text for name in ("Jiang", "Yang", "Cheng", "Dou"))
    assert "2204.08467" in text
    assert "IOP-FL for MONAI contributors" in text


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "RoutingSettings" in (tmp_path / "site" / "reference" / "api.html").read_text(encoding="utf-8")
    assert "image_size" in (tmp_path / "site" / "reference" / "config.html").read_text(encoding="utf-8")
