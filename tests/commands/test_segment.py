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
"""Segmentation from Python: what is in memory gives what its file gives, in the axes in which it was given."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny_scans import AFFINES, PICTURE, nifti

from shared_iopfl import Segmentation, segment
from shared_iopfl.models.files import load_weights
from shared_iopfl.utils.errors import InputError

TINY = {"image_size": 32, "features": 4, "device": "cpu"}
VOLUME = np.random.RandomState(0).rand(24, 20, 4).astype(np.float32)


def test_a_volume_in_memory_and_its_file_give_the_same(models, tmp_path):
    affine = AFFINES["oblique"]
    one = segment("prostate", VOLUME, affine, ckpt_dir=str(models), **TINY)
    path = nifti(tmp_path / "exam.nii.gz", VOLUME, affine)
    other = segment("prostate", path, ckpt_dir=str(models), **TINY)
    assert isinstance(one, Segmentation)
    assert one.mask.shape == VOLUME.shape and one.mask.dtype == np.uint8 and one.mask.any()
    assert np.array_equal(one.mask, other.mask)
    assert np.array_equal(one.mask, segment("prostate", nib.load(path), ckpt_dir=str(models), **TINY).mask)
    assert np.allclose(one.affine, affine, atol=1e-5) and np.allclose(other.affine, affine, atol=1e-5)
    assert one.routes == other.routes and set(one.routes) == {"A", "B", "global"}
    assert sum(one.routes.values()) == pytest.approx(1, abs=1e-4)
    assert 0 <= one.quality <= 1
    voxel = abs(np.linalg.det(affine[:3, :3]))
    assert one.measures["volume_ml"] == pytest.approx(one.mask.sum() * voxel / 1000, abs=1e-4)


def test_a_flipped_volume_gives_a_flipped_mask(models):
    """The mask is in the axes of the array that was given, whatever these are."""
    flipped = AFFINES["LPS"] @ np.array([[-1, 0, 0, 23], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    one = segment("prostate", VOLUME, AFFINES["LPS"], ckpt_dir=str(models), **TINY)
    other = segment("prostate", VOLUME[::-1].copy(), flipped, ckpt_dir=str(models), **TINY)
    assert np.array_equal(one.mask, other.mask[::-1])


def test_a_picture_in_memory_gives_a_mask_of_its_height_and_width(fundus_models):
    picture = np.kron(PICTURE, np.ones((8, 8, 1), np.uint8))
    settings = {**TINY, "crop": "never", "ckpt_dir": str(fundus_models), "one_component": False}
    result = segment("fundus", picture, **settings)
    assert result.mask.shape == picture.shape[:2] and result.mask.any() and result.affine is None
    assert "vertical_cup_to_disc_ratio" in result.measures or result.reasons
    assert np.array_equal(segment("fundus", picture / 255, **settings).mask, result.mask)


def test_an_empty_mask_is_returned_as_one(models, tmp_path):
    """It is that of a network whose last bias lets it see background everywhere."""
    weights = load_weights(models / "model.pt")
    weights["final_conv.bias"] = torch.tensor([100.0, -100.0])
    torch.save(weights, tmp_path / "model.pt")
    result = segment("prostate", VOLUME, AFFINES["LPS"], ckpt_dir=str(tmp_path), mode="off", **TINY)
    assert result.mask.shape == VOLUME.shape and not result.mask.any()
    assert result.quality is None and result.routes == {}


@pytest.mark.parametrize(
    ("scan", "affine", "told"),
    [
        (VOLUME, None, "needs its affine"),
        (VOLUME[0], np.eye(4), "a scan must be numbers"),
        (VOLUME, np.eye(3), "shape"),
        (np.full((4, 4, 4), np.nan), np.eye(4), "^the scan holds 64 NaN"),
        (VOLUME, np.zeros((4, 4)), "^the scan has a broken affine"),
        (PICTURE.astype(np.uint16), None, r"of uint8 or of floats from 0 to 1, but this is uint16 \(20, 30, 3\)"),
        (np.moveaxis(PICTURE, 2, 0), None, r"\(height, width, 3\)"),
        ("/no/such/scan.nii.gz", None, "no such file"),
    ],
)
def test_what_is_no_scan_is_one_line(scan, affine, told, models):
    with pytest.raises(InputError, match=told) as caught:
        segment("prostate", scan, affine, ckpt_dir=str(models), **TINY)
    assert "\n" not in str(caught.value)


def test_a_folder_of_several_scans_is_refused_before_it_is_segmented(models, tmp_path):
    for name in ("a.nii", "b.nii"):
        nifti(tmp_path / name, VOLUME)
    with pytest.raises(InputError, match="2 scans: pass one"):
        segment("prostate", tmp_path, ckpt_dir=str(models), **TINY)


def test_text_in_a_setting_is_no_code(models, tmp_path):
    mark = tmp_path / "ran"
    code = f"$open({str(mark)!r}, 'w')"
    with pytest.raises(InputError):
        segment("prostate", VOLUME, AFFINES["LPS"], ckpt_dir=code, **TINY)
    with pytest.raises(InputError):
        segment("prostate", VOLUME, AFFINES["LPS"], ckpt_dir=str(models), **{**TINY, "device": code})
    assert not mark.exists()


def test_nothing_is_left_behind(models, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    segment("prostate", VOLUME, AFFINES["LPS"], ckpt_dir=str(models), **TINY)
    assert [path.name for path in tmp_path.iterdir()] == []
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_the_mask_lies_on_the_scan_when_it_is_written(models, tmp_path):
    """As the README has it: affine and mask make a NIfTI file."""
    result = segment("prostate", VOLUME, AFFINES["LPS"], ckpt_dir=str(models), **TINY)
    nib.save(nib.Nifti1Image(result.mask, result.affine), tmp_path / "mask.nii.gz")
    assert Path(tmp_path / "mask.nii.gz").is_file()
