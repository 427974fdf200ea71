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
"""DICOM series, from a folder or a file, in the grid that their slices define.

ITK's own reader of series takes one series of several, skips files that it cannot read, and invents a grid if the
slices have no position. Here each of these cases is an error; the voxels are read by ITK.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from monai.data import ITKReader
from monai.utils import ensure_tuple

from shared_iopfl.data.scan_names import entries, is_dicom
from shared_iopfl.data.volumes.dicom_headers import is_no_image
from shared_iopfl.data.volumes.headers import check_size, import_itk
from shared_iopfl.utils.errors import InputError

logger = logging.getLogger(__name__)
SERIES, SAMPLES, FRAMES = "0020|000e", "0028|0002", "0028|0008"
SIZE = ("0028|0010", "0028|0011")
POSITION, ORIENTATION, PIXELS = "0020|0032", "0020|0037", "0028|0030"
PLACE = {POSITION: "image position", ORIENTATION: "image orientation", PIXELS: "pixel spacing"}
TURNED = 0.01  # by which a direction cosine may differ from slice to slice
UNEVEN = 0.1  # by which a gap between slices may differ from the others, relative


class _Slice(NamedTuple):
    """The position of a slice as its file states it, in mm and DICOM's axes (LPS)."""

    file: Path
    size: tuple[str, ...]
    position: np.ndarray
    across: np.ndarray  # direction of a row and of a column, (2, 3)
    pixels: np.ndarray


class DicomReader(ITKReader):
    """Reads a DICOM file, or a folder that holds one whole series; see this module for what is refused.

    Reports, key objects, presentation states and the like among the slices are passed over, with a warning that names
    them. Slices are put in the order of their places, whatever their names and numbers.

    Raises:
        InputError: (by `read`) when the files are not one volume whose place is known.
    """

    def read(self, data: Any, **kwargs: Any) -> Any:
        """Open the series of a folder, or the one that a file belongs to."""
        path = Path(ensure_tuple(data)[0])
        itk = import_itk(path)
        files = _images(path) if path.is_dir() else [path]
        found = {file: _tags(itk, file) for file in files}
        broken = [file for file in files if found[file] is None]
        if broken and path.is_dir():
            raise InputError(
                f"{path} has {len(broken)} slices that cannot be read, {broken[0].name} first: copy it again"
            )
        if broken:
            raise InputError(f"{path} cannot be read as a scan (no DICOM image): export or copy it again")
        tags = {file: of_file for file, of_file in found.items() if of_file is not None}
        if (count := len({tags[file][SERIES] for file in files})) > 1:
            raise InputError(f"{path} holds {count} DICOM series: put each into a folder of its own")
        if any(int(tags[file][SAMPLES] or 1) > 1 for file in files):
            raise InputError(f"{path} holds colours (RGB): expected one value for each voxel")
        frames = [file for file in files if int(tags[file][FRAMES] or 1) > 1]
        if frames and len(files) > 1:
            raise InputError(
                f"{path} holds {len(files)} files, of which {frames[0].name} alone is a volume: divide them"
            )
        if frames:
            if not tags[frames[0]]["placed"]:
                raise InputError(
                    f"{path} does not say where its frames lie (no position, no orientation): export it again"
                )
        else:
            files = _in_order(path, [_slice(path, file, tags[file]) for file in files])
            if path.is_file() and tags[path][SERIES]:
                _check_alone(itk, path, tags[path][SERIES])
        counts = [int(tags[files[0]][tag] or 1) for tag in (*SIZE, FRAMES)]
        check_size([*counts, len(files)] if len(files) > 1 else counts, path)
        names = [str(file) for file in files]
        # single precision: slices may differ in their rescaling, and the first one's type would cut the others' values
        return itk.imread(names[0] if len(names) == 1 else names, itk.F)


def _check_alone(itk: Any, file: Path, series: str) -> None:
    """Raise `InputError` for one slice of a series whose other slices lie beside it."""
    beside = [other for other in entries(file.parent) if other.is_file() and is_dicom(other) and not is_no_image(other)]
    count = sum((_tags(itk, other) or {}).get(SERIES) == series for other in beside)
    if count > 1:
        raise InputError(f"{file} is one of {count} slices of a DICOM series: give their folder, {file.parent}")


