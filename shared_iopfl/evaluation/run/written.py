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
"""The list of the files that a run wrote, ``written.jsonl``; a later run may replace only these."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared_iopfl.data.scan_files import OVERLAY, RUN, WRITTEN, written_by_a_run
from shared_iopfl.data.scan_names import PICTURES, VOLUMES, file_ending
from shared_iopfl.utils.errors import InputError


class Written:
    """The files that runs wrote into a folder.

    A file is listed before it is renamed to its final name, so that all files of a killed run are in the list. For
    masks, which people correct by hand, size and checksum are listed too.

    Args:
        folder: Folder of the runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = dict(self._read())

    def __contains__(self, path: Path) -> bool:
        return self._name(path) in self.files

    def below(self, folder: Path) -> list[Path]:
        """Return the listed files in a folder, or below it, that still exist."""
        paths = [self.folder / name for name in self.files]
        return [path for path in paths if path.is_relative_to(folder) and os.path.lexists(path)]

    def add(self, path: Path, content: Path | None = None) -> None:
        """List a file.

        Args:
            path: The file.
            content: File that holds its contents until it is renamed.
        """
        entry: dict[str, Any] = {"file": self._name(path)}
        if content is not None and _is_mask(path):
            entry.update(_sums(content))
        if self.files.get(entry["file"]) == entry:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # a single write to the end of the file, so that a run that is killed leaves complete lines
        with open(self.folder / WRITTEN, "ab", buffering=0) as file:
            file.write((json.dumps(entry) + "\n").encode())
        self.files[entry["file"]] = entry

    def check_unchanged(self, folder: Path) -> None:
        """Raise `InputError` if a mask in a folder, or below it, has changed since a run wrote it."""
        for path in self.below(folder):
            entry = self.files[self._name(path)]
            sums = {key: entry.get(key) for key in ("bytes", "crc32")}
            if "crc32" in entry and path.is_file() and _sums(path) != sums:
                raise InputError(
                    f"{path} was changed since the run that wrote it: move it away, or choose another output_dir."
                )

    def remove(self, folder: Path) -> None:
        """Remove the listed files in a folder, or below it, and the folders that become empty.

        Args:
            folder: The folder.

        Raises:
            InputError: If a mask among them has changed; then nothing is removed.
        """
        self.check_unchanged(folder)
        paths = sorted(self.below(folder), key=lambda path: path == self.folder / RUN)  # run.json is removed last
        for path in paths:
            if not path.is_dir() or path.is_symlink():
                path.unlink(missing_ok=True)
        for parent in sorted({parent for path in paths for parent in path.parents}, reverse=True):
            if parent != self.folder and parent.is_relative_to(self.folder):
                with suppress(OSError):  # it has other contents
                    parent.rmdir()
        if folder == self.folder:
            (self.folder / WRITTEN).unlink(missing_ok=True)
            self.files = {}

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield name and entry of each listed file; entries outside the folder, which no run writes, are ignored."""
        for entry in written_by_a_run(self.folder):
            try:
                parent = (self.folder / entry["file"]).parent.resolve()
            except (ValueError, OSError):
                continue  # not a path
            if ".." not in Path(entry["file"]).parts and parent.is_relative_to(self.folder.resolve()):
                yield entry["file"], entry


def _is_mask(path: Path) -> bool:
    return file_ending(path) in VOLUMES + PICTURES and not path.stem.endswith(OVERLAY)


def _sums(path: Path) -> dict[str, int]:
    total = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            total = zlib.crc32(block, total)
    return {"bytes": path.stat().st_size, "crc32": total}
