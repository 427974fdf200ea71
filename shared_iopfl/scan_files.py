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
"""Which files are scans, what a scan is called, and the scans in a folder that inference is to segment.

What is a scan is told by names, and for DICOM by four letters in the file; scans are never opened here.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from shared_iopfl.errors import InputError

__all__ = ["case_name", "entries", "file_ending", "find_scans", "is_dicom", "printable", "unique_names"]

Case = dict[str, str]

NIFTI = (".nii.gz", ".nii")
ITK = (".mha", ".mhd", ".nrrd")
VOLUMES = NIFTI + ITK
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MASK = "_segmentation"  # compared without regard to case: the public sets write it both ways
MASK_FOLDERS = ("mask", "masks")


def find_scans(path: str | Path) -> list[Case]:
    """The scans to segment, as ``{"image", "case"}``, sorted by path.

    Args:
        path: one scan (NIfTI, MHA, MHD, NRRD, a picture, a DICOM file), or a folder. Of a folder count the scans in it
            and in folders named ``image`` or ``images`` below it, and every folder below it that holds DICOM files,
            which is one scan. Masks (``NAME_segmentation``, folders ``mask`` and ``masks``) and hidden files do not.

    Raises:
        InputError: when there is nothing at ``path``, or nothing that can be read as a scan.
    """
    root = Path(path)
    if not root.exists():
        raise InputError(f"no such file or folder: {root}")
    found = sorted(_scans_below(root, all_kinds=True)) if root.is_dir() else [root]
    if not found or (root.is_file() and not file_ending(root) and not is_dicom(root)):
        kinds = f"DICOM or {', '.join(ending[1:] for ending in VOLUMES + PICTURES)}"
        raise InputError(f"no scan at {root}: expected {kinds}")
    names = unique_names(found, root if root.is_dir() else root.parent)
    return [{"image": str(scan), "case": names[scan]} for scan in found]


def _scans_below(folder: Path, all_kinds: bool, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    holds_dicom, above = False, (*above, folder.resolve())
    for entry in entries(folder):
        if entry.is_dir():
            is_loop = entry.is_symlink() and any(path.is_relative_to(entry.resolve()) for path in above)
            if entry.name.lower() not in MASK_FOLDERS and not is_loop:
                below = list(_scans_below(entry, entry.name.lower() in ("image", "images"), above))
                yield from below or ([entry] if all_kinds and file_ending(entry) else [])
        elif is_dicom(entry):
            holds_dicom = True
        elif all_kinds and file_ending(entry) and not case_name(entry).lower().endswith(MASK):
            yield entry
    if holds_dicom:
        yield folder


def is_dicom(path: Path) -> bool:
    """By its name, or by the letters DICM at byte 128 where the name says nothing, as scanners and archives have it."""
    if file_ending(path) or path.name.upper() == "DICOMDIR":
        return file_ending(path) == ".dcm"
    if not path.is_file():
        return False  # a pipe would wait for its other end for ever
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def case_name(path: str | Path) -> str:
    """A scan's file name without its ending: ``Case03`` of ``BIDMC/Case03.nii.gz``; a series' folder name."""
    name = Path(path).name or Path(path).resolve().name
    return name[: len(name) - len(file_ending(name))]


def file_ending(path: str | Path) -> str:
    """The ending that tells a scan's format, in lower case (``.nii.gz``, ``.png``, ``.dcm``), or ``""``."""
    name = Path(path).name.lower()
    return next((ending for ending in (*VOLUMES, *PICTURES, ".dcm") if name.endswith(ending)), "")


def printable(text: str) -> str:
    """The text with an underscore for each character that no table or log can hold.

    Those are control characters, and what Python makes of a file name that is not UTF-8.
    """
    return "".join("_" if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in text)


def unique_names(paths: Sequence[Path], root: Path) -> dict[Path, str]:
    """A printable name for each path: its own, or where several share it, its way down from ``root`` and its ending."""
    count = Counter(case_name(path) for path in paths)
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        name = case_name(path)
        if count[name] > 1:
            name = "_".join(path.relative_to(root).parts or (name,)).replace(".", "_")
        name = base = printable(name)
        number = 2
        while name in taken or (name != case_name(path) and name in count):
            name, number = f"{base}_{number}", number + 1
        taken.add(name)
        names[path] = name
    return names


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, without hidden files (``._Case00.nii.gz`` on disks that a Mac has touched)."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
