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
"""Properties of the search for the optic disc."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from fundus_pictures import case, tensor, truth
from skimage import data

from shared_iopfl.data.photographs.locating import Disc, find_disc


def check(disc: Disc, center: np.ndarray, diameter: float, whole: bool) -> None:
    assert np.hypot(*(np.array(disc.center) - center)) < 0.35 * diameter
    assert 0.6 < disc.diameter / diameter < 1.5
    assert disc.confidence > 0.5
    assert disc.whole == whole


@pytest.mark.parametrize("photograph", [True, False], ids=["photograph", "crop"])
@pytest.mark.parametrize("site", ["A", "B", "C", "D"])
def test_the_disc_is_found_for_every_camera(site, photograph):
    picture, mask = case(site, seed=ord(site), photograph=photograph)
    check(find_disc(picture), *truth(mask), whole=photograph)


def test_the_disc_of_a_real_photograph_is_found_in_any_orientation():
    """The photograph is skimage's retina (public domain, 1411 pixels square); its disc is 200 wide, at (650, 215)."""
    picture = data.retina()
    for turns in range(4):
        row, column = [(650, 215), (1195, 650), (760, 1195), (215, 760)][turns]
        disc = find_disc(tensor(np.rot90(picture, turns)))
        check(disc, np.array([column, row]), 200, whole=True)


def test_brightness_scale_and_border_do_not_matter():
    picture, mask = case("A", seed=1)
    center, diameter = truth(mask)
    check(find_disc(picture / 255), center, diameter, whole=True)
    check(find_disc(picture * 0.3), center, diameter, whole=True)
    wide = torch.nn.functional.pad(picture, (200, 0, 0, 300))
    check(find_disc(wide), center + np.array([0, 200]), diameter, whole=True)


def test_bright_exudates_and_a_reflection_do_not_distract():
    picture, mask = case("B", seed=2)
    center, diameter = truth(mask)
    columns, rows = np.indices(picture.shape[1:])
    middle = np.array(picture.shape[1:]) / 2
    random = np.random.RandomState(0)
    picture = picture.clone()
    for place in middle + (0.25 * picture.shape[2]) * np.array([0, 0.7]) + random.randn(25, 2) * diameter * 0.35:
        dot = torch.as_tensor(np.hypot(columns - place[0], rows - place[1]) < 0.05 * diameter)
        picture[:, dot] = torch.tensor([230.0, 200.0, 120.0])[:, None]
    edge = middle - (0, 0.47 * picture.shape[2])
    glow = torch.as_tensor(np.exp(-(((columns - edge[0]) ** 2 + (rows - edge[1]) ** 2) / (0.8 * diameter) ** 2)))
    lit = (picture.max(dim=0).values > 20).float()
    picture = picture + 150 * (glow * lit).float()
    check(find_disc(picture), center, diameter, whole=True)


def test_a_spot_of_light_in_a_large_dark_picture_needs_little_memory_and_time():
    picture = torch.zeros(3, 3000, 3000)
    picture[0, 1500:1540, 1500:1540] = 200
    start = time.perf_counter()
    find_disc(picture)
    assert time.perf_counter() - start < 10
