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
"""The output folder of a run: it belongs to one run, and nothing else in it is written over.

A run claims its folder before it reads any data. From then on the folder holds ``run.json``, the list of written files
``written.jsonl``, and a lock that ends with the process. Files that are not in the list are of another origin. A later
run of the same kind replaces the listed files, and no others, with ``overwrite``, or continues the run with ``resume``.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared_iopfl.evaluation.run.earlier_run import (
    ANYWHERE,
    KINDS,
    RESUMED,
    RUN,
    SCORED,
    UNFINISHED,
    WITH_MODELS,
    check_apart,
    check_settings,
    check_strangers,
    read_run,
)
from shared_iopfl.evaluation.run.lock import FolderLock
from shared_iopfl.evaluation.run.written import LIST, Written
from shared_iopfl.utils import errors
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import check_writable, keepers
from shared_iopfl.utils.reading import read_json
from shared_iopfl.utils.tables import write_json


class RunFolder:
    """A folder while a run has it; a `Keeper` of what is written into it."""

    def __init__(self, folder: Path, kind: str, shown: str) -> None:
        self.folder = folder
        self.kind = kind
        self.shown = shown
        self.thread = threading.current_thread()
        self.replaced: set[Path] = set()  # not in the list, but the user wants them replaced
        self.described: dict[str, Any] = {}  # of run.json, where it is not written yet
        self.has_begun = True  # False: the files of an earlier run, with run.json, stay until this run writes one
        self.is_finished = False
        self._outdated: Path | None = None  # files below it are removed when this run writes its first file
        self._lock = FolderLock(folder, shown)
        self.written = Written(folder)
        self._found = {path for path in folder.rglob("*") if path not in self.written} if kind == "flare" else set()

    def make_room(self, settings: Mapping[str, Any], overwrite: bool, resume: bool, part: Path | None) -> None:
        """Raise `InputError` unless the run may write into its folder; remove what it replaces. Args: see `claim`."""
        folder, written = self.folder, self.written
        earlier = read_run(folder) if (folder / RUN) in written else {}
        files = written.below(folder)
        if set(files) - {folder / RUN}:  # a run that ended at once leaves nothing to lose
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
                go_on = ", or go on with it with --resume True" * (self.kind in RESUMED)
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
        """Raise `InputError` where writing to `target` would replace a file of another origin."""
        path = Path(os.path.abspath(target))
        if self._is_kept(path) and os.path.lexists(path) and path not in self.written and path not in self.replaced:
            raise InputError(
                f"{target} was there before this run, which will not write over it: move it away, or choose another "
                "output_dir."
            )

    def note(self, target: Path, content: Path) -> None:
        """List a file that the run is about to write; `content` holds what will be in it."""
        path = Path(os.path.abspath(target))
        if self._is_kept(path):
            self.begin()
            self.written.add(path, content)
            self._note_events()

    def replace(self, folder: Path) -> None:
        """Remove what earlier runs wrote below a folder, as soon as this run writes its first file."""
        self.written.check_unchanged(folder)
        self._outdated, self.has_begun = folder, False

    def begin(self) -> None:
        """Remove what is replaced and write ``run.json``, if that was not done yet."""
        if self.has_begun:
            return
        outdated, self._outdated, self.has_begun = self._outdated, None, True
        if outdated is not None:
            self.written.remove(outdated)
        if self.described:
            write_json(self.folder / RUN, self.described)

    def _is_kept(self, path: Path) -> bool:
        return path.is_relative_to(self.folder) and not path.name.startswith(".") and path != self.folder / LIST

    def _note_events(self) -> None:
        """List the files of TensorBoard, which writes them itself, with host and process in their names."""
        if self.kind in SCORED:
            own = f"events.out.tfevents.*.{socket.gethostname()}.{os.getpid()}.*"
            for path in [*self.folder.glob(own), *self.folder.glob(f"tensorboard/{own}")]:
                self.written.add(path)
        if self.kind == "flare":  # its sites and its server are processes of their own
            for path in self.folder.rglob("*"):
                if path.is_file() and self._is_kept(path) and path not in self._found:
                    self.written.add(path)

    def finish(self, is_finished: bool = True) -> None:
        """Say in ``run.json`` that the run has come to its end, or that it has not after all."""
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


_held: dict[Path, RunFolder] = {}


def claim(
    kind: str,
    output_dir: str | os.PathLike,
    dataset_dir: str | os.PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    part: str | os.PathLike | None = None,
) -> RunFolder:
    """Take a folder for a run, before it reads any data.

    Args:
        kind: of the run, one of `KINDS`.
        output_dir: the folder; made if it is not there.
        dataset_dir: the data, which must lie elsewhere.
        settings: what has to be the same where a run goes on.
        overwrite: remove what an earlier run of this kind wrote there. An inference or an evaluation, which a wrong
            model would end at once, does so with the first file that it writes.
        resume: go on with an earlier run of this kind, if there is one.
        part: of an evaluation, the folder of its masks: evaluations of several models and sites share a folder, also
            that of the federation or training that made the models, but no two have the same part.

    Raises:
        InputError: in one line that says what was found there, and what to do.
    """
    folder = Path(os.path.abspath(output_dir))
    if overwrite and resume:
        raise InputError("overwrite and resume cannot both be True: start afresh, or go on.")
    if dataset_dir is not None:
        check_apart(folder, Path(dataset_dir))
    check_writable(folder)
    _take_over(folder, output_dir)
    run = RunFolder(folder, kind, str(output_dir))
    try:
        run.make_room(settings or {}, overwrite, resume, None if part is None else Path(os.path.abspath(part)))
        keepers.append(run)
        if part is None or not set(run.written.below(folder)) - {folder / RUN}:
            begun = read_run(folder) if resume else {}
            run.described = {**begun, "kind": kind, "status": "unfinished", "settings": dict(settings or {})}
            run.has_begun = run.has_begun and not begun  # what it would go on with may still refuse
            if run.has_begun:
                write_json(folder / RUN, run.described)
    except BaseException:
        run.release()
        raise
    _held[folder] = run
    again = "--resume True goes on" if kind in RESUMED else "--overwrite True starts again"
    errors.when_interrupted(f"{output_dir} holds what was done so far; the same command with {again}")
    return run


def claim_training(
    output_dir: str | os.PathLike,
    dataset_dir: str | os.PathLike,
    models: Sequence[str | os.PathLike],
    overwrite: bool = False,
) -> None:
    """`claim` for a training, whose models may go elsewhere: those that are there stay, unless `overwrite` is set.

    Of several processes that train together the first one claims the folder.

    Args:
        output_dir, dataset_dir, overwrite: as for `claim`.
        models: the files that the training writes.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    there = [Path(os.path.abspath(path)) for path in models if os.path.lexists(path)]
    if there and not overwrite:
        raise InputError(
            f"{there[0]} is there already, and training would replace it: give another --ckpt_dir, or replace it with "
            "--overwrite True."
        )
    claim("train", output_dir, dataset_dir, overwrite=overwrite).replaced = {*there}


