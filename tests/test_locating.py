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
"""Properties of finding the optic disc and of cropping to it."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose, Invertd, Resized
from skimage import data

from shared_iopfl.errors import InputError
from shared_iopfl.locating import CropToDiscd, Disc, find_disc
from shared_iopfl.phantom_fundus import fundus_case, fundus_style


def tensor(picture: np.ndarray) -> torch.Tensor:
    """(H, W, 3) -> (3, W, H), as MONAI's readers give it."""
    return torch.as_tensor(np.ascontiguousarray(picture.T), dtype=torch.float32)


def case(site: str, seed: int = 0, photograph: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """A synthetic picture (3, W, H) and its coded mask (1, W, H)."""
    picture, mask = fundus_case(fundus_style(site), 480 if photograph else 256, np.random.RandomState(seed), photograph)
    return tensor(picture), torch.as_tensor(mask.T.copy(), dtype=torch.float32)[None]


def truth(mask: torch.Tensor) -> tuple[np.ndarray, float]:
    """Centre and mean diameter of the disc in a mask."""
    pixels = np.argwhere(mask[0].numpy() > 0)
    return pixels.mean(axis=0), float(np.ptp(pixels, axis=0).mean() + 1)


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


def test_the_disc_of_a_real_photograph_is_found_however_it_lies():
    """skimage's retina (public domain): 1411 pixels square, disc 200 wide at (row 650, column 215)."""
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


def landscape() -> np.ndarray:
    rows, columns = np.indices((300, 400))
    picture = np.where((rows > 170)[..., None], np.array([60.0, 120, 40]), np.array([120.0, 170, 240]))
    picture[(rows - 60) ** 2 + (columns - 300) ** 2 < 30**2] = (255, 250, 220)
    return picture


@pytest.mark.parametrize(
    "picture",
    [
        np.random.RandomState(0).randint(0, 256, (300, 400, 3)),
        np.random.RandomState(0).randint(0, 256, (300, 400, 3)) * [1.0, 0.6, 0.3],
        landscape(),
        data.astronaut(),
        np.zeros((300, 400, 3)),
        np.full((300, 400, 3), 128.0),
        np.full((300, 400, 3), np.nan),
        data.retina()[350:1050, 420:1120],  # the macula
        np.full((16, 4000, 3), 100.0),
    ],
    ids=["noise", "red noise", "landscape", "person", "black", "grey", "NaN", "macula", "strip"],
)
def test_pictures_without_a_disc_are_refused_naming_the_file(picture):
    image = MetaTensor(tensor(picture), meta={"filename_or_obj": "x.jpg"})
    with pytest.raises(InputError, match=r'no optic disc found in x\.jpg .*set crop="never"'):
        CropToDiscd("image")({"image": image})
    assert CropToDiscd("image", crop="never")({"image": image})["image"].shape == image.shape


def test_a_spot_of_light_in_a_large_dark_picture_needs_little_memory_and_time():
    picture = torch.zeros(3, 3000, 3000)
    picture[0, 1500:1540, 1500:1540] = 200
    start = time.perf_counter()
    find_disc(picture)
    assert time.perf_counter() - start < 10


def test_a_photograph_is_cropped_to_a_square_holding_the_disc():
    picture, mask = case("C", seed=3)
    _, diameter = truth(mask)
    cropped = CropToDiscd(["image", "label"], size_ratio=2.0)({"image": MetaTensor(picture), "label": MetaTensor(mask)})
    assert cropped["image"].shape[1] == cropped["image"].shape[2]
    assert cropped["label"].shape[1:] == cropped["image"].shape[1:]
    assert 1.4 < cropped["image"].shape[1] / diameter < 2.8
    assert (cropped["label"] > 0).sum() == (mask > 0).sum()
    start, size = cropped["image"].meta["crop_start"], cropped["image"].meta["crop_size"]
    part = picture[:, start[0] : start[0] + size[0], start[1] : start[1] + size[1]]
    assert torch.equal(cropped["image"].as_tensor(), part)


def test_a_disc_crop_stays_as_it_is_unless_told():
    picture, _ = case("A", seed=4, photograph=False)
    image = {"image": MetaTensor(picture)}
    left = CropToDiscd("image")(image)["image"]
    assert torch.equal(left.as_tensor(), picture)
    assert left.meta["crop_start"] == [0, 0]
    always = CropToDiscd("image", crop="always", size_ratio=1.5)(image)["image"]
    assert always.shape[1] < picture.shape[1]


@pytest.mark.parametrize("photograph", [True, False], ids=["photograph", "crop"])
def test_invertd_brings_the_mask_back_to_the_photographs_own_pixels(photograph):
    picture, mask = case("D", seed=5, photograph=photograph)
    crop = CropToDiscd("image", size_ratio=2.5)
    both = CropToDiscd(["image", "label"], size_ratio=2.5)({"image": MetaTensor(picture), "label": MetaTensor(mask)})
    transforms = Compose([crop, Resized("image", (128, 128), mode="bilinear")])
    batch = list_data_collate([transforms({"image": MetaTensor(picture)})])
    batch["pred"] = torch.nn.functional.interpolate(both["label"][None].as_tensor(), size=(128, 128))
    case_ = decollate_batch(batch)[0]
    case_["pred"] = MetaTensor(case_["pred"])
    inverted = Invertd("pred", transforms, "image", nearest_interp=True)(case_)["pred"]
    assert inverted.shape == mask.shape
    agree = ((inverted > 0) & (mask > 0)).sum() * 2 / ((inverted > 0).sum() + (mask > 0).sum())
    assert agree > 0.95


def test_photographs_and_crops_collate():
    """Both carry the same metadata and the same trace, so that a batch may hold both."""
    transforms = Compose([CropToDiscd("image"), Resized("image", (64, 64))])
    items = [transforms({"image": MetaTensor(case("A", photograph=p)[0])}) for p in (True, False)]
    assert list_data_collate(items)["image"].shape == (2, 3, 64, 64)


def test_mismatched_mask_and_unknown_settings_are_refused():
    picture, mask = case("A")
    with pytest.raises(InputError, match=r"label has .* pixels but image has"):
        CropToDiscd(["image", "label"])({"image": picture, "label": mask[:, 1:]})
    with pytest.raises(InputError, match="crop must be"):
        CropToDiscd("image", crop="none")
    with pytest.raises(InputError, match="size_ratio"):
        CropToDiscd("image", size_ratio=0.5)