def _images(folder: Path) -> list[Path]:
    """The files of a folder that should hold slices."""
    files = sorted(folder.iterdir())
    if gone := [file.name for file in files if not file.exists()]:
        raise InputError(f"{folder} has a link that leads nowhere, {gone[0]}: copy it again")
    files = [file for file in files if file.is_file() and not file.name.startswith(".") and is_dicom(file)]
    if not files:
        raise InputError(f"{folder} holds no DICOM files")
    others = [file.name for file in files if is_no_image(file)]
    images = [file for file in files if file.name not in others]
    if not images:
        raise InputError(f"{folder} holds no DICOM images, only reports or the like ({others[0]})")
    if others:
        logger.warning("%s: %d DICOM objects without voxels are passed over, %s first", folder, len(others), others[0])
    return images


def _tags(itk: Any, file: Path) -> dict[str, Any] | None:
    """The tags that matter, "" where one is missing; None for a file that holds no picture that can be read."""
    io = itk.GDCMImageIO.New()
    io.SetFileName(str(file))
    try:
        io.ReadImageInformation()
    except RuntimeError:
        return None
    found = io.GetMetaDataDictionary()
    wanted = (SERIES, SAMPLES, FRAMES, *SIZE, *PLACE)
    tags: dict[str, Any] = {tag: str(found[tag]).strip() if found.HasKey(tag) else "" for tag in wanted}
    direction = np.array([io.GetDirection(axis) for axis in range(io.GetNumberOfDimensions())])
    origin = [io.GetOrigin(axis) for axis in range(io.GetNumberOfDimensions())]
    # files of several frames say it deep inside; where GDCM finds nothing, it puts them at 0 along the axes
    tags["placed"] = any(origin) or not np.array_equal(direction, np.eye(len(direction)))
    return tags


def _slice(path: Path, file: Path, tags: Mapping[str, Any]) -> _Slice:
    try:
        position, across, pixels = (np.array([float(value) for value in tags[tag].split("\\")]) for tag in PLACE)
        across = across.reshape(2, 3)
        upright = abs(float(np.linalg.norm(np.cross(*across))) - 1) < TURNED
        known = len(position) == 3 and len(pixels) == 2 and upright
        known = known and bool(np.isfinite([*position, *pixels]).all() and (pixels > 0).all())
    except ValueError:
        known = False
    if not known:
        missing = [name for tag, name in PLACE.items() if not tags[tag]]
        what = f"no {' and no '.join(missing)}" if missing else "its geometry tags are broken"
        raise InputError(f"{path} does not say where {file.name} lies ({what}): export it from the archive again")
    return _Slice(file, tuple(tags[tag] for tag in SIZE), position, across, pixels)


def _in_order(path: Path, slices: Sequence[_Slice]) -> list[Path]:
    """The files of one volume from its first slice to its last.

    Raises:
        InputError: when they do not make one volume.
    """
    first = slices[0]
    if any(not np.allclose(one.across, first.across, rtol=0, atol=TURNED) for one in slices):
        raise InputError(f"{path} holds slices of several directions, as a localizer does: give one direction's alone")
    if any(one.size != first.size or not np.allclose(one.pixels, first.pixels, rtol=UNEVEN / 10) for one in slices):
        raise InputError(f"{path} holds slices of several sizes: put those of each size into a folder of their own")
    along = np.cross(*first.across)
    place = np.array([one.position @ along for one in slices])
    order = np.argsort(place, kind="stable")
    gaps = np.diff(place[order])
    near = 0.01 * first.pixels.min()
    if len(gaps) and gaps.min() < near:
        at = int(gaps.argmin())
        names = [slices[order[index]].file.name for index in (at, at + 1)]
        raise InputError(
            f"{path} has two images at one place, {names[0]} and {names[1]}: put each phase, echo or repetition into a "
            "folder of its own"
        )
    if len(gaps) and np.abs(gaps - np.median(gaps)).max() > UNEVEN * np.median(gaps):
        apart = f"{gaps.min():.3g} to {gaps.max():.3g} mm apart"
        raise InputError(f"{path} has slices missing or unevenly spaced ({apart}): copy it again")
    aside = np.array([one.position - (one.position @ along) * along for one in slices])
    if np.ptp(aside, axis=0).max() > 0.5 * first.pixels.min():
        raise InputError(f"{path} has slices shifted against each other, as of a tilted gantry: resample it first")
    return [slices[index].file for index in order]
