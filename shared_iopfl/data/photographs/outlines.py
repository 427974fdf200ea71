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
"""Smooth outlines of optic disc and cup: the projection of a mask onto nested star-convex shapes."""

from __future__ import annotations

import numpy as np
from monai.config import NdarrayOrTensor
from monai.transforms import Transform
from monai.utils import convert_data_type, convert_to_dst_type
from scipy import ndimage

from shared_iopfl.data.masks import EachKey

DIRECTIONS = 128  # rays from the centre
STEPS = 64  # samples of a ray within the radius of a circle of the same area
LENGTH = 3  # of a ray, in radii of that circle
ITERATIONS = 20  # of the reweighted fit
SCALE = 0.05  # deviation, relative to the mean radius, that halves the weight of a direction
ALIKE = 0.9  # least Dice of a target with its smooth shape


class SmoothOutlines(Transform):
    """Give each target of a coded mask a smooth outline, without the ragged parts that vessels and leaks cause.

    The outlines of an optic disc and cup are nearly ellipses. Seen from the centroid of a target, the outline is the
    radius r in each direction t: the length of the ray in this direction that is inside the target. It is replaced by

        f(t) = a_0 + sum over k = 1 .. harmonics of (a_k cos k t + b_k sin k t)

    with the least sum over the directions of ``log(1 + ((r - f) / s)^2)``, where s is 5 % of the mean radius. Unlike
    with least squares, a leak or a notch in some of the directions has little influence, whatever its length. The fit
    is that of iteratively reweighted least squares with Cauchy weights (Holland and Welsch 1977,
    https://doi.org/10.1080/03610927708827533). The result is star-convex, as are the shapes of Schmidt et al. 2018
    (https://arxiv.org/abs/1806.03535).

    Directions in which the edge of the picture cuts off the target are left out of the fit. A target whose Dice with
    the result is below 0.9, such as a crescent, is not of this kind and keeps its outline.

    Args:
        harmonics: Number of harmonics. One moves a circle, two turn it into about an ellipse, more follow details.
        data: (on call) Coded mask (1, X, Y) of `EncodeMask`: the value of a pixel is the number of nested targets that
            contain it, each of them one connected component.

    Returns:
        The mask with smooth outlines, of the same type and shape; an inner target is within the outer ones, and an
        empty target remains empty.
    """

    def __init__(self, harmonics: int = 2) -> None:
        angles = 2 * np.pi * np.arange(DIRECTIONS) / DIRECTIONS
        self.directions = np.stack([np.cos(angles), np.sin(angles)])
        waves = [wave(k * angles) for k in range(1, harmonics + 1) for wave in (np.cos, np.sin)]
        self.waves = np.stack([np.ones(DIRECTIONS), *waves], axis=1)

    def __call__(self, data: NdarrayOrTensor) -> NdarrayOrTensor:
        mask = convert_data_type(data, np.ndarray)[0][0]
        smooth = np.zeros_like(mask)
        inside = np.ones(mask.shape, dtype=bool)
        for value in range(1, int(mask.max()) + 1):
            inside &= self._star(mask >= value)
            smooth[inside] = value
        return convert_to_dst_type(smooth[None], data)[0]

    def _star(self, target: np.ndarray) -> np.ndarray:
        """Return the star-convex shape of a target (X, Y)."""
        if not target.any():
            return target
        center = np.asarray(ndimage.center_of_mass(target))
        radii = self._fit(target, center)
        low = np.maximum(center - radii.max(), 0).astype(int)
        high = np.minimum(center + radii.max() + 2, target.shape).astype(int)
        window = tuple(map(slice, low, high))
        x, y = np.ogrid[window]
        x, y = x - center[0], y - center[1]
        directions = np.arctan2(y, x) % (2 * np.pi) * DIRECTIONS / (2 * np.pi)
        star = np.zeros_like(target)
        star[window] = np.hypot(x, y) <= np.interp(directions, np.arange(DIRECTIONS + 1), np.append(radii, radii[0]))
        alike = 2 * (star & target).sum() >= ALIKE * (star.sum() + target.sum())
        return star if alike else target

    def _fit(self, target: np.ndarray, center: np.ndarray) -> np.ndarray:
        """Return the smooth radius in each direction, in pixels."""
        step = np.sqrt(target.sum() / np.pi) / STEPS
        along = step * (np.arange(LENGTH * STEPS) + 0.5)
        points = center[:, None, None] + self.directions[:, :, None] * along
        radii = step * ndimage.map_coordinates(target.astype(np.float32), points, order=1).sum(axis=1)
        ends = center[:, None] + self.directions * (radii + 2)
        in_picture = (ends >= 0) & (ends < np.reshape(target.shape, (2, 1)))
        seen = in_picture.all(axis=0)  # directions that the edge of the picture does not cut off
        weights = seen.astype(float)
        for _ in range(ITERATIONS):
            root = np.sqrt(weights)
            fitted = self.waves @ np.linalg.lstsq(self.waves * root[:, None], radii * root, rcond=None)[0]
            weights = seen / (1 + ((radii - fitted) / (SCALE * radii.mean())) ** 2)
        return np.maximum(fitted, 0)


class SmoothOutlinesd(EachKey):
    """Dictionary-based `SmoothOutlines` with the same further arguments."""

    array_transform = SmoothOutlines
