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

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared_iopfl.data.scan_names import file_ending, is_dicom
from shared_iopfl.evaluation.run.written import LIST, Written
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.reading import read_json

RUN = "run.json"
KINDS = {
    "inference": "an inference",
    "evaluate": "an evaluation",
    "train": "a training",
    "federate": "a federation",
    "compare": "a comparison",
    "flare": "a federation by FLARE",
    "personalise": "a personalisation",
    "calibrate": "a calibration",
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
    *("federations.json", "candidates.csv", "cross_site.csv", "calibration.csv", "calibration.json"),
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


def check_strangers(folder: Path, written: Written, kind: str, shown: str) -> None:
    """Raise `InputError` for a file that is in the way of a run, and that no run is known to have written.

    Args:
        folder: of the run.
        written: what runs wrote there.
        kind: of the run.
        shown: what the folder is called in the message.
    """
    for stranger in _strangers(folder, written, kind):
        raise InputError(
            f"{shown} holds {stranger.relative_to(folder)}, which no run is known to have written: choose an empty or "
            "new output_dir."
        )


def _strangers(folder: Path, written: Written, kind: str) -> Iterator[Path]:
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
