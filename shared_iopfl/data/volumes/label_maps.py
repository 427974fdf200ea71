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
"""Recognition of label maps by their values, which are a few small integers."""

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
ROUNDING = 1e-3  # largest difference of a label from a whole number
LEAST_PACKED = 0.25  # bytes per voxel of a compressed scan, at least; a compressed mask has a tenth of it


def is_label_map(path: Path) -> bool:
    """Return whether a volume contains at least two and at most eight values, all of them whole numbers from 0 to 255.

    For most scans the middle slice, or the size of a compressed file, is enough to exclude that. A file that cannot be
    read is not a label map; reading it as a scan will report the error.
    """
    values = np.empty(0)
    try:
        for part in _parts(path):
            values = np.union1d(values, np.unique(part))
            whole = values.round()
            labels = (whole >= 0) & (whole <= LARGEST_LABEL) & (np.abs(values - whole) <= ROUNDING)
            if len(values) > MOST_LABELS or not labels.all():
                return False
    except Exception:  # the readers' libraries raise many kinds
        return False
    return len(values) > 1


def _parts(path: Path) -> Iterator[np.ndarray]:
    """Yield the voxels, at first only a few of them."""
    if file_ending(path) not in NIBABEL:
        check_header(path)
        itk = import_itk(path)
        yield itk.array_view_from_image(itk.imread(str(path)))
        return
    image: Any = nib.load(path)
    voxels = math.prod(image.shape)
    if path.suffix.lower() in (".gz", ".mgz") and path.stat().st_size > 2**12 + LEAST_PACKED * voxels:
        raise ValueError("too large for a mask")
    check_header(path)  # it also rejects files that would fill the memory
    if voxels:
        yield np.asanyarray(image.dataobj[..., image.shape[-1] // 2])
        yield np.asanyarray(image.dataobj)
