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
"""Smoothed outlines are closer to the ellipses that leaks and notches deform, and leave smooth masks as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from shared_iopfl.data.photographs.outlines import SmoothOutlines, SmoothOutlinesd

SIZE = 160


def ellipse(center=(80, 76), axes=(44, 38), size: int = SIZE) -> np.ndarray:
    x, y = np.indices((size, size))
    return ((x - center[0]) / axes[0]) ** 2 + ((y - center[1]) / axes[1]) ** 2 <= 1


def coded(*targets: np.ndarray) -> torch.Tensor:
    """Return the coded mask (1, X, Y) of nested targets."""
    return torch.from_numpy(np.stack(targets).sum(axis=0, keepdims=True, dtype=np.uint8))


def smoothed(*targets: np.ndarray, **settings: int) -> np.ndarray:
    return SmoothOutlines(**settings)(coded(*targets))[0].numpy()


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def ragged(truth: np.ndarray) -> np.ndarray:
    """Move the outline by noise that is coherent over a few pixels, as at vessels."""
    random = np.random.RandomState(0)
    shifts = np.kron(random.randint(-3, 4, (2, SIZE // 8, SIZE // 8)), np.ones((8, 8), dtype=int))
    x, y = np.indices(truth.shape)
    return truth[(x + shifts[0]).clip(0, SIZE - 1), (y + shifts[1]).clip(0, SIZE - 1)]


def test_a_ragged_leaking_mask_becomes_closer_to_the_ellipse() -> None:
    """A vessel-wide leak to the edge of the picture disappears, and half of the error with it."""
    truth = ellipse()
    mask = ragged(truth)
    mask[76:86, 100:] = True
    result = smoothed(mask) > 0
    assert not result[:, 125:].any()
    assert 1 - dice(result, truth) < (1 - dice(mask, truth)) / 2


def test_a_notch_is_filled() -> None:
    """A vessel that cuts into the target does not shorten the outline."""
    truth = ellipse()
    mask = truth.copy()
    mask[70:80, 90:] = False
    result = smoothed(mask) > 0
    assert result[75, 112]
    assert dice(result, truth) > 0.98 > dice(mask, truth)


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("ratio", [0.8, 1, 1.25])
def test_a_smooth_mask_keeps_its_area(scale: int, ratio: float) -> None:
    """An ellipse of the proportions of discs changes its area by less than 0.5 %, at any resolution."""
    size = SIZE * scale
    truth = ellipse((size / 2, size / 2.2), (40 * scale * ratio, 40 * scale), size)
    result = smoothed(truth) > 0
    assert abs(result.sum() / truth.sum() - 1) < 0.005
    assert dice(result, truth) > 0.985


def test_inner_targets_are_within_outer_ones() -> None:
    """Each target is smoothed, and the cup is limited by the disc, even where its own outline would leave it."""
    disc = ellipse()
    cup = ellipse((92, 76), (30, 28)) & disc
    result = smoothed(disc, cup)
    assert dice(result >= 1, disc) > 0.98
    assert dice(result >= 2, cup) > 0.97
    assert np.array_equal(result >= 1, smoothed(disc) > 0)


def test_empty_targets_remain_empty() -> None:
    disc = ellipse()
    assert not smoothed(disc & False).any()
    assert set(np.unique(smoothed(disc, disc & False))) == {0, 1}


def test_a_single_pixel_remains() -> None:
    mask = np.zeros((9, 9), dtype=bool)
    mask[0, 4] = True
    assert np.array_equal(smoothed(mask) > 0, mask)


def test_a_target_at_the_edge_of_the_picture_stays_within_it() -> None:
    """The edge cuts the target off and is not taken for its outline."""
    truth = ellipse((80, 12))
    assert dice(smoothed(truth) > 0, truth) > 0.98


def test_a_crescent_is_left_as_it_is() -> None:
    """A target that is far from an ellipse is not forced into one, which would miss most of it."""
    crescent = ellipse() & ~ellipse((80, 86))
    assert np.array_equal(smoothed(crescent) > 0, crescent)


def test_a_target_that_fills_the_picture_remains() -> None:
    assert smoothed(np.ones((20, 30), dtype=bool)).all()


def test_more_harmonics_keep_more_details() -> None:
    """A target with three lobes is rounded by two harmonics, and kept by three."""
    x, y = np.indices((SIZE, SIZE)) - 80
    lobes = np.hypot(x, y) <= 40 + 3 * np.cos(3 * np.arctan2(y, x))
    assert dice(smoothed(lobes, harmonics=3) > 0, lobes) > 0.98 > dice(smoothed(lobes) > 0, lobes)


@pytest.mark.parametrize("convert", [torch.Tensor.numpy, torch.clone, MetaTensor])
def test_type_and_metadata_are_kept(convert: Any) -> None:
    """Arrays remain arrays and tensors tensors with their metadata; other keys are left alone."""
    mask = convert(coded(ellipse()))
    result = SmoothOutlinesd("pred")({"pred": mask, "image": "other"})
    assert type(result["pred"]) is type(mask)
    assert result["pred"].dtype == mask.dtype
    assert result["pred"].shape == (1, SIZE, SIZE)
    assert result["image"] == "other"
    if isinstance(mask, MetaTensor):
        assert torch.equal(result["pred"].affine, mask.affine)
