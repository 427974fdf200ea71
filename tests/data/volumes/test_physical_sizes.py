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
"""A field of view in millimetres: an organ has one size in pixels, and its mask comes back to the grid of the scan."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Resized

from shared_iopfl.data.volumes.measures import FieldOfView, FieldOfViewd
from shared_iopfl.utils.errors import InputError

SIDE, PIXELS = 60.0, 30  # 2 mm a pixel


def scan(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> MetaTensor:
    """A bright block of 20 mm x 20 mm in the middle of a volume with background 5."""
    volume = torch.full((1, *shape), 5.0)
    middle = [slice(round(n / 2 - 10 / mm), round(n / 2 + 10 / mm)) for n, mm in zip(shape[:2], spacing)]
    volume[(slice(None), *middle)] = 100.0
    return MetaTensor(volume, affine=np.diag([*spacing, 1.0]))


SCANS = {
    "larger": scan((100, 100, 4), (1.0, 1.0, 3.0)),
    "smaller": scan((40, 40, 4), (1.0, 1.0, 3.0)),
    "uneven": scan((80, 50, 4), (0.5, 2.0, 3.0)),
}


def preprocessing() -> Compose:
    size = (PIXELS, PIXELS, -1)
    return Compose([FieldOfViewd("image", SIDE), Resized("image", size, mode="trilinear", anti_aliasing=True)])


@pytest.mark.parametrize("name", SCANS)
def test_an_organ_has_one_size_in_pixels_whatever_the_field_of_view(name):
    seen = preprocessing()({"image": SCANS[name]})["image"]
    assert seen.shape == (1, PIXELS, PIXELS, 4)
    assert float(seen.median()) == pytest.approx(5.0, abs=0.5)  # padding is background
    assert float((seen[0, :, :, 0] > 52).sum()) == pytest.approx((20 / 2) ** 2, abs=20)
    spacing = torch.linalg.vector_norm(seen.affine[:3, :3], dim=0)
    assert spacing.tolist() == pytest.approx([2.0, 2.0, 3.0], rel=0.02)


def test_a_mask_comes_back_to_the_grid_of_each_scan():
    """Each by what was done to it, not to the scan that came last."""
    transform = preprocessing()
    cases = {name: transform({"image": image}) for name, image in SCANS.items()}
    for name, case in cases.items():
        case["pred"] = MetaTensor((case["image"] > 52).float(), affine=case["image"].affine)
        mask = Invertd("pred", transform, orig_keys="image", nearest_interp=False)(case)["pred"]
        assert mask.shape == SCANS[name].shape
        found, true = mask[0] > 0.5, SCANS[name][0] > 52
        assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.9, name


def test_a_field_of_view_needs_the_size_of_a_pixel():
    with pytest.raises(InputError, match="affine"):
        FieldOfView(SIDE)(torch.zeros(1, 8, 8, 2))
