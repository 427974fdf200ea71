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
"""Pseudonyms of scans, which replace the names of their files."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from shared_iopfl.data.scan_files import Case
from shared_iopfl.data.scan_names import file_ending
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.names import check_file_name
from shared_iopfl.utils.tables import read_rows, write_rows

COLUMNS = ("pseudonym", "file")


def under_pseudonyms(scans: Sequence[Case], table: str | os.PathLike, output_dir: str | os.PathLike) -> list[Case]:
    """Return the scans as links named ``scan_0001`` and so on, so that no output and no log contains a file name.

    Only the table assigns pseudonyms to files. A scan that is in the table keeps its pseudonym, so that a folder can be
    segmented again when scans have been added. The links are in a temporary folder, which is removed when the process
    ends. An MHD file, whose voxels are in another file, cannot be read through a link.

    Args:
        scans: Scans as returned by `find_scans`.
        table: Path of a CSV file, which is created if necessary; it identifies patients and must be in a protected
            folder. "" uses no pseudonyms.
        output_dir: Folder of the masks.

    Raises:
        InputError: If the table would be in the folder of the masks, is not such a table, or has a pseudonym that is
            not a plain name or is used for two files.
    """
    if not table:
        return list(scans)
    table = Path(table)
    if table.resolve().is_relative_to(Path(output_dir).resolve()):
        raise InputError(f"the table of pseudonyms {table} would be in the folder of the masks: keep it elsewhere.")
    rows = read_rows(table)
    if any(not row.get(column) for row in rows for column in COLUMNS) or (table.exists() and not rows):
        raise InputError(f"{table} is not a table of pseudonyms: its columns are {' and '.join(COLUMNS)}.")
    known = _checked(rows, table)
    taken = {name.casefold() for name in known.values()}
    free = (name for number in count(len(known) + 1) if (name := f"scan_{number:04d}") not in taken)
    folder = Path(tempfile.mkdtemp(prefix="iopfl_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    served = []
    for scan in scans:
        file = os.path.abspath(scan["image"])
        # a name that is not UTF-8 is escaped in the table
        told = file.encode(errors="backslashreplace").decode()
        name = known[told] = known.get(told) or next(free)
        link = folder / f"{name}{file_ending(file)}"
        link.symlink_to(file)
        served.append({"image": str(link), "case": name})
    write_rows(table, COLUMNS, [{"pseudonym": name, "file": file} for file, name in known.items()])
    return served


def _checked(rows: Sequence[Mapping[str, str]], table: Path) -> dict[str, str]:
    """Return the pseudonyms of a table, file -> pseudonym, which users may have edited and which must be unique."""
    known: dict[str, str] = {}
    files: dict[str, str] = {}
    for row in rows:
        file, name = row["file"], check_file_name(row["pseudonym"], f"{table}: pseudonym")
        # some file systems do not distinguish letter case
        if known.setdefault(file, name) != name or files.setdefault(name.casefold(), file) != file:
            raise InputError(f"{table}: pseudonym {name!r} or its file {file} is listed twice: give each one row.")
    return known
