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
"""Elements of a document that is written both as Markdown and as a part of the HTML report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from shared_iopfl.report import pages

__all__ = ["Block", "Bullets", "Heading", "Row", "Table", "Text", "markdown", "to_html"]

# what Markdown, and GitHub's formulas, would take for theirs; no more, for the file is read as plain text too
_SPECIAL = re.compile(r"([\\`*<>|$~]|(?<!\w)_|_(?!\w)|\](?=\())")


def _plain(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)


@dataclass(frozen=True)
class Heading:
    """A heading, of level 2 or below."""

    text: str
    level: int = 2

    def markdown(self) -> str:
        """The element as Markdown."""
        return f"{'#' * self.level} {_plain(self.text)}"

    def html(self) -> str:
        """The element as HTML."""
        return f"<h{self.level}>{escape(self.text)}</h{self.level}>"


@dataclass(frozen=True)
class Text:
    """A paragraph; on the page of the kind `kind`, such as "caption"."""

    text: str
    kind: str = ""

    def markdown(self) -> str:
        """The element as Markdown."""
        return _plain(self.text)

    def html(self) -> str:
        """The element as HTML."""
        return f"<p{self.kind and f' class={self.kind}'}>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Bullets:
    """A list of ``(what, text)``: what each item is about stands out."""

    items: Sequence[tuple[str, str]]

    def markdown(self) -> str:
        """The element as Markdown."""
        return "\n".join(f"- **{_plain(what)}**: {_plain(text)}" for what, text in self.items)

    def html(self) -> str:
        """The element as HTML."""
        items = "".join(f"<li><b>{escape(what)}</b>: {escape(text)}</li>" for what, text in self.items)
        return f"<ul>{items}</ul>"


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: its heading.
        cells: what stands in it.
        bold: which cells stand out.
        italic: whether its name and its cells are set apart.
        marked: whether its name stands out, and on the page the whole row.
    """

    name: str
    cells: Sequence[str]
    bold: frozenset[int] = field(default_factory=frozenset)
    italic: bool = False
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows."""

    heads: Sequence[str]
    rows: Sequence[Row]

    def markdown(self) -> str:
        """The element as Markdown."""
        lines = [[_plain(head) for head in self.heads], ["---"] + ["---:"] * (len(self.heads) - 1)]
        for row in self.rows:
            mark = "*" if row.italic else "**" if row.marked else ""
            cells = [_plain(cell) for cell in row.cells]
            slant = "*" if row.italic else ""
            cells = [f"**{c}**" if i in row.bold else f"{slant}{c}{slant}" if c else "" for i, c in enumerate(cells)]
            lines.append([f"{mark}{_plain(row.name)}{mark}", *cells])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        """The element as HTML."""
        heads = "".join(f"<th>{pages.breakable(head)}</th>" for head in self.heads)
        lines = [f"<tr>{heads}</tr>"]
        for row in self.rows:
            start, end = ("<em>", "</em>") if row.italic else ("<b>", "</b>") if row.marked else ("", "")
            line = f"<th>{start}{escape(row.name)}{end}</th>"
            for index, cell in enumerate(row.cells):
                start, end = ("<b>", "</b>") if index in row.bold else ("<em>", "</em>") if row.italic else ("", "")
                # an interval never breaks apart, and stands back behind its figure
                figure, _, interval = escape(cell).partition(" [")
                small = f" <small>[{interval}</small>" if interval else ""
                line += f"<td>{start}{figure}{end}{small}</td>"
            lines.append(f"<tr{' class=mean' if row.marked else ''}>{line}</tr>")
        return pages.table(lines)


Block = Heading | Text | Bullets | Table


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """A whole Markdown file."""
    return "\n\n".join([f"# {_plain(title)}", *(block.markdown() for block in blocks)]) + "\n"


def to_html(blocks: Sequence[Block]) -> str:
    """Blocks as a part of a page."""
    return "".join(block.html() for block in blocks)
