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
"""Search for the optic disc in a fundus photograph.

The method is classical and needs no training. In a reduced copy of the picture it

1. separates the field of view from the dark border; a border all round means a whole photograph;
2. removes structures that are not a disc: vessels by a closing, illumination and glow (anything wider than a disc) by
   an opening;
3. searches for discs that are brighter than the ring around them, over all positions and over the diameters that a disc
   can have relative to the field, by normalised convolution, so that the edge of the field has no influence;
4. ranks the best candidates by how clearly and how much disc and ring differ, how many dark vessels cross the disc, and
   whether vessels run towards it: bright exudates and reflections have no vessels, and vessels pass beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from monai.utils import convert_to_tensor
from scipy import fft, ndimage

from shared_iopfl.data.photographs.field_of_view import field_of_view, is_bordered, is_reddish

MOST_OBLONG = 4  # largest ratio of the sides of a fundus photograph
FIELD = 400  # side, in pixels, of the copy in which a whole field of view is searched
CROP = 160  # the same for a crop, in which discs and vessels then have about the same width in pixels
IN_FIELD = (0.09, 0.28)  # range of disc diameters relative to the field's, for cameras of 60 to 30 degrees
IN_CROP = (0.2, 1.0)  # the same relative to a crop's side
WHOLE_BELOW = 0.2  # a picture whose disc is smaller, relative to the shorter side, is a whole photograph
# Weights of the evidence in the logit of the confidence: rounded results of a logistic regression on public disc crops,
# which were placed in drawn photographs with exudates and glow. The weight of the size was set by hand.
IN_FIELD_WEIGHTS = {
    "clear": 1.0, "contrast": 0.4, "round": 4.0, "patchy": -0.5, "vessels": 0.8, "towards": 0.8, "size": -2.0,
    "bias": -6.2,
}  # fmt: skip
IN_CROP_WEIGHTS = {
    "clear": 0.8, "contrast": 0.5, "round": 0.3, "patchy": -0.3, "towards": 0.8, "off_middle": -16.0, "bias": -1.2
}  # fmt: skip
UNBORDERED = 2.5  # reduction of the logit of a small disc in a picture without a border, which usually is a crop
VESSEL_WIDTHS = (1.5, 2.5)  # pixels
CANDIDATES = 12


class Disc(NamedTuple):
    """An optic disc found in a picture.

    Attributes:
        center: Centre along the two spatial axes, in pixels.
        diameter: Diameter in pixels.
        confidence: Confidence from 0 to 1; below about 0.35 the picture may have no disc at all.
        whole: Whether the picture shows the whole fundus rather than a crop around the disc: it has a dark border in at
            least three corners, or a disc smaller than a fifth of its shorter side.
    """

    center: tuple[float, float]
    diameter: float
    confidence: float
    whole: bool


def find_disc(image: torch.Tensor | np.ndarray) -> Disc:
    """Find the optic disc in a colour fundus photograph, or in a crop of one.

    Args:
        image: Picture (3, W, H) or (3, H, W), RGB of any positive scale; (1, ...) is taken as grey.

    Returns:
        The most probable disc; its confidence is 0 for a picture that cannot be a fundus photograph.
    """
    picture: torch.Tensor = convert_to_tensor(image, dtype=torch.float32, track_meta=False).detach().cpu()
    if picture.ndim != 3 or picture.shape[0] not in (1, 3):
        raise ValueError(f"expected a picture (3, W, H) or (1, W, H), got {tuple(picture.shape)}")
    picture = picture.expand(3, -1, -1)
    shape = np.asarray(picture.shape[1:], dtype=float)
    nothing = Disc((float(shape[0]) / 2, float(shape[1]) / 2), 0.0, 0.0, True)
    if shape.max() > MOST_OBLONG * shape.min() or not torch.isfinite(picture).all():
        return nothing
    glance = _resize(picture, min(1.0, 256 / shape.max()))
    field = field_of_view(glance)
    if not field.any() or not is_reddish(glance[field]):
        return nothing
    bordered = is_bordered(field)
    lit = [
        slice(int(a.min() * z), int(np.ceil((a.max() + 1) * z))) for a, z in zip(field.nonzero(), shape / field.shape)
    ]
    seen = picture[:, lit[0], lit[1]]
    logit, row, column, diameter = _search(seen, FIELD / max(seen.shape[1:]), FIELD, IN_FIELD, IN_FIELD_WEIGHTS, True)
    row, column = row + lit[0].start, column + lit[1].start
    if not bordered:  # a crop, or a photograph in which the field of view reaches the corners
        as_crop = _search(picture, CROP / shape.min(), CROP, IN_CROP, IN_CROP_WEIGHTS, flatten=False)
        logit, row, column, diameter = max((logit - UNBORDERED, row, column, diameter), as_crop)
    if logit == -np.inf:
        return nothing
    confidence = float(1 / (1 + np.exp(-logit)))
    return Disc((row, column), diameter, confidence, bordered or diameter < WHOLE_BELOW * float(shape.min()))


def _resize(picture: torch.Tensor, zoom: float) -> np.ndarray:
    """Resize (3, A, B) to (a, b, 3) by area, which preserves thin vessels."""
    size = [max(8, round(n * zoom)) for n in picture.shape[1:]]
    mode = "area" if zoom <= 1 else "bilinear"
    return torch.nn.functional.interpolate(picture[None], size=size, mode=mode)[0].permute(1, 2, 0).numpy()


def _search(
    picture: torch.Tensor,
    zoom: float,
    extent: int,
    relative: tuple[float, float],
    weights: Mapping[str, float],
    flatten: bool,
) -> tuple[float, float, float, float]:
    """Return the best disc with a diameter in the range `relative` to the size `extent` of the zoomed picture.

    With `flatten`, whatever is bright over more than the width of a disc is removed first.

    Returns:
        Logit of the confidence (-inf if there is no candidate), row, column and diameter in the picture.
    """
    rgb = _resize(picture, zoom)
    field = field_of_view(rgb)
    inside = ndimage.binary_erosion(field, iterations=extent // 100)
    if inside.sum() < 64:
        return -np.inf, 0.0, 0.0, 0.0
    # logarithms, as a disc is brighter than its surroundings by a factor that does not depend on the illumination
    luminance = _logarithm(0.4 * rgb[..., 0] + 0.6 * rgb[..., 1], field)
    strength, angle = _vessels(_logarithm(rgb[..., 1], field))
    strength = np.where(inside, strength, 0)
    closed = ndimage.grey_closing(luminance, size=(9, 9), mode="nearest")  # without vessels
    bright = closed - _glow(closed, extent) if flatten else closed
    best: tuple[float, float, float, float] = (-np.inf, 0.0, 0.0, 0.0)
    for row, column, diameter in _candidates(bright, inside, extent * np.geomspace(*relative, 9)):
        evidence = _evidence(bright, closed - luminance, inside, strength, angle, row, column, diameter)
        evidence["size"] = (np.log(diameter / extent) - np.log(0.16)) ** 2
        evidence["off_middle"] = np.sum((np.array([row, column]) / inside.shape - 0.5) ** 2)
        evidence["bias"] = 1.0
        best = max(best, (float(sum(w * evidence[name] for name, w in weights.items())), row, column, diameter))
    logit, row, column, diameter = best
    row, column, diameter = _outline(bright, inside, row, column, diameter)
    scale = np.divide(picture.shape[1:], rgb.shape[:2])
    return logit, float((row + 0.5) * scale[0]), float((column + 0.5) * scale[1]), float(diameter * scale.mean())


def _logarithm(channel: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Return the log brightness relative to the field's median; outside the field, that of the nearest pixel inside."""
    inside = ndimage.binary_erosion(field, iterations=2)
    values = np.log(channel / max(float(np.median(channel[field])), 1e-6) + 0.1)
    if not inside.any() or inside.all():
        return values
    nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    return values[tuple(nearest)]


