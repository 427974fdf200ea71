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
"""The scans in a folder, and the files that are not taken, with the reason."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from shared_iopfl.data.scan_names import (
    MASK_FOLDERS,
    PICTURES,
    VOLUMES,
    base_of_mask,
    case_name,
    entries,
    file_ending,
    is_dicom,
    is_identifier,
    printable,
    series_name,
    unique_names,
)
from shared_iopfl.data.volumes.dicom_headers import is_no_image, series_description
from shared_iopfl.data.volumes.label_maps import is_label_map
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.reading import read_bounded
from shared_iopfl.utils.tables import write_rows

if TYPE_CHECKING:
    from ignite.engine import Engine

Case = dict[str, str]
logger = logging.getLogger(__name__)
NOT_TAKEN = ("file", "reason")
SHOWN = 3  # names a reason
RUN, WRITTEN = "run.json", "written.jsonl"  # in a folder that a run of this program wrote; the latter lists its files
LARGEST_LIST = 2**30
OVERLAY = "_overlay"  # ends the name of a run's picture of a scan with its mask
PARTS = (".raw", ".zraw", ".raw.gz", ".img")  # of a scan whose header is a file of its own


def find_scans(path: str | Path, pictures: bool = False) -> list[Case]:
    """The scans to segment, as ``{"image", "case"}``, sorted by path.

    Args:
        path: one scan (NIfTI, MGZ, MHA, MHD, NRRD, a picture, a DICOM file), or a folder, which is searched with its
            subfolders; a folder that holds DICOM files is one scan. Not taken, and listed by `not_taken`, are masks
            (recognised by name, folder, or few integer values), pictures where there are volumes, the output of a run
            and its overlays beside the scans, and other kinds of files.
        pictures: take pictures, and no volumes.

    Raises:
        InputError: when there is nothing at ``path``, or nothing that can be read as a scan.
    """
    root = Path(path)
    survey = _survey(root, pictures)
    if not survey.scans:
        kinds = f"DICOM or {', '.join(ending[1:] for ending in VOLUMES + PICTURES)}"
        line = survey.line()
        raise InputError(f"no scan at {root}: expected {kinds}{'; ' * bool(line)}{line}")
    top = root if root.is_dir() else root.parent
    names = unique_names(survey.scans, top, _series_names(survey.scans, top))
    return [{"image": str(scan), "case": names[scan]} for scan in survey.scans]


def _series_names(scans: Sequence[Path], root: Path) -> dict[Path, str]:
    """Names of DICOM series that lie as ``PATIENT/STUDY/SERIES`` or in a folder whose name is an identifier."""
    names = {}
    for scan in scans:
        if scan.is_dir() and not file_ending(scan):
            deep = scan != root and len(scan.relative_to(root).parts) >= 3
            if deep or is_identifier(scan.name):
                names[scan] = series_name(scan, root if scan != root else root.parent, series_description(scan))
    return names


def not_taken(path: str | Path, pictures: bool = False) -> str:
    """One line that says which files `find_scans` passes over, by reason; "" when there are none."""
    return _survey(Path(path), pictures).line()


class NotTaken:
    """Reports at the end of a run which files of its folder were not taken for scans.

    Args:
        dataset_dir: as for `find_scans`. It is searched when the handler is made, before a run writes anything.
        pictures: as for `find_scans`.
        output_dir: folder of the table ``not_taken.csv``; None: no table, as file names may identify patients.
    """

    def __init__(
        self, dataset_dir: str | Path, pictures: bool = False, output_dir: str | os.PathLike | None = None
    ) -> None:
        survey = _survey(Path(dataset_dir), pictures) if Path(dataset_dir).is_dir() else _Survey()
        self.line = survey.line()
        self.rows = [{"file": name, "reason": why} for why, names in survey.others.items() for name in sorted(names)]
        self.output_dir = output_dir

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        from ignite.engine import Events  # here, so that files are listed without torch

        engine.add_event_handler(Events.COMPLETED, self)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self)

    def __call__(self, engine: Engine, error: BaseException | None = None) -> None:
        if self.line:
            logger.warning(self.line)
        if self.line and self.output_dir is not None and error is None:
            write_rows(Path(self.output_dir) / "not_taken.csv", NOT_TAKEN, self.rows)
        if error is not None:
            raise error


@dataclass
class _Survey:
    """The scans of a folder, and the other files by the reason why they are not taken."""

    scans: list[Path] = field(default_factory=list)
    others: dict[str, list[str]] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)  # what a run has listed as its own

    def pass_over(self, reason: str, *names: str) -> None:
        self.others.setdefault(reason, []).extend(names)

    def line(self) -> str:
        parts = []
        for reason, names in sorted(self.others.items()):
            some = ", ".join(map(printable, sorted(names)[:SHOWN])) + ", ..." * (len(names) > SHOWN)
            parts.append(f"{len(names)} {reason} ({some})")
        return f"not taken: {'; '.join(parts)}" if parts else ""


def _survey(root: Path, pictures: bool) -> _Survey:
    if not root.exists():
        raise InputError(f"no such file or folder: {root}")
    if not root.is_dir():
        return _Survey([root] if file_ending(root) or is_dicom(root) else [])
    survey = _Survey(own=_written_by_a_run(root))
    found = sorted(_scans_below(root, root, survey))
    volumes = [scan for scan in found if file_ending(scan) not in PICTURES]
    for scan in found if pictures else ():
        if scan in volumes:
            survey.pass_over("volumes where pictures are wanted", _name(scan, root))
    if not pictures and volumes:
        previews = [_name(scan, root) for scan in found if scan not in volumes]
        if previews:
            survey.pass_over("pictures beside volumes", *previews)
    found = [scan for scan in found if (scan in volumes) != pictures] if volumes else found
    survey.scans = _without_masks(found, root, survey)
    return survey


def _scans_below(folder: Path, root: Path, survey: _Survey, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    slices, above, inside = 0, (*above, folder.resolve()), entries(folder)
    whole = {case_name(entry) for entry in inside if file_ending(entry) in (".hdr", ".mhd", ".nhdr")}
    for entry in inside:
        name = _name(entry, root)
        if name in survey.own:
            if file_ending(entry):
                survey.pass_over("files that a run wrote", name)
        elif entry.is_dir():
            if entry.is_symlink() and any(path.is_relative_to(entry.resolve()) for path in above):
                continue  # a loop
            if entry.name.lower() in MASK_FOLDERS:
                survey.pass_over("folders of masks", f"{name}/")
            elif (entry / RUN).is_file():
                survey.pass_over("folders that a run wrote", f"{name}/")
            else:
                below = list(_scans_below(entry, root, survey, above))
                yield from below or ([entry] if file_ending(entry) else [])
        elif is_dicom(entry):
            if is_no_image(entry):
                survey.pass_over("DICOM objects without voxels", name)
            else:
                slices += 1
        elif any(entry.name.lower() == f"{scan}{part}".lower() for scan in whole for part in PARTS):
            continue  # part of a scan
        elif file_ending(entry):
            yield entry
        elif entry.name.upper() != "DICOMDIR":
            survey.pass_over("files of other kinds", name)
    if slices:
        yield folder


def _written_by_a_run(folder: Path) -> set[str]:
    """What a run of this program has listed as its own in a folder, relative to it."""
    names: set[str] = set()
    if (folder / RUN).is_file() and (folder / WRITTEN).is_file():
        for line in read_bounded(folder / WRITTEN, LARGEST_LIST).decode(errors="replace").splitlines():
            with suppress(ValueError, TypeError, KeyError, RecursionError):  # the line at which a run was killed
                names.add(str(json.loads(line)["file"]))
    return names


def _without_masks(found: list[Path], root: Path, survey: _Survey) -> list[Path]:
    """The scans without masks and overlays, recognised by their names beside a scan, or by their values."""
    base = {scan: base_of_mask(scan) if scan.is_file() else None for scan in found}
    named = {scan for scan in found if base[scan] is not None}
    scans_in: dict[Path, set[str]] = {}
    for scan in found:
        if scan not in named:
            scans_in.setdefault(scan.parent, set()).add(case_name(scan).lower())
    kept = []
    for scan in found:
        beside = scans_in.get(scan.parent, set())
        if scan in named and (base[scan] in beside or (base[scan] == "" and beside)):
            survey.pass_over("masks by their names", _name(scan, root))
        elif file_ending(scan) == ".png" and _base_of_overlay(scan) in beside:
            survey.pass_over("overlays by their names", _name(scan, root))
        elif scan.is_file() and file_ending(scan) in VOLUMES and is_label_map(scan):
            survey.pass_over("volumes of a few whole numbers, as masks are", _name(scan, root))
        else:
            kept.append(scan)
    return kept


def _base_of_overlay(picture: Path) -> str | None:
    """The name of the scan that an overlay's name says it shows, in lower case; None where no overlay is named so."""
    name = case_name(picture).lower()
    return name.removesuffix(OVERLAY) if name.endswith(OVERLAY) else None


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else path.name
