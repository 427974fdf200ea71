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
"""The round field of view of a fundus photograph."""

from __future__ import annotations

import numpy as np
from scipy import ndimage


def field_of_view(rgb: np.ndarray) -> np.ndarray:
    """Return the largest bright area without its holes: the part of the picture that is not the dark border.

    Args:
        rgb: Picture (H, W, 3).

    Returns:
        The area as bool (H, W); empty if nothing is bright.
    """
    bright = rgb.max(axis=-1)
    full = np.percentile(bright, 98)
    # scanned or brightened photographs have a grey border: the darkest corner shows the level without light
    black = min(*(np.percentile(corner, 98) for corner in _corners(bright)), 0.08 * full)
    inside = ndimage.binary_opening(bright > max(black + 0.05 * (full - black), 1e-6))
    areas, count = ndimage.label(inside)
    if count == 0:
        return inside
    largest = 1 + np.argmax(np.bincount(areas.ravel())[1:])
    return ndimage.binary_fill_holes(areas == largest)


def is_reddish(pixels: np.ndarray) -> bool:
    """Return whether no channel is stronger than red, as in every colour photograph of a fundus; grey ones pass."""
    red, green, blue = pixels.mean(axis=0)
    return bool(red >= green and red >= blue)


def is_bordered(field: np.ndarray) -> bool:
    """Return whether at least three corners are outside the field; of a crop at the field's edge, at most two are."""
    return sum(not corner.any() for corner in _corners(field)) >= 3


def _corners(picture: np.ndarray) -> list[np.ndarray]:
    n = max(1, min(picture.shape) // 40)
    return [picture[:n, :n], picture[:n, -n:], picture[-n:, :n], picture[-n:, -n:]]


def count_fields(rgb: np.ndarray) -> int:
    """Return the number of fields of view, or of pictures side by side, that dark areas separate; at least 1."""
    bright = rgb.max(axis=-1)
    full = np.percentile(bright, 98)
    areas, _ = ndimage.label(ndimage.binary_opening(bright > max(0.1 * full, 1e-6)))
    sizes = np.bincount(areas.ravel())[1:]
    return max(1, int((sizes > max(0.1 * bright.size, 0.4 * sizes.max(initial=0))).sum()))


def stretch(field: np.ndarray) -> float:
    """Return the ratio of width to height of the circle whose rim a field of view shows; 1 if pixels are square.

    Cameras crop their circle above and below, or at both sides, so only the remaining rim is used. The result is NaN if
    too little of it remains, or if it is not part of a circle or an ellipse.
    """
    wide = _stretch(field)
    return wide if np.isfinite(wide) else 1 / _stretch(field.T)


def _stretch(field: np.ndarray) -> float:
    rows = np.flatnonzero(field.any(axis=1))
    rows = rows[len(rows) // 20 : len(rows) - len(rows) // 20]  # errors are largest in the first and last rows
    first, last = field[rows].argmax(axis=1), field.shape[1] - 1 - field[rows][:, ::-1].argmax(axis=1)
    rim = (first > 1) & (last < field.shape[1] - 2)
    if rim.sum() < max(16, len(rows) // 2):
        return float("nan")
    # in an ellipse, the square of half the length of a row is linear in the square of its distance from the middle
    height, half = (rows - rows.mean())[rim], ((last - first + 1) / 2)[rim]
    fall, tilt, top = np.polyfit(height, half**2, 2)
    off = np.abs(np.sqrt(np.maximum(fall * height**2 + tilt * height + top, 0)) - half)
    return float(np.sqrt(-fall)) if fall < 0 and np.percentile(off, 90) < 0.04 * half.max() else float("nan")
