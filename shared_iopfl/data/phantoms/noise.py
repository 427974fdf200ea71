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
"""Smooth random fields for the synthetic images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import zoom


def smooth_noise(random_state: np.random.RandomState, shape: Sequence[int], cells: Sequence[int]) -> np.ndarray:
    """Return a smooth random field around 0, with most values between -1 and 1.

    Args:
        random_state: Source of the random numbers.
        shape: Shape of the field.
        cells: Number of independent values along each axis; fewer values give a smoother field.
    """
    field = random_state.uniform(-1, 1, cells).astype(np.float32)
    for n, c in zip(shape, cells):  # products with the spline's weights along each axis are much faster than one zoom
        weights = zoom(np.eye(c, dtype=np.float32), (n / c, 1), order=3, mode="nearest", grid_mode=True)
        field = np.tensordot(field, weights, axes=(0, 1))
    return field
