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
"""Tables of a run: what is written is read back, replaced rows are replaced once, half a file is never left."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import read_rows, replace_rows, write_json, write_rows

COLUMNS = ("site", "case", "value")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tables") / "table.csv"


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)


@given(rows=st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS, words)), max_size=5))
@settings(max_examples=40, deadline=None)
def test_rows_come_back_as_they_were_written(table, rows):
    """Commas, quotes, line breaks and letters of any alphabet in a name included."""
    write_rows(table, COLUMNS, rows)
    assert read_rows(table) == rows


def test_header_is_written_even_without_rows_and_other_keys_are_left_out(tmp_path):
    write_rows(tmp_path / "new" / "table.csv", COLUMNS, [])
    assert (tmp_path / "new" / "table.csv").read_text() == "site,case,value\n"
    write_rows(tmp_path / "table.csv", COLUMNS, [{"site": "A", "case": "1", "value": 0.5, "other": "x"}])
    assert (tmp_path / "table.csv").read_text() == "site,case,value\nA,1,0.5\n"
    assert read_rows(tmp_path / "missing.csv") == []


def test_measured_again_replaces_what_was_measured_before(tmp_path):
    """Rows that agree in the named columns go, all others stay, in their order; twice is as once."""
    path = tmp_path / "table.csv"
    write_rows(path, COLUMNS, [{"site": site, "case": case, "value": 0} for site in "AB" for case in (1, 2)])
    for _ in range(2):
        replace_rows(path, COLUMNS, [{"site": "A", "case": 3, "value": 1}], same=["site"])
    assert [(row["site"], row["case"], row["value"]) for row in read_rows(path)] == [
        ("B", "1", "0"),
        ("B", "2", "0"),
        ("A", "3", "1"),
    ]
    replace_rows(path, COLUMNS, [{"site": "B", "case": 1, "value": 9}], same=["site", "case"])
    assert [(row["site"], row["case"]) for row in read_rows(path)] == [("B", "2"), ("A", "3"), ("B", "1")]


def test_table_of_other_columns_is_named_rather_than_overwritten(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("hospital,dice\nA,0.9\n")
    with pytest.raises(InputError, match=r"metrics\.csv.*'site'"):
        replace_rows(path, COLUMNS, [{"site": "A", "case": 1, "value": 1}], same=["site"])
    assert path.read_text() == "hospital,dice\nA,0.9\n"
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(InputError, match=r"metrics\.csv"):
        read_rows(path)


def test_table_saved_by_a_spreadsheet_is_read(tmp_path):
    """A byte-order mark is not part of the first column's name, and line ends may be those of Windows."""
    (tmp_path / "table.csv").write_bytes(b"\xef\xbb\xbfsite,case,value\r\nA,1,0.5\r\n")
    assert read_rows(tmp_path / "table.csv") == [{"site": "A", "case": "1", "value": "0.5"}]


def test_interrupted_write_leaves_the_old_table_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "table.csv"
    write_rows(path, COLUMNS, [{"site": "A", "case": 1, "value": 1}])
    old = path.read_text()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_rows(path, COLUMNS, [])
    assert path.read_text() == old
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        write_rows(tmp_path / "file" / "table.csv", COLUMNS, [])


def test_json_is_json_to_a_strict_reader(tmp_path):
    """What has no number in JSON (an objective that diverged) is null; paths are their names."""
    content = {"objective": math.nan, "list": [1, math.inf, {"deep": -math.inf}], "path": Path("a/b"), "fine": 0.5}
    write_json(tmp_path / "report.json", content)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert found == {"objective": None, "list": [1, None, {"deep": None}], "path": str(Path("a/b")), "fine": 0.5}


FORMULAS = [
    "=1+1",
    "+x",
    "-x",
    "@x",
    "\t=x",
    "\r=x",
    "\n=x",
    "=cmd|' /C calc'!A0",
    "\uff1d1",
    "'=x",
    "''=x",
    "-1+2",
    "+",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_a_cell_that_a_spreadsheet_would_execute_is_written_as_text(tmp_path, text):
    path = tmp_path / "table.csv"
    write_rows(path, ("case", "value"), [{"case": text, "value": "-0.25"}])
    with open(path, newline="", encoding="utf-8") as file:
        written = list(csv.DictReader(file))
    assert written == [{"case": f"'{text}", "value": "-0.25"}]
    assert read_rows(path) == [{"case": text, "value": "-0.25"}]


@pytest.mark.parametrize("text", ["-0.25", "+1", "-1e-5", "-inf", "nan", "'quoted", "a=b", "x-1"])
def test_numbers_and_plain_text_stand_as_they_are(tmp_path, text):
    write_rows(tmp_path / "table.csv", ("case",), [{"case": text}])
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"case": text}]
    assert read_rows(tmp_path / "table.csv") == [{"case": text}]


def test_a_row_of_such_a_name_is_replaced_by_its_like(tmp_path):
    for value in ("1", "2"):
        replace_rows(tmp_path / "table.csv", ("case", "value"), [{"case": "=x", "value": value}], ("case",))
    assert read_rows(tmp_path / "table.csv") == [{"case": "=x", "value": "2"}]
