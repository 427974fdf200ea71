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
"""A field of view in millimetres: an organ has one size in pixels, and its mask is restored in the grid of the scan."""

from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Invertd, Resized
from tiny_scans import AFFINES, VALUES

from shared_iopfl.data.loading import LoadCased
from shared_iopfl.data.masks import SaveMaskd
from shared_iopfl.data.volumes.measures import FieldOfView, FieldOfViewd, volume_ml
from shared_iopfl.utils.errors import InputError

SIDE, PIXELS = 60.0, 30  # 2 mm a pixel


def scan(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> MetaTensor:
    """Return a bright block of 20 mm x 20 mm in the middle of a volume with background 5."""
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


def test_the_inverse_restores_the_grid_of_each_scan():
    """It inverts the operations on that scan, not those on the last one."""
    transform = preprocessing()
    cases = {name: transform({"image": image}) for name, image in SCANS.items()}
    for name, case in cases.items():
        case["pred"] = MetaTensor((case["image"] > 52).float(), affine=case["image"].affine)
        mask = Invertd("pred", transform, orig_keys="image", nearest_interp=False)(case)["pred"]
        assert mask.shape == SCANS[name].shape
        found, true = mask[0] > 0.5, SCANS[name][0] > 52
        assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.9, name


@pytest.mark.parametrize(("unit", "mm"), [("meter", 1e3), ("micron", 1e-3), ("mm", 1.0), ("unknown", 1.0)])
def test_sizes_are_in_millimetres_whatever_the_unit_of_the_header(unit, mm, tmp_path):
    """This holds for volumes, distances and fields of view; the mask is in the unit of its scan."""
    affine = np.diag([1 / mm] * 3 + [1.0]) @ AFFINES["oblique"]
    image = nib.Nifti1Image(VALUES, affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "scan.nii")
    read = LoadCased("image")({"image": tmp_path / "scan.nii"})["image"]
    assert np.allclose(read.affine, AFFINES["oblique"], rtol=1e-4)
    mask = MetaTensor(torch.ones(1, *VALUES.shape), affine=read.affine)
    assert volume_ml(mask[0]) == volume_ml(mask) == pytest.approx(VALUES.size * 0.7 * 0.9 * 3 / 1000, rel=1e-4)
    written = SaveMaskd(output_dir=tmp_path / "out")({"image": read, "pred": mask})["pred_file"]
    assert nib.load(written).header.get_xyzt_units()[0] == unit
    assert np.allclose(nib.load(written).affine, affine, rtol=1e-4)


def test_an_implausible_unit_is_rejected(tmp_path):
    image = nib.Nifti1Image(VALUES, AFFINES["LPS"])
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "scan.nii")
    with pytest.raises(InputError, match=r"scan\.nii has voxels of 700x900x3000 mm by the unit in its header"):
        LoadCased("image")({"image": tmp_path / "scan.nii"})


def test_voxels_of_exactly_1_mm_are_a_placeholder():
    """The same holds for surface distances."""
    assert math.isnan(volume_ml(MetaTensor(torch.ones(1, 4, 4, 4), affine=np.eye(4))))
    assert math.isnan(volume_ml(torch.ones(1, 4, 4, 4)))
    assert volume_ml(MetaTensor(torch.ones(1, 10, 10, 10), affine=np.diag([1, 1, 2, 1]))) == 2.0


def test_a_field_of_view_needs_the_size_of_a_pixel():
    with pytest.raises(InputError, match="affine"):
        FieldOfView(SIDE)(torch.zeros(1, 8, 8, 2))
