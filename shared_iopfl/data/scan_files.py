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
"""Search for the scans in a folder; other files are passed over and listed with the reason."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
SHOWN = 3  # number of names given per reason
RUN, WRITTEN = "run.json", "written.jsonl"  # in the output folder of a run; the latter lists the files that it wrote
LARGEST_LIST = 2**30  # bytes
OVERLAY = "_overlay"  # suffix of the pictures of scans with their masks that a run writes
PARTS = (".raw", ".zraw", ".raw.gz", ".img")  # of voxel files whose header is a separate file


def find_scans(path: str | Path, pictures: bool = False) -> list[Case]:
    """Find the scans to segment.

    Args:
        path: A scan (NIfTI, MGZ, MHA, MHD, NRRD, a picture or a DICOM file), or a folder, which is searched with its
            subfolders; a folder that contains DICOM files is one scan. The following files are passed over, and listed
            by `not_taken`: masks (recognised by name, folder, or few integer values), pictures if there are volumes,
            the output of a run, including overlays beside the scans, and other kinds of files.
        pictures: Take only pictures, and no volumes.

    Returns:
        The scans as ``{"image", "case"}``, sorted by path.

    Raises:
        InputError: If ``path`` does not exist, or nothing there can be read as a scan.
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
    """Return names of the DICOM series in ``PATIENT/STUDY/SERIES``, or in a folder whose name is an identifier."""
    names = {}
    for scan in scans:
        if scan.is_dir() and not file_ending(scan):
            deep = scan != root and len(scan.relative_to(root).parts) >= 3
            if deep or is_identifier(scan.name):
                names[scan] = series_name(scan, root if scan != root else root.parent, series_description(scan))
    return names


def not_taken(path: str | Path, pictures: bool = False) -> str:
    """Return one line that lists by reason the files that `find_scans` passes over; "" if there are none."""
    return _survey(Path(path), pictures).line()


class NotTaken:
    """Report at the end of a run which files of its folder were not taken for scans.

    Args:
        dataset_dir: As in `find_scans`. It is searched when the handler is created, before a run writes anything.
        pictures: As in `find_scans`.
        output_dir: Folder of the table ``not_taken.csv``; None writes no table, as file names may identify patients.
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
    """The scans of a folder, and the other files by the reason why they are passed over."""

    scans: list[Path] = field(default_factory=list)
    others: dict[str, list[str]] = field(default_factory=dict)
    own: set[str] = field(default_factory=set)  # files that a run has listed as written by it

    def pass_over(self, reason: str, name: str) -> None:
        self.others.setdefault(reason, []).append(name)

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
    survey = _Survey(own={entry["file"] for entry in written_by_a_run(root)} if (root / RUN).is_file() else set())
    found = sorted(_scans_below(root, root, survey))
    wanted = [scan for scan in found if (file_ending(scan) in PICTURES) == pictures]
    if not wanted and not pictures:
        wanted = found
    reason = "volumes where pictures are wanted" if pictures else "pictures beside volumes"
    for scan in {*found}.difference(wanted):
        survey.pass_over(reason, _name(scan, root))
    survey.scans = _without_masks(wanted, root, survey)
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
                continue  # the link leads to a folder above it
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
            continue  # its header stands for the scan
        elif file_ending(entry):
            yield entry
        elif entry.name.upper() != "DICOMDIR":
            survey.pass_over("files of other kinds", name)
    if slices:
        yield folder


def written_by_a_run(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of ``written.jsonl``: the files that runs wrote into a folder, relative to it."""
    if (folder / WRITTEN).is_file():
        for line in read_bounded(folder / WRITTEN, LARGEST_LIST).decode(errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue  # a run that was killed may have left an incomplete line
            if isinstance(entry, dict) and isinstance(entry.get("file"), str):
                yield entry


def _without_masks(found: list[Path], root: Path, survey: _Survey) -> list[Path]:
    """Return the scans without masks and overlays, as recognised by names beside a scan or by values."""
    base = {scan: base_of_mask(scan) if scan.is_file() else None for scan in found}
    scans_in: dict[Path, set[str]] = {}
    for scan in found:
        if base[scan] is None:
            scans_in.setdefault(scan.parent, set()).add(case_name(scan).lower())
    kept = []
    for scan in found:
        beside, name = scans_in.get(scan.parent, set()), case_name(scan).lower()
        if base[scan] in beside or (base[scan] == "" and beside):
            survey.pass_over("masks by their names", _name(scan, root))
        elif file_ending(scan) == ".png" and name.endswith(OVERLAY) and name.removesuffix(OVERLAY) in beside:
            survey.pass_over("overlays by their names", _name(scan, root))
        elif scan.is_file() and file_ending(scan) in VOLUMES and is_label_map(scan):
            survey.pass_over("volumes of a few whole numbers, as masks are", _name(scan, root))
        else:
            kept.append(scan)
    return kept


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else path.name
