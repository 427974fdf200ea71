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
"""Physical sizes in volumes: a field of view in millimetres, and the millilitres of a mask."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, ResizeWithPadOrCrop
from nibabel.affines import voxel_sizes
from torch import Tensor

from shared_iopfl.data.masks import EachKey
from shared_iopfl.utils.errors import InputError, warn_once


def spacing_mm(scan: Tensor) -> list[float] | None:
    """Voxel size in mm, or None where it is only nominal: no affine, or one that says exactly 1 mm each way."""
    if not isinstance(scan, MetaTensor):
        return None
    spacing = [float(size) for size in scan.pixdim]
    return None if all(abs(size - 1) < 1e-6 for size in spacing) else spacing


def volume_ml(mask: Tensor) -> float:
    """The size of what is 1 or larger in a mask, in ml (1000 mm³).

    Args:
        mask: (X, Y, Z), or with axes of length 1 before them; its affine, in mm, gives the voxel size.

    Returns:
        The size; NaN where the mask has no affine, or one of exactly 1 mm each way, see `spacing_mm`.
    """
    if not isinstance(mask, MetaTensor):
        return math.nan
    if spacing_mm(mask) is None:
        warn_once("voxels of exactly 1 mm in all directions are taken for a placeholder: no volume in ml is given")
        return math.nan
    return float(torch.count_nonzero(mask >= 1)) * float(torch.linalg.det(mask.affine[:3, :3].double()).abs()) / 1000


class FieldOfView(ResizeWithPadOrCrop):
    """Crop or pad the first two axes of a volume around their middle to a side in millimetres.

    Resized to a fixed number of pixels afterwards, every scan has the same pixel size, whatever its own field of view.
    Padding has the least value of the volume.

    Args:
        side: in millimetres.
    """

    def __init__(self, side: float) -> None:
        super().__init__((-1, -1, -1))
        self.side = side

    def __call__(  # type: ignore[override]
        self, img: torch.Tensor, mode: str | None = None, lazy: bool | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The volume (C, X, Y, Z) with other X and Y.

        Raises:
            InputError: for an image without an affine.
        """
        if not isinstance(img, MetaTensor):
            raise InputError("field_of_view needs images with an affine, which tells the size of a pixel: set it to 0.")
        # the same objects for each scan, as the inverse finds by them what was done
        size = [max(1, round(self.side / spacing)) for spacing in voxel_sizes(np.asarray(img.affine))[:2]] + [-1]
        self.padder.spatial_size = self.cropper.roi_size = size
        return super().__call__(img, mode, lazy, **{"value": float(img.min()), **kwargs})


class FieldOfViewd(EachKey, InvertibleTransform):
    """Dictionary-based `FieldOfView`; the inverse has zeros where nothing was predicted.

    Args:
        keys: keys of the volumes.
        side: in millimetres.
    """

    transform: FieldOfView

    def __init__(self, keys: KeysCollection, side: float) -> None:
        super().__init__(keys, FieldOfView(side))

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Back in the field of view of the scan."""
        return {**data, **{key: self.transform.inverse(data[key]) for key in self.key_iterator(dict(data))}}
