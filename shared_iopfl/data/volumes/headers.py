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
"""Checks of the header of a scan, before its voxels are read."""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from shared_iopfl.data.scan_names import ITK, NIBABEL, file_ending
from shared_iopfl.data.volumes.geometry import check_affine, check_forms
from shared_iopfl.utils.errors import InputError

MOST_VOXELS = 2**26  # 1024 x 1024 x 64 is more than scans of this kind have; processing takes less than 4 GB of memory
MILLIMETRES = {1: 1e3, 3: 1e-3}  # mm per unit, by NIfTI's codes of metres and microns
LEAST_VOXEL, LARGEST_VOXEL = 0.01, 50.0  # range of voxel sizes, in mm, of a scan in another unit
SLACK = 2**20  # bytes that may follow the last voxel
# the file of the voxels in the header of MHA and MHD, and of NRRD
DATA_FILE = re.compile(rb"^\s*(?:ElementDataFile\s*[=:]|data ?file:)[ \t]*([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
LONGEST_HEADER = 2**16


def check_header(path: Path) -> None:
    """Check that a header is valid and does not announce more than the file holds; DICOM and pictures are not checked.

    Raises:
        InputError: If it is not valid; a library that reads it may raise other errors.
    """
    if not path.is_file():
        return
    if file_ending(path) in NIBABEL:
        _check_nibabel(path)
    elif file_ending(path) in ITK:
        itk = import_itk(path)
        _check_data_file(path)
        io = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
        if io is not None:  # otherwise reading the scan will report the error
            io.SetFileName(str(path))
            io.ReadImageInformation()
            check_size([io.GetDimensions(axis) for axis in range(io.GetNumberOfDimensions())], path)


def millimetres(path: Path) -> float:
    """Return the length in mm of one unit of a file's affine: NIfTI may be in metres or microns.

    Raises:
        InputError: If the voxel size in the unit that the header names is implausible.
    """
    if file_ending(path) not in NIBABEL or not path.is_file():
        return 1.0
    image: Any = nib.load(path)
    code = int(image.header["xyzt_units"]) & 7 if isinstance(image, nib.Nifti1Pair) else 0
    unit = MILLIMETRES.get(code, 1.0)
    sizes = voxel_sizes(image.affine) * unit
    if unit != 1 and (sizes.min() < LEAST_VOXEL or sizes.max() > LARGEST_VOXEL):
        raise InputError(
            f"{path} has voxels of {'x'.join(f'{size:.4g}' for size in sizes)} mm by the unit in its header "
            "(xyzt_units): correct the unit, or the voxel size"
        )
    return unit


def _check_nibabel(path: Path) -> None:
    image: Any = nib.load(path)
    if isinstance(image, nib.Nifti1Pair):
        _check_nifti(image, path)
    elif not isinstance(image, nib.MGHImage):
        raise InputError(f"{path} is in ANALYZE format, which does not say where its axes point: convert it to NIfTI")
    dtype = image.header.get_data_dtype()
    if dtype.fields or dtype.kind == "c":
        kind = "colours (RGB)" if dtype.fields else "complex numbers"
        raise InputError(f"{path} holds {kind}: expected one real value for each voxel")
    check_affine(image.affine, path)
    if isinstance(image, nib.Nifti1Pair):
        check_forms(image.header, image.shape, path)
    check_size(image.shape, path)
    # a reader would first allocate the memory that the header requires, and then find that the file is shorter
    voxels = Path(image.file_map["image"].filename)
    expected = image.dataobj.offset + math.prod(image.shape) * dtype.itemsize
    is_packed = voxels.suffix.lower() in (".gz", ".mgz")
    found = _unpacked(voxels, expected + SLACK) if is_packed else voxels.stat().st_size
    if found < expected:
        raise InputError(
            f"{path} cannot be read as a scan (it is cut short: {found} bytes, {expected} by its header): export or "
            "copy it again"
        )


def _check_nifti(image: Any, path: Path) -> None:
    file_map = image.file_map
    with file_map["header" if "header" in file_map else "image"].get_prepare_fileobj() as file:
        raw = type(image.header).from_fileobj(file, check=False)  # the check would change a voxel size of 0 to 1 mm
    sizes = raw["pixdim"][1 : 1 + min(len(image.shape), 3)]
    if raw["sform_code"] == 0 and not np.all(np.abs(sizes) > 0):
        raise InputError(f"{path} has voxels of size {tuple(sizes.tolist())} mm: correct its header")


def _unpacked(path: Path, limit: int) -> int:
    """Return the unpacked size in bytes of a file; it is read to its checksum at the end, which nibabel ignores."""
    size = 0
    with gzip.open(path) as file:
        while piece := file.read(1 << 20):
            size += len(piece)
            if size > limit:
                raise InputError(f"{path} unpacks to more than its header says: export or copy it again")
    return size


def _check_data_file(path: Path) -> None:
    """Raise `InputError` for a header that would make its reader open anything but a file beside it."""
    with open(path, "rb") as file:
        header = file.read(LONGEST_HEADER)
    if header.startswith(b"NRRD"):
        header, end, _ = header.replace(b"\r", b"").partition(b"\n\n")
        found = DATA_FILE.findall(header)
        known = bool(end or found)
    else:
        found = DATA_FILE.findall(header)[:1]
        known = bool(found)
    if not known:
        raise InputError(f"{path} cannot be read as a scan (its header does not end): export or copy it again")
    for name in (value.decode(errors="replace").strip() for value in found):
        beside = name == Path(name).name and not name.startswith("LIST") and "%" not in name
        if name.upper() != "LOCAL" and not beside:
            raise InputError(f"{path} takes its voxels from {name!r}: they must be in it, or in one file beside it")


def check_size(shape: Sequence[int], path: Path) -> None:
    """Raise `InputError` for more voxels than are accepted for a scan."""
    if math.prod(max(1, length) for length in shape) > MOST_VOXELS:
        raise InputError(f"{path} has too many voxels, {tuple(shape)}: resample it to at most {MOST_VOXELS}")


def import_itk(path: Path) -> ModuleType:
    """Import ITK, which is optional, to read or write a file.

    Raises:
        InputError: If it is not installed.
    """
    try:
        import itk
    except ImportError as error:
        raise InputError(f"reading and writing {path} needs ITK: pip install itk") from error
    return itk
