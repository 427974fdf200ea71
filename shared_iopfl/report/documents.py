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
"""Elements of a document: what a page shows, and which of it is written as Markdown too.

`shared_iopfl.report.pages.page` makes HTML of them, by the macros of ``templates/blocks.html.jinja``. It
is not made of their Markdown, by the package `markdown`: pictures, notes and coloured heads are on the page alone.
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
    """A heading, of level 2 or below; the page has `note` in small letters behind it."""

    text: str
    level: int = 2
    note: str = ""

    def markdown(self) -> str:
        """The element as Markdown."""
        return f"{'#' * self.level} {_plain(self.text)}"


@dataclass(frozen=True)
class Text:
    """A paragraph; on the page of the kind `kind`, such as "caption"."""

    text: str
    kind: str = ""
    bold: bool = False

    def markdown(self) -> str:
        """The element as Markdown."""
        return _plain(self.text)


@dataclass(frozen=True)
class Bullets:
    """A list of ``(what, text)``: what each item is about stands out."""

    points: Sequence[tuple[str, str]]

    def markdown(self) -> str:
        """The element as Markdown."""
        return "\n".join(f"- **{_plain(what)}**: {_plain(text)}" for what, text in self.points)


# a figure, or a figure with a text in small letters, such as its interval; the two are never split over lines
Cell = str | tuple[str, str]


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: its heading.
        cells: what stands in it.
        bold: which cells stand out.
        italic: whether its name and its cells are set apart.
        marked: whether its name stands out, and on the page the whole row.
        mean: whether it sums up the rows above it.
        note: on the page, in small letters behind its name.
        shades: on the page, how dark each cell is, from 0 to 1.
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
        heads: headings of the columns.
        rows: see `Row`.
        text: whether the cells hold text and not figures.
        dots: on the page, headings with a dot of a colour before them.
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
    """A PNG, in base64, of so many percent of the page's width. Only the page has it."""

    png: str
    width: int
    caption: str = ""


@dataclass(frozen=True)
class Settings:
    """Pairs of name and value. Only the page has them."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Card:
    """A name, what was noticed of it if anything, lines in small letters, and a picture that leads to a larger one."""

    name: str
    noticed: str
    lines: Sequence[str]
    thumbnail: str
    link: str


@dataclass(frozen=True)
class Cards:
    """Cards side by side. Only the page has them."""

    cards: Sequence[Card]


@dataclass(frozen=True)
class OnPage:
    """Blocks that only the page has."""

    blocks: Sequence[Block]


Block = Heading | Text | Bullets | Table | Picture | Settings | Cards | OnPage


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """A whole Markdown file."""
    written = [block.markdown() for block in blocks if isinstance(block, Heading | Text | Bullets | Table)]
    return "\n\n".join([f"# {_plain(title)}", *written]) + "\n"
