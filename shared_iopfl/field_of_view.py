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
"""What a fundus camera saw: its round field of view in the dark of the picture."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

__all__ = ["field_of_view", "is_bordered", "is_reddish"]


def field_of_view(rgb: np.ndarray) -> np.ndarray:
    """The largest bright area without its holes: what the camera saw, without the dark around it."""
    bright = rgb.max(axis=-1)
    full = np.percentile(bright, 98)
    # scanned or brightened photographs have a grey border: what the darkest corner shows is no light yet
    black = min(*(np.percentile(corner, 98) for corner in _corners(bright)), 0.08 * full)
    inside = ndimage.binary_opening(bright > max(black + 0.05 * (full - black), 1e-6))
    areas, count = ndimage.label(inside)
    if count == 0:
        return inside
    largest = 1 + np.argmax(np.bincount(areas.ravel())[1:])
    return ndimage.binary_fill_holes(areas == largest)


def is_reddish(pixels: np.ndarray) -> bool:
    """Whether red is the strongest colour, as in every colour photograph of a fundus; grey ones get the doubt."""
    red, green, blue = pixels.mean(axis=0)
    return bool(red >= green and red >= blue)


def is_bordered(field: np.ndarray) -> bool:
    """Whether at least three corners lie outside the field; a crop next to the field's edge has two at most."""
    return sum(not corner.any() for corner in _corners(field)) >= 3


def _corners(picture: np.ndarray) -> list[np.ndarray]:
    n = max(1, min(picture.shape) // 40)
    return [picture[:n, :n], picture[:n, -n:], picture[-n:, :n], picture[-n:, -n:]]
