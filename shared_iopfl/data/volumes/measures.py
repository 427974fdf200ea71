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
"""Physical sizes in volumes: a field of view in millimetres, and the volume of a mask in millilitres."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, ResizeWithPadOrCrop
from nibabel.affines import voxel_sizes
from torch import Tensor

from shared_iopfl.data.masks import EachKey
from shared_iopfl.utils.errors import InputError, warn_once


def spacing_mm(scan: Tensor) -> list[float] | None:
    """Return the voxel size in mm; None without an affine, and for exactly 1 mm in all directions, a placeholder."""
    if not isinstance(scan, MetaTensor):
        return None
    spacing = [float(size) for size in scan.pixdim]
    return None if all(abs(size - 1) < 1e-6 for size in spacing) else spacing


def volume_ml(mask: Tensor) -> float:
    """Return the volume of the voxels with values of at least 1 in a mask, in ml (1000 mm³).

    Args:
        mask: Mask (X, Y, Z), possibly with further axes of length 1 before them; its affine, in mm, gives the voxel
            size.

    Returns:
        The volume; NaN if the mask has no affine, or one of exactly 1 mm in all directions (see `spacing_mm`).
    """
    if not isinstance(mask, MetaTensor):
        return math.nan
    if spacing_mm(mask) is None:
        warn_once("voxels of exactly 1 mm in all directions count as a placeholder: no volume in ml is given")
        return math.nan
    return float(torch.count_nonzero(mask >= 1)) * float(torch.linalg.det(mask.affine[:3, :3].double()).abs()) / 1000


class FieldOfView(ResizeWithPadOrCrop):
    """Crop or pad the first two axes of a volume around their middle to a side in millimetres.

    If they are then resized to a fixed number of pixels, all scans have the same pixel size, whatever their field of
    view. Padding has the lowest value of the volume.

    Args:
        side: Side in millimetres.
    """

    def __init__(self, side: float) -> None:
        super().__init__((-1, -1, -1))
        self.side = side

    def __call__(  # type: ignore[override]
        self, img: torch.Tensor, mode: str | None = None, lazy: bool | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Return the volume (C, X, Y, Z) with X and Y cropped or padded.

        Raises:
            InputError: If the image has no affine.
        """
        if not isinstance(img, MetaTensor):
            raise InputError("field_of_view needs images with an affine, which gives the size of a pixel: set it to 0.")
        # the inverse finds the applied operations by these objects, which therefore are the same for each scan
        size = [max(1, round(self.side / spacing)) for spacing in voxel_sizes(np.asarray(img.affine))[:2]] + [-1]
        self.padder.spatial_size = self.cropper.roi_size = size
        return super().__call__(img, mode, lazy, **{"value": float(img.min()), **kwargs})


class FieldOfViewd(EachKey, InvertibleTransform):
    """Dictionary-based `FieldOfView`; the inverse fills areas without a prediction with zeros.

    Args:
        keys: Keys of the volumes.
        args, kwargs: As in `FieldOfView`.
    """

    array_transform = FieldOfView

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Restore the field of view of the scan."""
        return {**data, **{key: self.transform.inverse(data[key]) for key in self.key_iterator(dict(data))}}
