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
"""What tests of the fundus bundle share: sites in two codings, runs of its configs, and what its files must hold."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monai.bundle import ConfigWorkflow
from PIL import Image
from scipy import ndimage

from shared_iopfl.utils.errors import root_input_error

BUNDLE = Path(__file__).parents[1] / "bundles" / "fundus_iopfl"
GLANCE: dict[str, Any] = {
    "rounds": 1,
    "own_rounds": 1,
    "passes": 1,
    "batch_size": 2,
    "val_interval": 1,
    "crop": "never",
}
Run = Callable[..., ConfigWorkflow]


def run_fundus(run_config: Run, config: str, **overrides: Any) -> ConfigWorkflow:
    return run_config(config, "fundus_iopfl", **overrides)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pixels(path: str | Path) -> np.ndarray:
    """(H, W) or (H, W, 3), as the file stores them."""
    with Image.open(path) as picture:
        return np.asarray(picture)


def first_of(folder: Path) -> Path:
    return min(folder.iterdir())


def check_mask(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A mask is an 8-bit PNG of one channel in the picture's pixels: 0, 1 a disc in one piece, 2 a cup in it."""
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "L")
        mask = np.asarray(picture)
    assert mask.shape == shape[:2]
    assert set(np.unique(mask)) <= {0, 1, 2}
    for target in (mask >= 1, mask == 2):
        assert ndimage.label(target, np.ones((3, 3)))[1] <= 1
        filled = ndimage.binary_fill_holes(target, np.ones((3, 3)))  # MONAI takes a diagonal gap for open
        np.testing.assert_array_equal(filled, target)
    return mask


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def vertical_ratio(disc: np.ndarray, cup: np.ndarray) -> float:
    """Rows that the cup extends over, for those of the disc, in (H, W); 0 without a cup, NaN without a disc."""
    rows = [np.flatnonzero(target.any(axis=1)) for target in (cup, disc)]
    heights = [np.ptp(of_target) + 1 if len(of_target) else 0 for of_target in rows]
    return float(heights[0] / heights[1]) if heights[1] else float("nan")


def as_dofe(source: Path, target: Path, held_out: int = 2) -> None:
    """A site of ``images`` and ``masks`` as the public four-domain set has it: other folders, other values, a split."""
    images = sorted((source / "images").iterdir())
    for number, image in enumerate(images):
        rois = target / ("test" if number < held_out else "train") / "ROIs"
        for kind in ("image", "mask"):
            (rois / kind).mkdir(parents=True, exist_ok=True)
        coded = np.array([255, 128, 0], np.uint8)[pixels(source / "masks" / image.name)]
        Image.open(image).save(rois / "image" / image.name)
        Image.fromarray(coded).convert("RGB" if number % 2 else "L").save(rois / "mask" / image.name)


def refusal(run_config: Run, config: str, **overrides: Any) -> str:
    """The one line that a run ends in."""
    with pytest.raises(Exception) as caught:
        run_fundus(run_config, config, **overrides)
    cause = root_input_error(caught.value)
    assert cause is not None
    assert "\n" not in str(cause)
    return str(cause)


def cut_short(path: Path) -> None:
    """A JPEG that ends in the middle, under the name it has: what a broken copy leaves."""
    Image.open(path).save(path, "JPEG", quality=95)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grey(path: Path) -> None:
    Image.open(path).convert("L").save(path)


def bare_retina(path: Path) -> None:
    """A picture of retina without any disc."""
    noise = 5 * np.random.RandomState(1).randn(96, 96, 3)
    Image.fromarray((np.array([170, 85, 40]) + noise).clip(0, 255).astype(np.uint8)).save(path)
