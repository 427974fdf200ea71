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
"""Affines: one for a scan, and a label in the grid of its image.

An affine is 4 x 4, from voxel indices to millimetres in RAS, as nibabel and MONAI have it.
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
SPACING = 0.01  # by which two voxel sizes may differ, relative


def same_grid(first: Any, second: Any, shape: Sequence[int]) -> bool:
    """Whether no corner of the volume moves by half a voxel or more from one affine to the other."""
    return _moved(first, second, shape) < 0.5


def _in_3d(affine: Any) -> np.ndarray:
    """An affine of any dimension as that of a volume, (4, 4) in double precision."""
    given, whole = np.asarray(affine, dtype=np.float64), np.eye(4)
    axes = min(len(given) - 1, 3)
    whole[:axes, :axes], whole[:axes, 3] = given[:axes, :axes], given[:axes, -1]
    return whole


def _moved(first: Any, second: Any, shape: Sequence[int]) -> float:
    """How far the corner that moves most is moved, in voxels of the first affine (their shortest side)."""
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
    """Raise `InputError` where a NIfTI file gives its voxels two places.

    Its header has room for two affines, qform and sform. Where both are set and differ, tools disagree about which of
    them counts: a mask would lie on the scan in one viewer and beside it in another.

    Args:
        header: of NIfTI-1 or NIfTI-2.
        shape: of the volume.
        path: for the message.
    """
    qform, sform = header.get_qform(coded=True)[0], header.get_sform(coded=True)[0]
    if qform is None and sform is None:
        logger.warning("%s does not say where its axes point (no qform, no sform): nibabel's convention is taken", path)
    if qform is None or sform is None:
        return
    check_affine(qform, path)
    check_affine(sform, path)
    sizes = voxel_sizes(_in_3d(qform)), voxel_sizes(_in_3d(sform))
    if _moved(sform, qform, shape) > 1 or not np.allclose(*sizes, rtol=SPACING, atol=0):
        raise InputError(
            f"{path} lies in two places: its qform says {describe_grid(qform, shape)}, its sform "
            f"{describe_grid(sform, shape)}; keep the one that is right and set the other to it"
        )


def in_grid_of(label: np.ndarray, label_affine: Any, image_affine: Any, shape: Sequence[int]) -> np.ndarray | None:
    """A mask's values in the grid of its image, or None where it fills another box of the world.

    A mask that was saved with its axes turned or in another order, as viewers do, has the same voxels in another
    order: these are put back, and none is interpolated.

    Args:
        label: the mask, as many axes as `shape`.
        label_affine: its affine.
        image_affine: its image's.
        shape: its image's.
    """
    if label.ndim != 3 or len(shape) != 3:
        return label if tuple(label.shape) == tuple(shape) and same_grid(image_affine, label_affine, shape) else None
    steps = np.linalg.inv(label_affine)[:3, :3] @ np.asarray(image_affine)[:3, :3]  # image's, in label's
    along = np.abs(steps).argmax(axis=0)  # for each axis of the image, the label's that runs along it
    if len(set(along.tolist())) < 3:
        return None
    image_axis = np.argsort(along)
    orientation = np.column_stack([image_axis, np.sign(steps[along, range(3)])[image_axis]])
    turned = nib.orientations.apply_orientation(label, orientation)
    affine = np.asarray(label_affine) @ nib.orientations.inv_ornt_aff(orientation, label.shape)
    if tuple(turned.shape) != tuple(shape) or not same_grid(image_affine, affine, shape):
        return None
    return np.ascontiguousarray(turned)


def describe_grid(affine: Any, shape: Sequence[int]) -> str:
    """A grid in a few words: ``18x20x4 voxels of 0.7x0.9x3 mm, axes LPS, from (5, -6, 7)``."""
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
