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
"""The HTML of the reports: one self-contained file, made from the templates beside this file."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from shared_iopfl.report import pictures
from shared_iopfl.report.documents import Block, Picture

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(title: str, blocks: Sequence[Block]) -> str:
    """A complete HTML file that loads nothing from elsewhere."""
    return _TEMPLATES.get_template("page.html.jinja").render(title=title, blocks=blocks)


def picture(figure: Figure, caption: str = "") -> Picture:
    """A figure for the page, at a width that gives its text the same size as in the other figures."""
    png = base64.b64encode(pictures.png(figure)).decode()
    return Picture(png, round(100 * figure.get_figwidth() / pictures.WIDTH), caption)


def without_path(text: str) -> str:
    """The text up to its first file path: paths can name patients and machines, which a report must not show."""
    path = re.search(r"\S*(?:(?:^|[\s\"'(=\[,:~.])[/\\]\S|\w\w[/\\]\w\w)", text)
    return f"{text[: path.start()]}(path not shown)" if path else text
