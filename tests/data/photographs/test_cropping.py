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
"""Properties of cropping to the optic disc."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fundus_pictures import case, tensor, truth
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose, Invertd, Resized
from PIL import Image
from skimage import data

from shared_iopfl.data.phantoms.fundus import fundus_case, fundus_style
from shared_iopfl.data.photographs.cropping import CropToDiscd, site_crop
from shared_iopfl.data.photographs.locating import find_disc
from shared_iopfl.utils.errors import InputError


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
    with pytest.raises(InputError, match=r"no optic disc found in x\.jpg .*set --crop never"):
        CropToDiscd("image")({"image": image})
    assert CropToDiscd("image", crop="never")({"image": image})["image"].shape == image.shape


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


def test_a_disc_crop_is_unchanged_by_default():
    picture, _ = case("A", seed=4, photograph=False)
    image = {"image": MetaTensor(picture)}
    left = CropToDiscd("image")(image)["image"]
    assert torch.equal(left.as_tensor(), picture)
    assert left.meta["crop_start"] == [0, 0]
    always = CropToDiscd("image", crop="always", size_ratio=1.5)(image)["image"]
    assert always.shape[1] < picture.shape[1]


@pytest.mark.parametrize("photograph", [True, False], ids=["photograph", "crop"])
def test_invertd_restores_the_mask_in_the_pixels_of_the_photograph(photograph):
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
    """Both have the same metadata and the same trace, so that a batch can contain both."""
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


def folder(root: Path, kinds: str) -> list[dict[str, str]]:
    """Write a site of crops ("c") and whole photographs ("w")."""
    cases = []
    for number, kind in enumerate(kinds):
        size = 300 if kind == "w" else 128
        picture = fundus_case(fundus_style("A"), size, np.random.RandomState(number), photograph=kind == "w")[0]
        Image.fromarray(picture).save(root / f"{number}.png")
        cases.append({"image": str(root / f"{number}.png")})
    return cases


@pytest.mark.parametrize(
    "kinds, chosen", [("cccw", "crops"), ("wwwc", "auto"), ("cw", "auto"), ("c", "auto"), ("cc", "crops")]
)
def test_whether_pictures_are_crops_is_decided_per_site(tmp_path, kinds, chosen):
    cases = folder(tmp_path, kinds)
    (tmp_path / "broken.png").write_bytes(b"x")
    odd = [{"image": str(tmp_path / name)} for name in ("broken.png", "gone.png")]
    assert site_crop("auto", [*cases, *odd] if len(cases) > 1 else cases) == chosen
    for told in ("always", "never", "crops"):
        assert site_crop(told, cases) == told


def test_among_crops_an_uncertain_disc_gets_a_remark_and_no_disc_is_rejected(monkeypatch):
    """In a crop of an older camera the confidence of the disc is below the usual limit."""
    picture = MetaTensor(case("A", photograph=False)[0], meta={"filename_or_obj": "x.png"})
    found = find_disc(picture)
    for confidence, whole, remark in (
        (0.24, False, "optic disc uncertain (confidence 0.24)"),
        (0.24, True, "optic disc uncertain (confidence 0.24)"),
        (0.8, True, "looks like a whole photograph among crops"),
        (0.8, False, ""),
    ):
        disc = found._replace(confidence=confidence, whole=whole)
        monkeypatch.setattr("shared_iopfl.data.photographs.cropping.find_disc", lambda image, disc=disc: disc)
        left = CropToDiscd("image", crop="crops")({"image": picture})["image"]
        assert torch.equal(left.as_tensor(), picture.as_tensor())
        assert left.meta["remarks"] == remark
    for crop, confidence in (("auto", 0.24), ("crops", 0.05)):
        disc = found._replace(confidence=confidence)
        monkeypatch.setattr("shared_iopfl.data.photographs.cropping.find_disc", lambda image, disc=disc: disc)
        with pytest.raises(InputError, match="no optic disc found"):
            CropToDiscd("image", crop=crop)({"image": picture})


@pytest.mark.parametrize("crop", ["auto", "never", "crops"])
def test_a_stretched_crop_gets_a_remark(crop):
    picture, _ = case("A", photograph=False)
    wide = torch.nn.functional.interpolate(picture[None], scale_factor=(1.5, 1))[0]
    assert CropToDiscd("image", crop=crop)({"image": MetaTensor(wide)})["image"].meta["remarks"] == (
        "a crop 1.5 times as wide as high"
    )
    assert CropToDiscd("image", crop=crop)({"image": MetaTensor(picture)})["image"].meta["remarks"] == ""
