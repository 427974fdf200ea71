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
"""CSV and JSON files of a run.

Spreadsheets execute cells that look like formulas. Names and reasons come with data, so such text is written with a
leading apostrophe, as OWASP advises, which reading removes. Numbers are written as they are.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import write_text
from shared_iopfl.utils.reading import read_bounded

Row = Mapping[str, Any]
FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*(e[+-]?\d+)?|nan|inf)", re.IGNORECASE)
LARGEST = 2**30


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write `content` as indented JSON; numbers that JSON lacks (NaN, infinity) become null."""
    write_text(path, json_text(content, indent=2) + "\n")


def json_text(content: Any, indent: int | None = None) -> str:
    """`content` as JSON; numbers that JSON lacks (NaN, infinity) become null."""
    return json.dumps(_finite(content), indent=indent, default=str, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def write_rows(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Write a CSV file with a header."""
    write_text(path, csv_text(columns, rows))


def csv_text(columns: Sequence[str], rows: Iterable[Row], header: bool = True) -> str:
    """Rows in CSV format, with or without the header."""

    class Lines(list):
        def write(self, line: str) -> None:  # the only method that csv needs of a file
            self.append(line.removesuffix("\r\n") + "\n")

    lines = Lines()
    # this line terminator makes the writer quote every cell with one of its two characters
    writer = csv.DictWriter(lines, columns, extrasaction="ignore", lineterminator="\r\n")
    if header:
        writer.writeheader()
    writer.writerows({column: _as_text(value) for column, value in row.items()} for row in rows)
    return "".join(lines)


def _as_text(value: Any) -> Any:
    is_formula = isinstance(value, str) and FORMULA.match(value) and not NUMBER.fullmatch(value)
    return f"'{value}" if is_formula else value


def _from_text(value: Any) -> Any:
    """The inverse of `_as_text`; "" for missing cells. The surplus cells of a row that is too long are a list."""
    is_text = isinstance(value, str) and value.startswith("'") and FORMULA.match(value)
    return value[1:] if is_text else "" if value is None else value


def read_rows(path: str | os.PathLike, columns: str = "") -> list[dict[str, str]]:
    """Read the rows of a CSV file with a header; a missing file has none.

    Args:
        path: Path of the file.
        columns: Required columns, separated by spaces.

    Raises:
        InputError: If the file cannot be read, or lacks a column.
    """
    if not os.path.isfile(path):
        return []
    try:
        text = read_bounded(path, LARGEST).decode("utf-8-sig")  # a table saved by Excel begins with a byte-order mark
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the table {path}: {error}; move it away.") from error
    lacking = [name for name in columns.split() if rows and name not in rows[0]]
    if lacking:
        wanted = ", ".join(columns.split())
        raise InputError(f"{path} lacks the column {lacking[0]!r}: it must have {wanted}; correct it or move it away.")
    return [{column: _from_text(value) for column, value in row.items()} for row in rows]


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Rows as lines of aligned text; the columns in `left` are left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    padded = ([c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))] for row in rows)
    return ["  ".join(cells).rstrip() for cells in padded]


def replace_rows(path: str | os.PathLike, columns: Sequence[str], rows: Sequence[Row], same: Sequence[str]) -> None:
    """Add rows to a CSV file, replacing existing rows that have the same values in all columns of `same`."""
    renewed = {tuple(str(row[column]) for column in same) for row in rows}
    kept = [row for row in read_rows(path, " ".join(columns)) if tuple(row[column] for column in same) not in renewed]
    write_rows(path, columns, [*kept, *rows])
