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
"""Elements of a document, which become HTML and, except for pictures and the like, also Markdown.

`shared_iopfl.report.pages.page` turns them into HTML with the macros of ``templates/blocks.html.jinja``. The page is
not made of their Markdown, by the package `markdown`, because pictures, notes and coloured headings are on the page
alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# characters with a meaning in Markdown or GitHub's formulas; no others, as the file is also read as plain text
_SPECIAL = re.compile(r"([\\`*<>|$~]|(?<!\w)_|_(?!\w)|\](?=\())")


def _plain(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 or below; on the page, `note` follows it in small letters."""

    text: str
    level: int = 2
    note: str = ""

    def markdown(self) -> str:
        """The element as Markdown."""
        return f"{'#' * self.level} {_plain(self.text)}"


@dataclass(frozen=True)
class Text:
    """A paragraph; on the page its CSS class is `kind`, such as "caption"."""

    text: str
    kind: str = ""
    bold: bool = False

    def markdown(self) -> str:
        """The element as Markdown."""
        return _plain(self.text)


@dataclass(frozen=True)
class Bullets:
    """A list of ``(what, text)``; `what` is in bold."""

    points: Sequence[tuple[str, str]]

    def markdown(self) -> str:
        """The element as Markdown."""
        return "\n".join(f"- **{_plain(what)}**: {_plain(text)}" for what, text in self.points)


# a value, or a value with a text in small letters such as its interval; the two are never split over lines
Cell = str | tuple[str, str]


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: Heading of the row.
        cells: Contents of the cells.
        bold: Indices of the cells in bold.
        italic: Whether the name and the cells are in italics.
        marked: Whether the name is in bold and, on the page, the row is highlighted.
        mean: Whether the row summarises the rows above it.
        note: Text in small letters behind the name, only on the page.
        shades: How dark each cell is, from 0 to 1, only on the page.
    """

    name: str
    cells: Sequence[Cell]
    bold: frozenset[int] = field(default_factory=frozenset)
    italic: bool = False
    marked: bool = False
    mean: bool = False
    note: str = ""
    shades: Sequence[float] = ()


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        heads: Headings of the columns.
        rows: Rows, see `Row`.
        text: Whether the cells hold text rather than numbers.
        dots: Colours of dots in front of headings, only on the page.
    """

    heads: Sequence[str]
    rows: Sequence[Row]
    text: bool = False
    dots: Mapping[str, str] = field(default_factory=dict)

    def markdown(self) -> str:
        """The element as Markdown."""
        lines = [[_plain(head) for head in self.heads], ["---"] + ["---:"] * (len(self.heads) - 1)]
        for row in self.rows:
            mark = "*" if row.italic else "**" if row.marked else ""
            cells = [_plain(cell if isinstance(cell, str) else " ".join(cell).strip()) for cell in row.cells]
            slant = "*" if row.italic else ""
            cells = [f"**{c}**" if i in row.bold else f"{slant}{c}{slant}" if c else "" for i, c in enumerate(cells)]
            lines.append([f"{mark}{_plain(row.name)}{mark}", *cells])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True)
class Picture:
    """A PNG, in base64, with its width in percent of the page. Not part of the Markdown."""

    png: str
    width: int
    caption: str = ""


@dataclass(frozen=True)
class Settings:
    """Pairs of name and value. Not part of the Markdown."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Card:
    """A name, the reason why it was flagged if there is one, lines in small letters, and a thumbnail with its link."""

    name: str
    noticed: str
    lines: Sequence[str]
    thumbnail: str
    link: str


@dataclass(frozen=True)
class Cards:
    """Cards side by side. Not part of the Markdown."""

    cards: Sequence[Card]


@dataclass(frozen=True)
class OnPage:
    """Blocks that are shown on the page but not in the Markdown."""

    blocks: Sequence[Block]


Block = Heading | Text | Bullets | Table | Picture | Settings | Cards | OnPage


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """A whole Markdown file."""
    written = [block.markdown() for block in blocks if isinstance(block, Heading | Text | Bullets | Table)]
    return "\n\n".join([f"# {_plain(title)}", *written]) + "\n"
