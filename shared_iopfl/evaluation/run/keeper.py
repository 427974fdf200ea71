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
"""The keeper of a run's folder: which files the run may write, replace and remove."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared_iopfl.data.scan_files import RUN, WRITTEN
from shared_iopfl.evaluation.run.earlier_run import (
    ANYWHERE,
    KINDS,
    RESUMED,
    SCORED,
    UNFINISHED,
    WITH_MODELS,
    check_settings,
    check_strangers,
    read_run,
)
from shared_iopfl.evaluation.run.lock import FolderLock
from shared_iopfl.evaluation.run.written import Written
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import keepers
from shared_iopfl.utils.tables import write_json


class RunFolder:
    """A folder while a run owns it; a `Keeper` of the files that are written into it.

    Args:
        folder: The folder, which exists.
        kind: Kind of the run.
        shown: Name of the folder in messages.

    Raises:
        InputError: If another run holds the folder.
    """

    def __init__(self, folder: Path, kind: str, shown: str) -> None:
        self.folder = folder
        self.kind = kind
        self.shown = shown
        self.thread = threading.current_thread()
        self.replaced: set[Path] = set()  # files that are not listed, but that the user wants to replace
        self.described: dict[str, Any] = {}  # contents of run.json that are not written yet
        self.has_begun = True  # False while the files of an earlier run, with run.json, are kept
        self.is_finished = False
        self._outdated: Path | None = None  # listed files below it are removed when this run writes its first file
        self._lock = FolderLock(folder, shown)
        self.written = Written(folder)
        self._found = {path for path in folder.rglob("*") if path not in self.written} if kind == "flare" else set()

    def make_room(self, settings: Mapping[str, Any], overwrite: bool, resume: bool, part: Path | None) -> None:
        """Check that the run may write into its folder, and mark the files that it replaces for removal.

        Args:
            settings, overwrite, resume, part: As in `folder.claim`.

        Raises:
            InputError: If the folder holds an earlier run that may not be replaced or continued, or files of other
                origin.
        """
        folder, written = self.folder, self.written
        earlier = read_run(folder) if (folder / RUN) in written else {}
        files = written.below(folder)
        if set(files) - {folder / RUN}:  # a run that failed at once has left only run.json
            kind, status = earlier.get("kind", self.kind), earlier.get("status", "unfinished")
            found = f"{self.shown} holds {KINDS.get(kind, 'something else')} ({status}, {len(files)} files)"
            if kind != self.kind and not (part is not None and kind in SCORED):
                raise InputError(f"{found}: choose another output_dir.")
            if part is not None:
                self._make_room_for_part(part, overwrite)
            elif resume:
                begun, now = earlier.get("settings"), json.loads(json.dumps(dict(settings), default=str))
                begun = begun if isinstance(begun, dict) else {}
                same = {name: value for name, value in now.items() if name in begun and name not in ANYWHERE}
                check_settings(begun, same, self.shown)
            elif not overwrite:
                go_on = ", or continue it with --resume True" * (self.kind in RESUMED)
                raise InputError(f"{found}: choose another output_dir, or replace it with --overwrite True{go_on}.")
            else:
                self.replace(folder)
            if self.kind not in WITH_MODELS:
                self.begin()
            for path in [path for path in folder.rglob(".*") if UNFINISHED.fullmatch(path.name)]:
                path.unlink(missing_ok=True)
        check_strangers(folder, written, self.kind, self.shown)

    def _make_room_for_part(self, part: Path, overwrite: bool) -> None:
        if part.is_relative_to(self.folder) and self.written.below(part):
            if not overwrite:
                raise InputError(
                    f"{part} holds an evaluation of this model at this site: choose another output_dir, or replace it "
                    "with --overwrite True."
                )
            self.replace(part)

    def check(self, target: Path) -> None:
        """Raise `InputError` if writing to `target` would replace a file of another origin."""
        path = Path(os.path.abspath(target))
        if self._is_kept(path) and os.path.lexists(path) and path not in self.written and path not in self.replaced:
            raise InputError(
                f"{target} was there before this run and is not overwritten: move it away, or choose another "
                "output_dir."
            )

    def note(self, target: Path, content: Path) -> None:
        """List a file that the run is about to write; `content` is the file that holds its contents until then."""
        path = Path(os.path.abspath(target))
        if self._is_kept(path):
            self.begin()
            self.written.add(path, content)
            self._note_events()

    def replace(self, folder: Path) -> None:
        """Mark the files that earlier runs wrote below a folder for removal when this run writes its first file."""
        self.written.check_unchanged(folder)
        self._outdated, self.has_begun = folder, False

    def begin(self) -> None:
        """Remove the files that are replaced and write ``run.json``, unless that was done before."""
        if self.has_begun:
            return
        outdated, self._outdated, self.has_begun = self._outdated, None, True
        if outdated is not None:
            self.written.remove(outdated)
        if self.described:
            write_json(self.folder / RUN, self.described)

    def _is_kept(self, path: Path) -> bool:
        return path.is_relative_to(self.folder) and not path.name.startswith(".") and path != self.folder / WRITTEN

    def _note_events(self) -> None:
        """List the files that other code writes: TensorBoard's, with host and process in their names, and FLARE's."""
        if self.kind in SCORED:
            own = f"events.out.tfevents.*.{socket.gethostname()}.{os.getpid()}.*"
            for path in [*self.folder.glob(own), *self.folder.glob(f"tensorboard/{own}")]:
                self.written.add(path)
        if self.kind == "flare":  # the sites and the server are separate processes
            for path in self.folder.rglob("*"):
                if path.is_file() and self._is_kept(path) and path not in self._found:
                    self.written.add(path)

    def finish(self, is_finished: bool = True) -> None:
        """Record in ``run.json`` whether the run is finished."""
        self.begin()
        self._note_events()
        run = read_run(self.folder)
        if run.get("kind") == self.kind:
            write_json(self.folder / RUN, {**run, "status": "finished" if is_finished else "unfinished"})
        self.is_finished = is_finished

    def release(self) -> None:
        """List the last files and release the lock."""
        if self in keepers:
            keepers.remove(self)
            with suppress(OSError):  # the disk is full
                self._note_events()
        self._lock.release()
