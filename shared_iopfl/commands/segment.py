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
"""Segmentation of one scan from Python: from a file, a volume or a picture in memory to its mask and routes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.spatialimages import SpatialImage

from shared_iopfl.commands.runs import run_config
from shared_iopfl.data.scan_files import find_scans
from shared_iopfl.data.scan_names import PICTURES, VOLUMES, file_ending
from shared_iopfl.data.volumes.geometry import check_affine
from shared_iopfl.evaluation.run.results import read_served
from shared_iopfl.utils.errors import InputError

CASE = "scan"


@dataclass(frozen=True)
class Segmentation:
    """The result of segmenting one scan.

    Attributes:
        mask: uint8, 0 is background. For a volume (X, Y, Z) in the axes of the given array or file; for a picture
            (height, width).
        affine: (4, 4), from voxel indices to RAS in mm; None for a picture.
        quality: Agreement between the masks of several views, from 0 to 1; None if the preset does not compute it.
        expected_dice: Dice to expect and the two ends of its interval; None if the models have no calibration.
        routes: Mean weight of each expert over the layers; empty for plain inference.
        measures: Measures of the mask, such as ``volume_ml``.
        reasons: Why the mask should be checked; empty if it was not flagged.
    """

    mask: np.ndarray
    affine: np.ndarray | None = None
    quality: float | None = None
    expected_dice: tuple[float, float, float] | None = None
    routes: Mapping[str, float] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)
    reasons: str = ""


def segment(
    task: str,
    scan: str | Path | np.ndarray | SpatialImage,
    affine: np.ndarray | None = None,
    amount: str = "quiet",
    **settings: Any,
) -> Segmentation:
    """Segment one scan with a bundle's inference config.

    Example::

        from shared_iopfl import segment

        result = segment("prostate", volume, affine)   # or segment("prostate", "exam.nii.gz")
        print(result.quality, result.routes, result.mask.sum())

    Args:
        task: A task such as "prostate" or "fundus", or the folder of a bundle.
        scan: A file, the folder of a DICOM series, a nibabel image, a volume (X, Y, Z), or an RGB picture (height,
            width, 3) of uint8 or of floats from 0 to 1.
        affine: Affine of a volume, (4, 4), from voxel indices to RAS in mm. Not needed for a nibabel image.
        amount: How much text is shown: "quiet", "usual" or "verbose".
        settings: Keys of the bundle's ``inference.json``, such as ``ckpt_dir`` or ``preset``.

    Returns:
        The mask with its quality and routes. An empty mask is not an error.

    Raises:
        InputError: If the scan cannot be read or segmented, a setting is not allowed, or the folder holds several
            scans.
    """
    with tempfile.TemporaryDirectory(prefix="iopfl_") as folder:
        out = Path(folder) / "masks"
        given = isinstance(scan, (str, Path))
        source = Path(scan) if given else _written(scan, affine, Path(folder))  # type: ignore[arg-type]
        if source.is_dir() and (count := len(find_scans(source))) > 1:
            raise InputError(f"{source} holds {count} scans: pass one of them, or run iopfl segment on the folder.")
        settings = {"overlays": False, "empty_masks": "allow", **settings}
        try:
            run_config(task, "inference", {**settings, "dataset_dir": str(source), "output_dir": str(out)}, amount)
        except InputError as error:
            if given:
                raise
            # the caller passed no file, so the message must not name the temporary one
            raise InputError(str(error).replace(str(source), "the scan").replace(source.name, "the scan")) from None
        (one,) = read_served(out)
        mask, mask_affine = _mask(next(path for path in sorted(out.iterdir()) if _is_mask(path)))
    return Segmentation(mask, mask_affine, one.quality, one.expected_dice, one.routes, one.measures, one.reasons)


def _written(scan: Any, affine: np.ndarray | None, folder: Path) -> Path:
    """Write a scan in memory to a file, which the bundle then reads and checks like any other."""
    import nibabel as nib

    is_image = isinstance(scan, SpatialImage)
    array = np.asarray(scan.dataobj if is_image else scan)
    affine = scan.affine if is_image and affine is None else affine
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.number):
        raise InputError(
            f"a scan must be numbers, (X, Y, Z) or (height, width, 3), but this is {array.dtype} {array.shape}."
        )
    if affine is None:
        from PIL import Image

        path = folder / f"{CASE}.png"
        Image.fromarray(_as_picture(array)).save(path)
        return path
    if np.shape(affine) != (4, 4):
        raise InputError(f"the affine must have the shape (4, 4), but it has {np.shape(affine)}.")
    affine = np.asarray(affine, dtype=np.float64)
    check_affine(affine, Path("the scan"))
    image: Any = nib.Nifti1Image(array.astype(np.float32), affine)
    if isinstance(scan, nib.Nifti1Pair):
        image.header["xyzt_units"] = scan.header["xyzt_units"]
    path = folder / f"{CASE}.nii"
    nib.save(image, path)
    return path


def _as_picture(array: np.ndarray) -> np.ndarray:
    """An RGB picture in memory as uint8."""
    if array.shape[-1] == 3 and array.dtype == np.uint8:
        return array
    if array.shape[-1] == 3 and np.issubdtype(array.dtype, np.floating) and array.min() >= 0 and array.max() <= 1:
        return (array * 255).round().astype(np.uint8)
    raise InputError(
        "a volume needs its affine, segment(task, volume, affine), and a picture is (height, width, 3), of uint8 or of "
        f"floats from 0 to 1, but this is {array.dtype} {array.shape}."
    )


def _is_mask(path: Path) -> bool:
    return path.is_file() and file_ending(path) in (*VOLUMES, *PICTURES)


def _mask(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    from PIL import Image

    from shared_iopfl.data.loading import LoadCased

    if file_ending(path) in PICTURES:
        with Image.open(path) as picture:
            return np.asarray(picture), None
    loaded = LoadCased("label", check_values=False)({"label": str(path)})["label"]
    return np.asarray(loaded[0], dtype=np.uint8), np.asarray(loaded.affine, dtype=np.float64)
