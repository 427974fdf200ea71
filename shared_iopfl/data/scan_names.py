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
"""File formats of scans, names of cases, and names that mark masks.

The format of a file is recognised by its name, that of DICOM also by the letters DICM in it; nothing else is read here.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_iopfl.utils.errors import InputError

NIFTI = (".nii.gz", ".nii")
NIBABEL = (*NIFTI, ".mgz", ".mgh", ".hdr", ".img")  # .hdr and .img are one scan in two files
ITK = (".mha", ".mhd", ".nrrd", ".nhdr")
VOLUMES = NIBABEL + ITK
PICTURES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)  # fmt: skip
LONGEST_DESCRIPTION = 60  # characters
MASK = "_segmentation"  # compared without regard to letter case, which differs between the public data sets
MASK_FOLDERS = (
    *("mask", "masks", "label", "labels", "labelstr", "labelsts", "labelsval", "seg", "segs", "segmentation"),
    *("segmentations", "gt", "ground_truth", "groundtruth", "ground truth", "annotations"),
)  # fmt: skip
_WORDS = r"(?:d?segm?s?|segmentations?|masks?|labels?|labelmap|gt|ground[ _-]?truth|roi|annotations?|manual\d*)"
_MASK_NAMES = re.compile(rf"(?P<base>.*)[ ._-]{_WORDS}(?:[ ._-]?\d)?|{_WORDS}[ ._-](?P<rest>.*)|{_WORDS}", re.I | re.S)


def base_of_mask(path: Path) -> str | None:
    """Return the name, in lower case, of the scan that a mask is named after; None for other names.

    The result is "case00" for ``Case00_mask.nii.gz``, ``case00-Label.nrrd``, ``seg_Case00.nii`` and
    ``Case00.seg.nrrd``, and "" for ``mask.nii.gz``.
    """
    found = _MASK_NAMES.fullmatch(case_name(path))
    return (found["base"] or found["rest"] or "").lower() if found else None


def is_dicom(path: Path) -> bool:
    """Return whether a file is DICOM: by its ending or, if the ending is unknown, by the letters DICM at byte 128."""
    if file_ending(path) or path.name.upper() == "DICOMDIR":
        return file_ending(path) == ".dcm"
    if not path.is_file():
        return False  # opening a pipe would block
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def case_name(path: str | Path) -> str:
    """Return the name of a scan's file or folder without its ending: ``Case03`` for ``BIDMC/Case03.nii.gz``."""
    name = Path(path).name or Path(path).resolve().name
    return name[: len(name) - len(file_ending(name))]


def source_of(data: Mapping[Hashable, Any], image_key: str, key: Hashable) -> tuple[Path, Mapping[str, Any]]:
    """Return the file of the scan that a mask was predicted from, and the metadata that name it.

    Args:
        data: Data of a case.
        image_key: Key of the scan. If it has no metadata, those of the mask are used.
        key: Key of the mask.
    """
    meta = getattr(data.get(image_key), "meta", None) or data[key].meta
    files = meta["filename_or_obj"]
    return Path(files[0] if isinstance(files, (list, tuple)) else files), meta


def file_ending(path: str | Path) -> str:
    """Return the ending that identifies a scan's format, in lower case (``.nii.gz``, ``.png``, ``.dcm``), or ``""``."""
    name = Path(path).name.lower()
    return next((ending for ending in (*VOLUMES, *PICTURES, ".dcm") if name.endswith(ending)), "")


def printable(text: str) -> str:
    """Replace each character that a table or a log cannot represent by an underscore.

    These are control characters, and the characters by which Python represents a file name that is not UTF-8.
    """
    return "".join("_" if unicodedata.category(letter) in ("Cc", "Cs") else letter for letter in text)


def unique_names(paths: Sequence[Path], root: Path, given: Mapping[Path, str] | None = None) -> dict[Path, str]:
    """Return a printable name for each path: its case name or, if several share it, its path with its ending.

    Args:
        paths: Paths to name.
        root: Folder above them, to which such a path is relative.
        given: Path -> name, where it differs from the case name; if several paths share one, a number is added.
    """
    given = given or {}
    count = Counter(given.get(path, case_name(path)) for path in paths)
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        name = own = given.get(path, case_name(path))
        if count[name] > 1 and path not in given:
            name = "_".join(path.relative_to(root).parts or (name,)).replace(".", "_")
        name = base = printable(name)
        number = 2
        while name in taken or (name != own and name in count):
            name, number = f"{base}_{number}", number + 1
        taken.add(name)
        names[path] = name
    return names


def series_name(folder: Path, root: Path, description: str) -> str:
    """Return a name for a DICOM series, such as ``P001_t2_tra``, from the folder of its patient and its description.

    Archives export ``PATIENT/STUDY/SERIES``, often with identifiers of up to 64 digits as names of studies and series.

    Args:
        folder: Folder of the series.
        root: Folder that was given; its name is used if only identifiers lie between the two.
        description: Description of the series from its files; "" if they have none.
    """
    between = folder.relative_to(root).parts[:-1]
    patient = next((part for part in (*between, root.name) if not is_identifier(part)), "")
    own = "" if is_identifier(folder.name) else folder.name
    series = re.sub(r"[^\w.+-]+", "_", description or own).strip("_.-")[:LONGEST_DESCRIPTION] or "series"
    return f"{patient}_{series}" if patient else series


def is_identifier(name: str) -> bool:
    """Return whether a folder's name is a DICOM UID or a long hexadecimal number, which means nothing to people."""
    return re.fullmatch(r"[\d.]{16,}|[0-9a-fA-F-]{32,}", name) is not None


def entries(folder: Path) -> list[Path]:
    """Return the sorted contents of a folder without hidden files, such as ``._Case00.nii.gz`` on disks written by
    macOS.

    Raises:
        InputError: If the folder cannot be read.
    """
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