def _glow(bright: np.ndarray, extent: int) -> np.ndarray:
    """Return what is bright over more than the width of a disc."""
    wide = 2 * int(0.14 * extent / 4) + 1
    glow = ndimage.grey_opening(bright[::4, ::4], size=(wide, wide), mode="nearest")
    glow = ndimage.gaussian_filter(glow, wide / 6, mode="nearest")
    return ndimage.zoom(glow, np.divide(bright.shape, glow.shape), order=1, mode="nearest")


def _vessels(green: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return strength and direction (radians from the first axis, which skimage's filters lack) of dark ridges."""
    strength, angle = np.zeros_like(green), np.zeros_like(green)
    for width in VESSEL_WIDTHS:
        aa, ab, bb = (
            width**2 * ndimage.gaussian_filter(green, width, order=order) for order in ((2, 0), (1, 1), (0, 2))
        )
        half, mean = np.hypot((aa - bb) / 2, ab), (aa + bb) / 2
        ridge = np.maximum(mean + half - np.abs(mean - half), 0)  # curved across, straight along
        stronger = ridge > strength
        strength = np.where(stronger, ridge, strength)
        angle = np.where(stronger, 0.5 * np.arctan2(2 * ab, aa - bb) + np.pi / 2, angle)
    return strength, angle


def _candidates(bright: np.ndarray, inside: np.ndarray, diameters: np.ndarray) -> list[tuple[float, float, float]]:
    """Return row, column and diameter of the discs that differ most from the ring around them, at half resolution.

    scikit-image's `peak_local_max` has one minimum distance; here it grows with the diameter.
    """
    half = ndimage.uniform_filter(bright, 2)[::2, ::2]
    weight = inside[::2, ::2].astype(float)
    margin = int(0.95 * diameters.max() / 2) + 2
    shape = [fft.next_fast_len(n + margin, real=True) for n in half.shape]
    rows, columns = fft.fftfreq(shape[0], 1 / shape[0])[:, None], fft.fftfreq(shape[1], 1 / shape[1])[None]
    distance = np.hypot(rows, columns)
    spectra = [fft.rfft2(values, shape) for values in (weight, weight * half, weight * half**2)]

    def moments(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weight (relative to the kernel's), mean and variance under the kernel, at each pixel."""
        spectrum = fft.rfft2(kernel)
        n, first, second = (fft.irfft2(s * spectrum, shape)[: half.shape[0], : half.shape[1]] for s in spectra)
        mean = first / np.maximum(n, 1e-3)
        return n / kernel.sum(), mean, np.maximum(second / np.maximum(n, 1e-3) - mean**2, 0)

    def filled(radius: float) -> np.ndarray:
        return np.clip(radius + 0.5 - distance, 0, 1)

    maps = []
    for radius in diameters / 4:  # half a diameter, at half resolution
        n_in, mean_in, var_in = moments(filled(0.9 * radius))
        n_out, mean_out, var_out = moments(filled(1.8 * radius) - filled(1.15 * radius))
        clear = (mean_in - mean_out) / np.sqrt(0.3 * var_in + 0.7 * var_out + 1e-4)
        maps.append(np.where((n_in > 0.85) & (n_out > 0.35) & (weight > 0), clear, -np.inf))
    best, which = np.max(maps, axis=0), np.argmax(maps, axis=0)
    found = []
    grid = np.indices(half.shape)
    for _ in range(CANDIDATES):
        row, column = (int(i) for i in np.unravel_index(best.argmax(), best.shape))
        if best[row, column] <= 0:
            break
        diameter = diameters[which[row, column]]
        found.append((2 * row + 0.5, 2 * column + 0.5, float(diameter)))
        best[np.hypot(grid[0] - row, grid[1] - column) < 0.25 * diameter] = -np.inf
    return found


def _evidence(
    bright: np.ndarray,
    filled: np.ndarray,
    inside: np.ndarray,
    strength: np.ndarray,
    angle: np.ndarray,
    row: float,
    column: float,
    diameter: float,
) -> dict[str, float]:
    """Return the evidence for a candidate, with a name for each entry of the weights.

    Args:
        bright: Log brightness without vessels and glow, (H, W).
        filled: Increase of each pixel by the closing of vessels, (H, W).
        inside: Field of view, (H, W).
        strength, angle: Strength and direction of vessels, (H, W).
        row, column, diameter: Centre and diameter of the candidate, in pixels.
    """
    radius = diameter / 2
    first = [max(int(c - 2.5 * radius), 0) for c in (row, column)]
    window = tuple(slice(a, int(c + 2.5 * radius) + 2) for a, c in zip(first, (row, column)))
    everywhere = strength.sum() / max(np.count_nonzero(strength), 1) + 1e-6
    bright, filled, inside, strength, angle = (a[window] for a in (bright, filled, inside, strength, angle))
    grid = np.indices(bright.shape)
    down, right = grid[0] + first[0] - row, grid[1] + first[1] - column
    distance = np.hypot(down, right)
    disc, ring = inside & (distance < 0.9 * radius), inside & (distance > 1.15 * radius) & (distance < 1.8 * radius)
    around = inside & (distance > 0.5 * radius) & (distance < 2.5 * radius)
    level_in, level_out = np.median(bright[disc]), np.median(bright[ring])
    contrast = level_in - level_out
    # for each of twelve sectors, whether it is bright inside and dark outside
    sector = ((np.arctan2(down, right) / np.pi + 1) * 6).astype(int) % 12
    middle = (level_in + level_out) / 2
    full = [np.median(bright[part]) > middle for k in range(12) if (part := disc & (sector == k)).any()]
    clear_of = [np.median(bright[part]) < middle for k in range(12) if (part := ring & (sector == k)).any()]
    density = strength[inside & (distance < 1.2 * radius)].mean() / everywhere
    # 1 where vessels run towards the centre, -1 where they run at right angles to that, 0 on average
    radial = (np.cos(angle) * down + np.sin(angle) * right) / np.maximum(distance, 1e-6)
    return {
        "clear": min(contrast / np.sqrt(0.3 * bright[disc].var() + 0.7 * bright[ring].var() + 1e-4), 5.0),
        "contrast": np.log(np.clip(contrast, 0.01, 2)),
        "round": np.mean(full) * np.mean(clear_of),
        "patchy": np.log(np.clip(filled[disc].mean() / max(contrast, 0.01), 0.03, 1)),
        "vessels": np.log(np.clip(density, 0.2, 5)),
        "towards": np.average((2 * radial**2 - 1)[around], weights=strength[around] + 1e-9),
    }


def _outline(
    bright: np.ndarray, inside: np.ndarray, row: float, column: float, diameter: float
) -> tuple[float, float, float]:
    """Return centre and diameter of the bright area at a candidate, which may be only the brightest part, the cup."""
    radius = diameter / 2
    distance = np.hypot(np.arange(bright.shape[0])[:, None] - row, np.arange(bright.shape[1])[None] - column)
    beyond, disc = inside & (distance > 1.7 * radius) & (distance < 2.5 * radius), inside & (distance < 0.9 * radius)
    if not beyond.any() or not disc.any():
        return row, column, diameter
    level = np.median(bright[beyond]) + 0.4 * (np.median(bright[disc]) - np.median(bright[beyond]))
    # scikit-image's `regionprops` would measure all areas, but only one is needed
    areas, _ = ndimage.label(inside & (bright > level) & (distance < 1.6 * radius))
    area = areas == np.bincount(areas[disc & (areas > 0)], minlength=2)[1:].argmax() + 1
    if not area.any():
        return row, column, diameter
    center = np.argwhere(area).mean(axis=0)
    shift = center - (row, column)
    shift *= min(1, 0.5 * radius / max(np.hypot(*shift), 1e-6))
    found = 2 * np.sqrt(area.sum() / np.pi)
    return row + shift[0], column + shift[1], float(np.clip(found, 0.8 * diameter, 1.5 * diameter))
