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
"""The list of the files that a run wrote, ``written.jsonl``: only these may a later run replace."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared_iopfl.data.scan_names import PICTURES, VOLUMES, file_ending
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.reading import read_bounded

LIST = "written.jsonl"
LARGEST = 2**30


class Written:
    """The files that runs wrote into one folder.

    A file is listed before it gets its name: a run that is killed leaves no file of its own that is not in the list. Of
    masks, which people correct by hand, size and checksum are listed too.

    Args:
        folder: of the runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = dict(self._read())

    def __contains__(self, path: Path) -> bool:
        return self._name(path) in self.files

    def below(self, folder: Path) -> list[Path]:
        """Those that are in a folder, or below it, and still there."""
        paths = [self.folder / name for name in self.files]
        return [path for path in paths if path.is_relative_to(folder) and os.path.lexists(path)]

    def add(self, path: Path, content: Path | None = None) -> None:
        """List a file.

        Args:
            path: the file.
            content: where its content is until it gets its name.
        """
        entry: dict[str, Any] = {"file": self._name(path)}
        if content is not None and _is_mask(path):
            entry.update(_sums(content))
        if self.files.get(entry["file"]) == entry:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        # one write to the end of the file, so that a run which is killed leaves whole lines
        with open(self.folder / LIST, "ab", buffering=0) as file:
            file.write((json.dumps(entry) + "\n").encode())
        self.files[entry["file"]] = entry

    def changed(self, path: Path) -> bool:
        """Whether a mask is no longer what the run wrote."""
        entry = self.files[self._name(path)]
        sums = {key: entry.get(key) for key in ("bytes", "crc32")}
        return "crc32" in entry and path.is_file() and _sums(path) != sums

    def check_unchanged(self, folder: Path) -> None:
        """Raise `InputError` where a mask in a folder, or below it, was changed since a run wrote it."""
        for path in self.below(folder):
            if self.changed(path):
                raise InputError(
                    f"{path} was changed since the run that wrote it: move it away, or choose another output_dir."
                )

    def remove(self, folder: Path) -> None:
        """Remove the files in a folder, or below it, and the folders that they leave empty.

        Raises:
            InputError: when a mask among them was changed since; nothing is removed then.
        """
        self.check_unchanged(folder)
        paths = self.below(folder)
        last = [path for path in paths if path.parent == self.folder and path.name == "run.json"]
        for path in [*(path for path in paths if path not in last), *last]:
            if not path.is_dir() or path.is_symlink():
                path.unlink(missing_ok=True)
        for parent in sorted({parent for path in paths for parent in path.parents}, reverse=True):
            if parent != self.folder and parent.is_relative_to(self.folder):
                with suppress(OSError):  # it holds something else
                    parent.rmdir()
        if folder == self.folder:
            (self.folder / LIST).unlink(missing_ok=True)
            self.files = {}

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The list's entries; one that leads out of the folder, as a run does not write it, is passed over."""
        if not (self.folder / LIST).is_file():
            return
        for line in read_bounded(self.folder / LIST, LARGEST).decode(errors="replace").splitlines():
            try:
                entry = json.loads(line)
                path = (self.folder / entry["file"]).parent.resolve()
            except (ValueError, TypeError, KeyError, RecursionError, OSError):
                continue  # the line at which a run was killed
            if ".." not in Path(entry["file"]).parts and path.is_relative_to(self.folder.resolve()):
                yield entry["file"], entry


def _is_mask(path: Path) -> bool:
    return file_ending(path) in VOLUMES + PICTURES and not path.stem.endswith("_overlay")


def _sums(path: Path) -> dict[str, int]:
    total = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            total = zlib.crc32(block, total)
    return {"bytes": path.stat().st_size, "crc32": total}
