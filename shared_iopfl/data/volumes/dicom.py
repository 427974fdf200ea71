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
"""Reader of DICOM series, from a folder or a file, in the grid that their slices define.

ITK's reader of series selects one of several series, skips files that it cannot read, and makes up a grid if the slices
have no position. Here these cases are errors; the voxels are read by ITK.
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
from shared_iopfl.data.volumes.dicom_headers import is_no_image, open_header, tag_of
from shared_iopfl.data.volumes.headers import check_size, import_itk
from shared_iopfl.utils.errors import InputError

logger = logging.getLogger(__name__)
SERIES, SAMPLES, FRAMES = "0020|000e", "0028|0002", "0028|0008"
SIZE = ("0028|0010", "0028|0011")
POSITION, ORIENTATION, PIXELS = "0020|0032", "0020|0037", "0028|0030"
PLACE = {POSITION: "image position", ORIENTATION: "image orientation", PIXELS: "pixel spacing"}
TURNED = 0.01  # largest difference of a direction cosine between slices
UNEVEN = 0.1  # largest relative difference of a gap between slices from the median gap


class _Slice(NamedTuple):
    """Size and position of a slice as stated in its file, in mm and DICOM's axes (LPS)."""

    file: Path
    size: tuple[str, ...]
    position: np.ndarray
    across: np.ndarray  # directions of a row and of a column, (2, 3)
    pixels: np.ndarray


class DicomReader(ITKReader):
    """Reader of a DICOM file, or of a folder with one complete series; the module lists what is rejected.

    Reports, key objects, presentation states and the like among the slices are ignored, with a warning that names the
    first. Slices are sorted by position, whatever their names and numbers.

    Raises:
        InputError: (by `read`) If the files are not one volume with a known position.
    """

    def read(self, data: Any, **kwargs: Any) -> Any:
        """Open the series in a folder, or a DICOM file."""
        path = Path(ensure_tuple(data)[0])
        files = _images(path) if path.is_dir() else [path]
        tags = {file: found for file in files if (found := _tags(file)) is not None}
        broken = [file for file in files if file not in tags]
        if broken and path.is_dir():
            raise InputError(
                f"{path} has {len(broken)} slices that cannot be read, {broken[0].name} first: copy it again"
            )
        if broken:
            raise InputError(f"{path} cannot be read as a scan (no DICOM image): export or copy it again")
        if (count := len({tags[file][SERIES] for file in files})) > 1:
            raise InputError(f"{path} holds {count} DICOM series: put each into a folder of its own")
        if any(int(tags[file][SAMPLES] or 1) > 1 for file in files):
            raise InputError(f"{path} holds colours (RGB): expected one value for each voxel")
        frames = [file for file in files if int(tags[file][FRAMES] or 1) > 1]
        if frames and len(files) > 1:
            raise InputError(
                f"{path} holds {len(files)} files, of which {frames[0].name} is itself a volume: move it elsewhere"
            )
        if not frames:
            files = _in_order(path, [_slice(path, file, tags[file]) for file in files])
            if path.is_file() and tags[path][SERIES]:
                _check_alone(path, tags[path][SERIES])
        elif not tags[frames[0]]["placed"]:
            raise InputError(f"{path} does not say where its frames lie (no position, no orientation): export it again")
        counts = [int(tags[files[0]][tag] or 1) for tag in (*SIZE, FRAMES)]
        check_size([*counts, len(files)] if len(files) > 1 else counts, path)
        names = [str(file) for file in files]
        itk = import_itk(path)
        # single precision: slices may differ in their rescaling, and the type of the first may not hold other values
        return itk.imread(names[0] if len(names) == 1 else names, itk.F)


def _check_alone(file: Path, series: str) -> None:
    """Raise `InputError` for a single slice of a series whose other slices are in the same folder."""
    beside = [other for other in entries(file.parent) if other.is_file() and is_dicom(other) and not is_no_image(other)]
    count = sum((_tags(other) or {}).get(SERIES) == series for other in beside)
    if count > 1:
        raise InputError(f"{file} is one of {count} slices of a DICOM series: give their folder, {file.parent}")


def _images(folder: Path) -> list[Path]:
    """Return the DICOM files of a folder that hold images."""
    files = sorted(folder.iterdir())
    if gone := [file.name for file in files if not file.exists()]:
        raise InputError(f"{folder} has a link that leads nowhere, {gone[0]}: copy it again")
    files = [file for file in files if file.is_file() and not file.name.startswith(".") and is_dicom(file)]
    if not files:
        raise InputError(f"{folder} holds no DICOM files: give a folder of slices")
    others = [file.name for file in files if is_no_image(file)]
    images = [file for file in files if file.name not in others]
    if not images:
        raise InputError(
            f"{folder} holds no DICOM images, only reports or the like ({others[0]}): give a folder of slices"
        )
    if others:
        logger.warning("%s: %d DICOM objects without voxels are ignored, %s first", folder, len(others), others[0])
    return images


def _tags(file: Path) -> dict[str, Any] | None:
    """Return tags of a slice, "" if missing, and "placed", whether frames have a position; None if it is no image."""
    try:
        io = open_header(file)
    except RuntimeError:
        return None
    tags: dict[str, Any] = {tag: tag_of(io, tag) for tag in (SERIES, SAMPLES, FRAMES, *SIZE, *PLACE)}
    axes = range(io.GetNumberOfDimensions())
    direction = np.array([io.GetDirection(axis) for axis in axes])
    # in a file of several frames the position is in nested tags; if GDCM finds none, it returns 0 and the identity
    tags["placed"] = any(io.GetOrigin(axis) for axis in axes) or not np.array_equal(direction, np.eye(len(axes)))
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
    """Return the files of a volume from its first slice to its last.

    Raises:
        InputError: If they are not one volume.
    """
    first = slices[0]
    if any(not np.allclose(one.across, first.across, rtol=0, atol=TURNED) for one in slices):
        raise InputError(f"{path} holds slices of several directions, as a localizer does: give only one direction")
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
        raise InputError(f"{path} has slices shifted against each other, as with a tilted gantry: resample it first")
    return [slices[index].file for index in order]
