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
"""The output folder of a run, which belongs to that run alone; files of other origin in it are not overwritten.

A run claims its folder before it reads any data. From then on the folder holds ``run.json``, the list of written files
``written.jsonl``, and a lock that ends with the process. Files that are not in the list are of another origin. A later
run of the same kind replaces the listed files, and no others, with ``overwrite``, or continues the run with ``resume``.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_iopfl.data.scan_files import RUN
from shared_iopfl.evaluation.run.earlier_run import RESUMED, check_apart, read_run
from shared_iopfl.evaluation.run.keeper import RunFolder
from shared_iopfl.utils import errors
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import check_writable, keepers
from shared_iopfl.utils.reading import read_json
from shared_iopfl.utils.tables import write_json

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
    """Claim a folder for a run, before the run reads any data.

    Args:
        kind: Kind of the run, one of `KINDS`.
        output_dir: The folder; it is created if necessary.
        dataset_dir: Folder of the data, which must be separate.
        settings: Settings that must be the same if a run is continued.
        overwrite: Remove the files that an earlier run of this kind wrote there. An inference or an evaluation, which a
            wrong model would end at once, removes them when it writes its first file.
        resume: Continue an earlier run of this kind, if there is one.
        part: Folder of the masks of an evaluation: evaluations of several models and sites share a folder, also with
            the federation or training that made the models, but each has its own part.

    Returns:
        The keeper of the folder.

    Raises:
        InputError: If the folder cannot be claimed; the message says what it holds, and what to do.
    """
    folder = Path(os.path.abspath(output_dir))
    if overwrite and resume:
        raise InputError("overwrite and resume cannot both be True: set one of them to False.")
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
            run.has_begun = run.has_begun and not begun  # resuming the earlier run may still fail
            if run.has_begun:
                write_json(folder / RUN, run.described)
    except BaseException:
        run.release()
        raise
    _held[folder] = run
    again = "--resume True continues" if kind in RESUMED else "--overwrite True starts again"
    errors.when_interrupted(f"{output_dir} holds the results so far; the same command with {again}")
    return run


def claim_training(
    output_dir: str | os.PathLike,
    dataset_dir: str | os.PathLike,
    models: Sequence[str | os.PathLike],
    overwrite: bool = False,
) -> None:
    """Claim a folder for a training, whose model files may be in another folder.

    If several processes train together, the first one claims the folder.

    Args:
        output_dir, dataset_dir, overwrite: As in `claim`.
        models: Model files that the training writes.

    Raises:
        InputError: As in `claim`, and if a model file exists and `overwrite` is not set.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    there = [Path(os.path.abspath(path)) for path in models if os.path.lexists(path)]
    if there and not overwrite:
        raise InputError(
            f"{there[0]} already exists, and training would replace it: give another --ckpt_dir, or replace it with "
            "--overwrite True."
        )
    claim("train", output_dir, dataset_dir, overwrite=overwrite).replaced = {*there}


def describe(output_dir: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write the description of a run into ``run.json``.

    If the ``run.json`` of an earlier run is still kept, it is replaced when this run writes its first file.

    Args:
        output_dir: Folder of the run.
        content: Name -> value; "kind" and "status" in the file are kept.
    """
    run = _held.get(Path(os.path.abspath(output_dir)))
    if run is not None and not run.has_begun:
        run.described.update(content)
        return
    path = Path(output_dir) / RUN
    begun = read_json(path) if path.is_file() else {}
    kept = {name: begun[name] for name in ("kind", "status") if name in begun}
    write_json(path, {**kept, **content})


def has_begun(output_dir: str | os.PathLike) -> bool:
    """Return whether a run of this process owns the folder and has removed the earlier run that it replaces."""
    run = _held.get(Path(os.path.abspath(output_dir)))
    return run is not None and run.has_begun


def finish(output_dir: str | os.PathLike, report: Callable[[str], object] | None = None) -> None:
    """Record in ``run.json`` that a run is finished; without a run of this process in the folder, only report.

    Args:
        output_dir: Folder of the run.
        report: Function that is called with the folder and shows the contents of ``run.json``; if it fails, the run is
            unfinished.
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
    """Release a folder if a run of this process owns it."""
    run = _held.pop(Path(os.path.abspath(output_dir)), None)
    if run is not None:
        run.release()
        if run.is_finished:  # other runs can be continued, so their advice is kept
            errors.when_interrupted("")


def _take_over(folder: Path, shown: str | os.PathLike) -> None:
    """Release a folder that an earlier run of this process has not released.

    Raises:
        InputError: If that run is in another thread that is still alive.
    """
    earlier = _held.get(folder)
    if earlier is None:
        return
    if earlier.thread is not threading.current_thread() and earlier.thread.is_alive():
        raise InputError(f"{shown} is in use by another run: wait for it, or choose another output_dir.")
    _held.pop(folder).release()
