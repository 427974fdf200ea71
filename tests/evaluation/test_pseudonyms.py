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
"""Pseudonyms: each names one file in the folder of links, also if the table was edited."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared_iopfl.data.scan_files import Case
from shared_iopfl.evaluation.pseudonyms import COLUMNS, under_pseudonyms
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import read_rows, write_rows


@pytest.fixture
def scans(tmp_path: Path) -> list[Case]:
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "in" / f"{name}.nii.gz").touch()
    return [{"image": str(tmp_path / "in" / f"{name}.nii.gz"), "case": name} for name in ("a", "b", "c")]


def edited(tmp_path: Path, scans: list[Case], *names: str) -> Path:
    rows = [{"pseudonym": name, "file": os.path.abspath(scan["image"])} for name, scan in zip(names, scans)]
    write_rows(tmp_path / "table.csv", COLUMNS, rows)
    return tmp_path / "table.csv"


@pytest.mark.parametrize(
    "name", ["../a", "/tmp/a", "a/b", "a\\b", "..", ".a", "-a", "$a", "=a", "a\nb", "a\0", "x" * 200]
)
def test_a_pseudonym_that_is_not_a_plain_name_is_rejected(tmp_path: Path, scans: list[Case], name: str) -> None:
    table = edited(tmp_path, scans, name)
    before = table.read_bytes()
    with pytest.raises(InputError, match="table") as error:
        under_pseudonyms(scans, table, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert table.read_bytes() == before


@pytest.mark.parametrize("names", [("p", "p"), ("p", "P")])
def test_a_pseudonym_of_two_files_is_rejected(tmp_path: Path, scans: list[Case], names: tuple[str, str]) -> None:
    """Otherwise the second mask would replace the first."""
    with pytest.raises(InputError, match="is listed twice"):
        under_pseudonyms(scans, edited(tmp_path, scans, *names), tmp_path / "out")


def test_new_scans_get_unused_pseudonyms(tmp_path: Path, scans: list[Case]) -> None:
    """This also holds if rows were removed, so that the number of rows is no guide."""
    table = edited(tmp_path, scans, "scan_0002")
    served = under_pseudonyms(scans, table, tmp_path / "out")
    names = [scan["case"] for scan in served]
    assert names[0] == "scan_0002"
    assert len(set(names)) == 3
    assert {row["pseudonym"] for row in read_rows(table)} == set(names)
    assert [scan["case"] for scan in under_pseudonyms(scans, table, tmp_path / "out")] == names


def test_a_pipe_is_not_a_table(tmp_path: Path, scans: list[Case]) -> None:
    os.mkfifo(tmp_path / "table.csv")
    with pytest.raises(InputError, match="not a table of pseudonyms"):
        under_pseudonyms(scans, tmp_path / "table.csv", tmp_path / "out")
