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
"""Measures of a mask in a volume, such as its size in millilitres."""

from __future__ import annotations

import math

import torch
from monai.data import MetaTensor
from torch import Tensor

__all__ = ["volume_ml"]


def volume_ml(mask: Tensor) -> float:
    """The size of what is 1 or larger in a mask, in ml (1000 mm³).

    Args:
        mask: (X, Y, Z), or with axes of length 1 before them; its affine, in mm, gives the voxel size.

    Returns:
        The size; NaN where the mask has no affine.
    """
    if not isinstance(mask, MetaTensor):
        return math.nan
    return float(torch.count_nonzero(mask >= 1)) * float(torch.linalg.det(mask.affine[:3, :3].double()).abs()) / 1000
