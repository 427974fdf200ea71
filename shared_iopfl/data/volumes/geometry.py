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
"""Affines: one affine for a scan, and a label in the grid of its image.

An affine is 4 x 4, from voxel indices to millimetres in RAS, as in nibabel and MONAI.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes

from shared_iopfl.utils.errors import InputError

logger = logging.getLogger(__name__)
SPACING = 0.01  # largest relative difference of two voxel sizes


def same_grid(first: Any, second: Any, shape: Sequence[int]) -> bool:
    """Return whether each corner of the volume moves by less than half a voxel from one affine to the other."""
    return _moved(first, second, shape) < 0.5


def _in_3d(affine: Any) -> np.ndarray:
    """Return an affine of any dimension as that of a volume, (4, 4) in double precision."""
    given, whole = np.asarray(affine, dtype=np.float64), np.eye(4)
    axes = min(len(given) - 1, 3)
    whole[:axes, :axes], whole[:axes, 3] = given[:axes, :axes], given[:axes, -1]
    return whole


def _moved(first: Any, second: Any, shape: Sequence[int]) -> float:
    """Return the largest displacement of a corner, in voxels of the first affine (their shortest side)."""
    a, b = (_in_3d(affine) for affine in (first, second))
    size = (*shape, 1, 1)[:3]
    corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)]) * (*(np.array(size) - 1), 1)
    return float(np.linalg.norm(corners @ (a - b).T, axis=1).max() / voxel_sizes(a).min())


def check_affine(affine: np.ndarray, path: Path) -> None:
    """Raise `InputError` for an affine that spans no volume."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not spacing.all() or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-6:
        rows = np.array2string(affine[:3], precision=3, separator=" ").replace("\n", "")
        raise InputError(f"{path} has a broken affine or voxel size ({rows}): correct its header")


def check_forms(header: Any, shape: Sequence[int], path: Path) -> None:
    """Check that a NIfTI file gives its voxels a single position.

    Its header can contain two affines, qform and sform. If both are set and differ, tools disagree about which of them
    counts: a mask would fit the scan in one viewer and be displaced in another.

    Args:
        header: Header of NIfTI-1 or NIfTI-2.
        shape: Shape of the volume.
        path: Path of the file, for the message.

    Raises:
        InputError: If qform and sform differ, or span no volume.
    """
    qform, sform = header.get_qform(coded=True)[0], header.get_sform(coded=True)[0]
    if qform is None and sform is None:
        logger.warning("%s does not say where its axes point (no qform, no sform): nibabel's convention is used", path)
    if qform is None or sform is None:
        return
    check_affine(qform, path)
    check_affine(sform, path)
    sizes = voxel_sizes(_in_3d(qform)), voxel_sizes(_in_3d(sform))
    if _moved(sform, qform, shape) > 1 or not np.allclose(*sizes, rtol=SPACING, atol=0):
        raise InputError(
            f"{path} lies in two places: its qform says {describe_grid(qform, shape)}, its sform "
            f"{describe_grid(sform, shape)}; set the wrong one to the values of the other"
        )


def in_grid_of(label: np.ndarray, label_affine: Any, image_affine: Any, shape: Sequence[int]) -> np.ndarray | None:
    """Return a mask's values in the grid of its image, or None if it covers another box in world coordinates.

    A mask that was saved with flipped or permuted axes, as viewers do, has the same voxels in another order; they are
    reordered, without interpolation.

    Args:
        label: The mask, with as many axes as `shape`.
        label_affine: Affine of the mask.
        image_affine: Affine of the image.
        shape: Shape of the image.
    """
    if label.ndim != 3 or len(shape) != 3:
        return label if tuple(label.shape) == tuple(shape) and same_grid(image_affine, label_affine, shape) else None
    orientation = nib.orientations.io_orientation(np.linalg.inv(image_affine) @ label_affine)
    turned = nib.orientations.apply_orientation(label, orientation)
    affine = np.asarray(label_affine) @ nib.orientations.inv_ornt_aff(orientation, label.shape)
    if tuple(turned.shape) != tuple(shape) or not same_grid(image_affine, affine, shape):
        return None
    return np.ascontiguousarray(turned)


def describe_grid(affine: Any, shape: Sequence[int]) -> str:
    """Describe a grid in a few words, such as ``18x20x4 voxels of 0.7x0.9x3 mm, axes LPS, from (5, -6, 7)``."""
    affine = _in_3d(affine)
    size = "x".join(str(length) for length in shape)
    if len(shape) == 2:
        return f"{size} pixels"
    spacing = "x".join(f"{length:.4g}" for length in voxel_sizes(affine))
    axes = "".join(axis or "?" for axis in nib.orientations.aff2axcodes(affine))
    origin = ", ".join(f"{place:.4g}" for place in affine[:3, 3])
    turned = nib.affines.obliquity(affine).max()
    oblique = f" turned by {np.degrees(turned):.1f} degrees" if turned > 1e-3 else ""
    return f"{size} voxels of {spacing} mm, axes {axes}{oblique}, from ({origin})"
