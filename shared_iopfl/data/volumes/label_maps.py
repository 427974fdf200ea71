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
"""Recognising label maps by their values: a few small integers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from shared_iopfl.data.scan_names import NIBABEL, file_ending
from shared_iopfl.data.volumes.headers import check_header, import_itk

MOST_LABELS = 8
LARGEST_LABEL = 255
ROUNDING = 1e-3
LEAST_PACKED = 0.25  # bytes a voxel to which a compressed scan shrinks, at least; a mask shrinks to a tenth of it


def is_label_map(path: Path) -> bool:
    """Whether a volume holds at least two and at most eight values, all of them whole numbers from 0 to 255.

    A scan is mostly ruled out by its middle slice, and a compressed one by the size of its file. A file that cannot be
    read is not a label map; reading it as a scan will report the error.
    """
    values: set[float] = set()
    try:
        for part in _parts(path):
            values |= set(np.unique(part).tolist())
            if len(values) > MOST_LABELS or not all(map(_is_label, values)):
                return False
    except Exception:  # readers raise whatever their libraries do
        return False
    return len(values) > 1


def _is_label(value: float) -> bool:
    return 0 <= round(value) <= LARGEST_LABEL and abs(value - round(value)) <= ROUNDING


def _parts(path: Path) -> Iterator[np.ndarray]:
    """The voxels, a little of them first."""
    if file_ending(path) in NIBABEL:
        image: Any = nib.load(path)
        if path.suffix.lower() in (".gz", ".mgz") and path.stat().st_size > 2**12 + LEAST_PACKED * math.prod(
            image.shape
        ):
            raise ValueError("too large for a mask")
        check_header(path)  # which also refuses what would fill the memory
        if math.prod(image.shape) == 0:
            return
        yield np.asanyarray(image.dataobj[..., image.shape[-1] // 2])
        yield np.asanyarray(image.dataobj)
    else:
        check_header(path)
        yield import_itk(path).array_view_from_image(import_itk(path).imread(str(path)))