def describe(output_dir: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write into ``run.json`` what a run is; where an earlier run's is still there, with the first file of this one."""
    run = _held.get(Path(os.path.abspath(output_dir)))
    if run is not None and not run.has_begun:
        run.described.update(content)
        return
    path = Path(output_dir) / RUN
    begun = read_json(path) if path.is_file() else {}
    kept = {name: begun[name] for name in ("kind", "status") if name in begun}
    write_json(path, {**kept, **content})


def has_begun(output_dir: str | os.PathLike) -> bool:
    """Whether a run of this process has the folder, and nothing in it is an earlier run's that it was to replace."""
    run = _held.get(Path(os.path.abspath(output_dir)))
    return run is not None and run.has_begun


def finish(output_dir: str | os.PathLike, report: Callable[[str], object] | None = None) -> None:
    """Say in ``run.json`` that a run has come to its end; nothing is said where no run of this process has the folder.

    Args:
        output_dir: of the run.
        report: is called with it and shows what ``run.json`` says; where that fails, the run is unfinished.
    """
    run = _held.get(Path(os.path.abspath(output_dir)))
    if run is not None:
        run.finish()
    try:
        if report is not None:
            report(os.fspath(output_dir))
    except BaseException:
        if run is not None:
            run.finish(is_finished=False)
        raise


@atexit.register
def _release_all() -> None:
    for folder in list(_held):
        release(folder)


def release(output_dir: str | os.PathLike) -> None:
    """Give a folder back, if a run of this process has it."""
    run = _held.pop(Path(os.path.abspath(output_dir)), None)
    if run is not None:
        run.release()
        if run.is_finished:  # what else ends may be gone on from, as long as the process lasts
            errors.when_interrupted("")


def _take_over(folder: Path, shown: str | os.PathLike) -> None:
    """Take the place of a run of this process that ended without giving its folder back."""
    earlier = _held.pop(folder, None)
    if earlier is None:
        return
    if earlier.thread is not threading.current_thread() and earlier.thread.is_alive():
        _held[folder] = earlier
        raise InputError(f"{shown} is in use by another run: wait for it, or choose another output_dir.")
    earlier.release()
