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
"""The contents of a run's folder before it starts: an earlier run to replace or continue, or files of other origin."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared_iopfl.data.scan_files import RUN, WRITTEN
from shared_iopfl.data.scan_names import file_ending, is_dicom
from shared_iopfl.evaluation.run.written import Written
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.reading import read_json

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
WITH_MODELS = ("inference", "evaluate")  # a wrong model or setting may end these before they write anything
SCORED = ("train", "federate", "flare")  # an evaluation may use the folders of these, too
MAKES_MODELS = ("federate", "flare", "personalise")  # these write the folder `models`
UNFINISHED = re.compile(r"\.[0-9a-f]{12}_.+")  # files that a run was writing when it was killed; see `whole_file`
# files at the top of a run's folder
NAMES = {
    *(RUN, WRITTEN, "failed.csv", "measures.csv", "review.csv", "routes.csv", "routes.json", "site.pt"),
    *("not_taken.csv", "scans.csv"),
    *("cases.csv", "metrics.csv", "summary.csv", "report.html", "federation.pt", "federation_previous.pt"),
    *("failures.csv", "history.csv", "statistics.csv", "choices.json", "comparison.csv", "comparison.md"),
    *("federations.json", "candidates.csv", "cross_site.csv", "calibration.csv", "calibration.json"),
}
ANYWHERE = ("device", "dataset_dir", "output_dir", "verbose")  # settings that may differ when a run is resumed


def check_apart(folder: Path, data: Path) -> None:
    """Raise `InputError` unless a run's folder and its data are separate."""
    if not data.exists():
        return
    one, other = folder.resolve(), data.resolve()
    if one == other:
        where = "the same as"
    elif one.is_relative_to(other):
        where = "inside"
    elif other.is_relative_to(one):
        where = "around"
    else:
        return
    raise InputError(f"output_dir {folder} is {where} dataset_dir {data}: choose an output_dir apart from the data.")


def check_settings(begun: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Check that a run is continued with the settings that it was begun with.

    Args:
        begun: Settings of the earlier run.
        now: Settings that must be the same.
        what: What was begun, for the message.

    Raises:
        InputError: If a setting differs.
    """
    for name, value in now.items():
        if begun.get(name) != value:
            raise InputError(
                f"{what} was begun with {name} {begun.get(name)}, but now it is {value}; resume with the same value, "
                "or choose another output folder."
            )


def check_strangers(folder: Path, written: Written, kind: str, shown: str) -> None:
    """Check that no file of unknown origin would be overwritten by a run or mixed with its masks.

    Args:
        folder: Folder of the run.
        written: Files that runs wrote there.
        kind: Kind of the run.
        shown: Name of the folder in the message.

    Raises:
        InputError: If there is such a file.
    """
    for stranger in _strangers(folder, written, kind):
        raise InputError(
            f"{shown} holds {stranger.relative_to(folder)}, which no run is known to have written: choose an empty or "
            "new output_dir."
        )


def _strangers(folder: Path, written: Written, kind: str) -> Iterator[Path]:
    """Yield the files of unknown origin that the run could overwrite, or that would be mixed with its masks."""
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        if here != folder and {RUN, WRITTEN} <= {*files}:
            folders.clear()  # the folder belongs to another run
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (here / name for name in sorted(files) if not name.startswith(".")):
            if path in written or (here == folder and path.name == WRITTEN and written.files):
                continue
            is_model = kind in MAKES_MODELS and path.suffix == ".pt" and here == folder / "models"
            if is_model or (here == folder and path.name in NAMES) or file_ending(path) or is_dicom(path):
                yield path


def read_run(folder: Path) -> dict[str, Any]:
    """Return the contents of ``run.json``, or an empty dictionary if it does not exist.

    Raises:
        InputError: If it was not written by a run.
    """
    if not (folder / RUN).is_file():
        return {}
    run = read_json(folder / RUN)
    if not isinstance(run, dict) or not isinstance(run.get("kind", ""), str):
        raise InputError(f"{folder / RUN} was not written by a run: choose another output_dir.")
    return run
