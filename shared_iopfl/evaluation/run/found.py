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
"""What a run finds in its folder: an earlier run that it may replace or go on with, or files of another origin."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared_iopfl.data.scan_names import file_ending, is_dicom
from shared_iopfl.evaluation.run.written import LIST, Written
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.reading import read_json

if TYPE_CHECKING:
    from shared_iopfl.evaluation.run.folder import RunFolder

RUN = "run.json"
KINDS = {
    "inference": "an inference",
    "evaluate": "an evaluation",
    "train": "a training",
    "federate": "a federation",
    "compare": "a comparison",
    "flare": "a federation by FLARE",
    "personalise": "a personalisation",
}
RESUMED = ("federate", "compare", "flare")
WITH_MODELS = ("inference", "evaluate")  # what a wrong model or setting ends before it has written anything
SCORED = ("train", "federate", "flare")  # their folders may take an evaluation, too
MAKES_MODELS = ("federate", "flare", "personalise")  # in the folder `models` of theirs
UNFINISHED = re.compile(r"\.[0-9a-f]{12}_.+")  # what a killed run was writing; see `whole_file`
# at the top of a run's folder
NAMES = {
    *(RUN, LIST, "failed.csv", "measures.csv", "review.csv", "routes.csv", "routes.json", "site.pt"),
    *("not_taken.csv", "scans.csv"),
    *("cases.csv", "metrics.csv", "summary.csv", "report.html", "federation.pt", "federation_previous.pt"),
    *("failures.csv", "history.csv", "statistics.csv", "choices.json", "comparison.csv", "comparison.md"),
    *("federations.json", "candidates.csv", "cross_site.csv"),
}
ANYWHERE = ("device", "dataset_dir", "output_dir", "verbose")  # settings that may change when a run goes on


def check_apart(folder: Path, data: Path) -> None:
    """Raise `InputError` unless a run's folder and its data lie apart."""
    if not data.exists():
        return
    one, other = folder.resolve(), data.resolve()
    if one == other:
        where = "the same as"
    elif one.is_relative_to(other):
        where = "inside of"
    elif other.is_relative_to(one):
        where = "around"
    else:
        return
    raise InputError(f"output_dir {folder} is {where} dataset_dir {data}: keep what a run writes apart from its data.")


def make_room(
    run: RunFolder, shown: str, settings: Mapping[str, Any], overwrite: bool, resume: bool, part: Any
) -> None:
    """Raise unless the run may write into its folder; take away what it replaces."""
    folder, written = run.folder, run.written
    earlier = read_run(folder) if (folder / RUN) in written else {}
    if set(written.below(folder)) - {folder / RUN}:  # a run that ended at once leaves nothing to lose
        kind = earlier.get("kind", run.kind)
        found = (
            f"{shown} holds {KINDS.get(kind, 'something else')} ({earlier.get('status', 'unfinished')}, "
            f"{len(written.below(folder))} files)"
        )
        if kind != run.kind and not (part is not None and kind in SCORED):
            raise InputError(f"{found}: choose another output_dir.")
        if part is not None:
            _make_room_for_part(run, Path(os.path.abspath(part)), overwrite)
        elif resume:
            begun, now = earlier.get("settings"), json.loads(json.dumps(dict(settings), default=str))
            begun = begun if isinstance(begun, dict) else {}
            same = {name: value for name, value in now.items() if name in begun and name not in ANYWHERE}
            check_settings(begun, same, shown)
        elif not overwrite:
            go_on = ", or go on with it with --resume True" * (run.kind in RESUMED)
            raise InputError(f"{found}: choose another output_dir, or replace it with --overwrite True{go_on}.")
        else:
            run.replace(folder)
        if run.kind not in WITH_MODELS:
            run.begin()
        for path in [path for path in folder.rglob(".*") if UNFINISHED.fullmatch(path.name)]:
            path.unlink(missing_ok=True)
    stranger = next(_in_the_way(folder, written, run.kind), None)
    if stranger is not None:
        raise InputError(
            f"{shown} holds {stranger.relative_to(folder)}, which no run is known to have written: choose an empty or "
            "new output_dir."
        )


def _make_room_for_part(run: RunFolder, part: Path, overwrite: bool) -> None:
    if part.is_relative_to(run.folder) and run.written.below(part):
        if not overwrite:
            raise InputError(
                f"{part} holds an evaluation of this model at this site: choose another output_dir, or replace it with "
                "--overwrite True."
            )
        run.replace(part)


def check_settings(begun: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Raise `InputError` where a run would go on with other settings than it was begun with.

    Args:
        begun, now: the settings that have to be the same.
        what: was begun, for the message.
    """
    for name, value in now.items():
        if begun.get(name) != value:
            raise InputError(
                f"{what} was begun with {name} {begun.get(name)}, now it is {value}; resume with the same, or choose "
                "another output folder."
            )


def _in_the_way(folder: Path, written: Written, kind: str) -> Iterator[Path]:
    """What nobody is known to have written and that the run could write over, or that would be mixed with its masks."""
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        if here != folder and {RUN, LIST} <= {*files}:
            folders.clear()  # another run's
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (here / name for name in sorted(files) if not name.startswith(".")):
            if path in written or (here == folder and path.name == LIST and written.files):
                continue
            is_model = kind in MAKES_MODELS and path.suffix == ".pt" and here == folder / "models"
            if is_model or (here == folder and path.name in NAMES) or file_ending(path) or is_dicom(path):
                yield path


def read_run(folder: Path) -> dict[str, Any]:
    """The content of ``run.json``, empty where there is none.

    Raises:
        InputError: where it is not what a run writes.
    """
    if not (folder / RUN).is_file():
        return {}
    run = read_json(folder / RUN)
    if not isinstance(run, dict) or not isinstance(run.get("kind", ""), str):
        raise InputError(f"{folder / RUN} is not what a run leaves behind: choose another output_dir.")
    return run
