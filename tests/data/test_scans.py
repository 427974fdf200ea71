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
"""Loading of scans: unusable files are rejected in one line, others are read as stored in their file."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor, PILReader, decollate_batch
from monai.transforms import Compose
from PIL import Image
from tiny_scans import AFFINES, MASK, PICTURE, RNG, SERIES, VALUES, affine_of, dicom_series, nifti, rotation

from shared_iopfl.data.loading import LoadCased
from shared_iopfl.data.scan_files import find_scans
from shared_iopfl.utils.errors import InputError, root_input_error


def load(path: Path, **options) -> MetaTensor:
    return LoadCased("image", **options)({"image": str(path)})["image"]


def refused(path: Path, what: str, key: str = "image", **options) -> None:
    with pytest.raises(InputError, match=what) as error:
        LoadCased(**options)({key: str(path)})
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.png", "a.jpg", "a.mha", "a.nrrd", "a.dcm"])
def test_files_that_are_not_scans_are_rejected(tmp_path, name):
    """For each ending, the file is missing, empty, or has the wrong contents."""
    if name.endswith(("mha", "nrrd", "dcm")):
        pytest.importorskip("itk")
    path = tmp_path / name
    refused(path, "no such file")
    path.write_bytes(b"")
    refused(path, "0 bytes")
    path.write_bytes(b"not a scan " * 100)
    refused(path, "cannot be read as a scan")


def test_files_of_other_kinds_are_rejected(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    refused(tmp_path / "a.txt", "expected DICOM or nii.gz")
    (tmp_path / "folder").mkdir()
    pytest.importorskip("itk")
    refused(tmp_path / "folder", "no DICOM files")


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.png", "a.jpg", "a.mha", "a.nrrd"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_truncated_files_are_rejected(tmp_path, name, kept):
    path = tmp_path / name
    if name.startswith("a.nii"):
        nifti(path, RNG.rand(20, 20, 20))
    elif name.endswith(("mha", "nrrd")):
        itk = pytest.importorskip("itk")
        itk.imwrite(itk.image_from_array(RNG.rand(20, 20, 20).astype(np.float32)), str(path))
    else:
        Image.fromarray(PICTURE).save(path)
    options = {} if name.startswith("a.n") or name.endswith("mha") else {"spatial_dims": 2, "channels": 3}
    load(path, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refused(path, "cannot be read as a scan", **options)


def with_value(value: float) -> np.ndarray:
    return np.where(np.arange(VALUES.size).reshape(VALUES.shape) < 3, np.float32(value), VALUES)


@pytest.mark.parametrize(
    "array, what",
    [
        (np.stack([VALUES, VALUES], -1), r"expected a 3D scan, got shape \(6, 7, 5, 2\).*extract one volume first"),
        (VALUES[..., None, None].repeat(2, -1), "expected a 3D scan"),
        (VALUES[:, 0, 0], "expected a 3D scan"),
        (VALUES[:0], "axis of length 0"),
        (with_value(np.nan), "3 NaN or infinite voxels"),
        (with_value(-np.inf), "3 NaN or infinite voxels"),
        (np.full_like(VALUES, 7), "7 everywhere"),
        (VALUES.astype(np.complex64), "complex"),
        (np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), "RGB"),
    ],
)
def test_unusable_images_are_rejected(tmp_path, array, what):
    refused(nifti(tmp_path / "a.nii.gz", array), what)


@pytest.mark.parametrize(
    "array, what",
    [
        (MASK * 0.5, "include 0.5"),
        (MASK * np.int16(-1), "include -1"),
        (np.where(MASK, np.nan, 1), "include nan"),
        (MASK * 0, "no foreground.* 0 everywhere"),
        (MASK * 0 + 255, "255 everywhere"),
        (VALUES, r"include .*, \.\.\."),
    ],
)
def test_unusable_labels_are_rejected(tmp_path, array, what):
    refused(nifti(tmp_path / "a.nii.gz", array), what, key="label")


@pytest.mark.parametrize("value", [0.0, np.nan])
@pytest.mark.parametrize("field", ["srow_x", "pixdim"])
def test_broken_affines_are_rejected(tmp_path, value, field):
    path = nifti(tmp_path / "a.nii", VALUES)
    header = nib.load(path).header.copy()
    if field == "pixdim":
        header["sform_code"] = header["qform_code"] = 0
        header["pixdim"][1:4] = value
    else:
        header["srow_x"] = value
    content = path.read_bytes()
    path.write_bytes(header.binaryblock + content[len(header.binaryblock) :])
    refused(path, "correct its header")


def test_pictures_with_another_number_of_channels_are_rejected(tmp_path):
    Image.fromarray(PICTURE[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(PICTURE).save(tmp_path / "colour.png")
    refused(tmp_path / "grey.png", "expected a 2D picture of 3 channels", spatial_dims=2, channels=3)
    refused(tmp_path / "colour.png", "expected a 2D picture of 1 channel, got", spatial_dims=2)
    refused(tmp_path / "colour.png", "expected a 2D picture of 1 channel, got", key="label", spatial_dims=2, channels=3)


def test_a_label_of_another_shape_is_rejected(tmp_path):
    """The message names both files."""
    image, label = nifti(tmp_path / "a.nii", VALUES), nifti(tmp_path / "m.nii", MASK[..., :4])
    with pytest.raises(InputError, match=r"m\.nii is not in the grid of its image .*a\.nii: 6x7x4 .* of 6x7x5 voxels"):
        LoadCased()({"image": image, "label": label})


def test_input_error_is_found_below_the_exceptions_of_monai(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"")
    with pytest.raises(Exception) as error:  # whatever MONAI raises
        CacheDataset([{"image": str(tmp_path / "a.nii.gz")}], Compose([LoadCased()]), progress=False)
    assert "0 bytes" in str(root_input_error(error.value))


def test_itk_is_only_needed_for_its_formats(tmp_path, monkeypatch):
    """NIfTI needs no ITK; for formats that need it, the message says what to install."""
    monkeypatch.setitem(sys.modules, "itk", None)
    load(nifti(tmp_path / "a.nii", VALUES))
    (tmp_path / "a.mha").write_bytes(b"x")
    refused(tmp_path / "a.mha", "pip install itk")


def test_a_dicom_series_must_be_single_and_complete(tmp_path):
    """ITK would skip a broken slice, stretch the volume over a missing one, and select one of two series."""
    broken = dicom_series(tmp_path / "broken", SERIES)
    (broken / "IM2.dcm").write_bytes((broken / "IM2.dcm").read_bytes()[:-40])
    refused(broken, r"cannot be read, IM2\.dcm first")
    (broken / "IM2.dcm").unlink()
    refused(broken, "slices missing")
    two = dicom_series(tmp_path / "two", SERIES)
    for file in dicom_series(tmp_path / "other", SERIES, uid="1.2.4").iterdir():
        file.rename(two / f"x{file.name}")
    refused(two, "2 DICOM series")


# ---- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, dims, result",
    [
        ((6, 7, 5), 3, (1, 6, 7, 5)),
        ((6, 7, 5, 1), 3, (1, 6, 7, 5)),
        ((6, 7, 1), 3, (1, 6, 7, 1)),
        ((6, 7, 2), 3, (1, 6, 7, 2)),
        ((6, 7), 3, (1, 6, 7, 1)),
        ((6, 7), 2, (1, 6, 7)),
        ((6, 7, 1), 2, (1, 6, 7)),
    ],
)
def test_volumes_may_have_one_slice_or_a_fourth_axis_of_length_1(tmp_path, shape, dims, result):
    """A few slices, one slice, no axis of slices and a fourth axis of length 1 are all read as volumes."""
    array = RNG.rand(*shape)
    scan = load(nifti(tmp_path / "a.nii.gz", array), spatial_dims=dims)
    assert scan.shape == result
    assert scan.dtype == torch.float32
    assert np.allclose(scan.numpy().ravel(), array.ravel())
    assert scan.meta["filename_or_obj"] == str(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint8])
def test_values_and_affine_are_those_of_the_file(tmp_path, name, dtype):
    array = (VALUES * 200).astype(dtype)
    scan = load(nifti(tmp_path / "a.nii.gz", array, AFFINES[name]))
    assert np.array_equal(scan[0].numpy(), array.astype(np.float32))
    assert np.allclose(scan.affine, AFFINES[name], atol=1e-5)


def test_scaled_nifti_is_read_with_its_scale(tmp_path):
    image = nib.Nifti1Image((VALUES * 100).astype(np.int16), np.eye(4))
    image.header.set_slope_inter(2, -10)
    nib.save(image, tmp_path / "a.nii")
    assert np.allclose(load(tmp_path / "a.nii")[0], nib.load(tmp_path / "a.nii").get_fdata())


def test_pictures_are_channels_width_height(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    scan = load(tmp_path / "a.png", spatial_dims=2, channels=3)
    assert np.array_equal(scan.numpy(), PICTURE.transpose(2, 1, 0))


def test_grey_mask_stored_as_rgb_has_one_channel(tmp_path):
    Image.fromarray(np.repeat(PICTURE[..., :1], 3, axis=-1)).save(tmp_path / "a.png")
    label = LoadCased(spatial_dims=2, channels=3)({"label": tmp_path / "a.png"})["label"]
    assert np.array_equal(label.numpy(), PICTURE[None, ..., 0].transpose(0, 2, 1))


def test_a_rounded_affine_of_a_label_becomes_that_of_its_image(tmp_path):
    image = nifti(tmp_path / "a.nii", VALUES, AFFINES["oblique"])
    near = nifti(tmp_path / "near.nii", MASK, AFFINES["oblique"].round(2))
    case = LoadCased()({"image": image, "label": near})
    assert torch.equal(case["label"].affine, case["image"].affine)
    assert np.array_equal(case["label"][0].numpy(), MASK)


@pytest.mark.parametrize("name", ["LPS", "oblique", "sheared"])
@pytest.mark.parametrize("axes", ["LPS", "RAS", "LPI", "SAL", "IPR", "PSL"])
def test_a_label_on_the_same_box_is_reoriented_to_its_image(tmp_path, name, axes):
    """A viewer may save the voxels in another order; no value moves in world coordinates."""
    image = nifti(tmp_path / "a.nii", VALUES, AFFINES[name])
    mask = nib.Nifti1Image(MASK, AFFINES[name])
    turn = nib.orientations.ornt_transform(nib.io_orientation(mask.affine), nib.orientations.axcodes2ornt(tuple(axes)))
    nib.save(mask.as_reoriented(turn), tmp_path / "m.nii")
    case = LoadCased()({"image": image, "label": tmp_path / "m.nii"})
    assert np.array_equal(case["label"][0].numpy(), MASK)
    assert torch.equal(case["label"].affine, case["image"].affine)


@pytest.mark.parametrize(
    "affine",
    [
        np.eye(4),
        affine_of(np.diag([-0.7, -0.9, 3]), (5, -6, 10)),
        affine_of(np.diag([-0.7, -1.2, 3])),
        affine_of(rotation() @ np.diag([-0.7, -0.9, 3])),
    ],
    ids=["none", "a slice off", "other voxels", "turned"],
)
def test_a_label_in_another_place_is_rejected_with_both_grids(tmp_path, affine):
    image, label = nifti(tmp_path / "a.nii", VALUES), nifti(tmp_path / "m.nii", MASK, affine)
    with pytest.raises(InputError, match=r"m\.nii is not in the grid .*of 0\.7x0\.9x3 mm, axes LPS") as error:
        LoadCased()({"image": image, "label": label})
    assert "\n" not in str(error.value)
    assert str(error.value).count("voxels of") == 2


def with_forms(path: Path, qform: np.ndarray, sform: np.ndarray) -> Path:
    image = nib.Nifti1Image(VALUES, AFFINES["LPS"])
    image.set_qform(qform, 1)
    image.set_sform(sform, 1)
    nib.save(image, path)
    return path


@pytest.mark.parametrize(
    "qform",
    [
        AFFINES["RAS"],
        affine_of(np.diag([-0.7, -0.9, 3]), (5, -6, 70)),
        affine_of(np.diag([-0.72, -0.9, 3])),
        affine_of(rotation() @ np.diag([-0.7, -0.9, 3])),
        affine_of(np.diag([0.7, -0.9, 3])),
    ],
    ids=["flipped", "shifted", "stretched", "turned", "mirrored"],
)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_different_qform_and_sform_are_rejected_with_both(tmp_path, qform, ending):
    refused(with_forms(tmp_path / f"a{ending}", qform, AFFINES["LPS"]), "two places: its qform says .*, its sform")


def test_qform_and_sform_may_differ_by_rounding(tmp_path):
    load(with_forms(tmp_path / "a.nii", AFFINES["oblique"], AFFINES["oblique"] + 0.001))


def test_label_values_are_rounded_to_whole_numbers(tmp_path):
    label = LoadCased()({"label": nifti(tmp_path / "m.nii", MASK * np.float32(0.9999))})["label"]
    assert np.array_equal(label[0].numpy(), MASK)
    refused(nifti(tmp_path / "n.nii", MASK * np.float32(0.9985)), r"include 0\.9985", key="label")


def test_each_key_can_have_a_reader(tmp_path):
    class Negative(PILReader):
        def get_data(self, img):
            array, meta = super().get_data(img)
            return 255 - array, meta

    for name in ("a.png", "m.png"):
        Image.fromarray(PICTURE[..., 0] // 128).save(tmp_path / name)
    case = LoadCased(spatial_dims=2, reader=[Negative(), None])(
        {"image": tmp_path / "a.png", "label": tmp_path / "m.png"}
    )
    assert torch.equal(case["image"].as_tensor(), 255 - case["label"].as_tensor())


def test_a_batch_can_contain_several_formats(tmp_path):
    itk = pytest.importorskip("itk")
    nifti(tmp_path / "a.nii.gz", VALUES)
    itk.imwrite(itk.image_from_array(np.ascontiguousarray(VALUES.T)), str(tmp_path / "b.nrrd"))
    batch = next(iter(DataLoader(CacheDataset(find_scans(tmp_path), LoadCased(), progress=False), batch_size=2)))
    assert batch["image"].shape == (2, 1, 6, 7, 5)
    assert [item["case"] for item in decollate_batch(batch)] == ["a", "b"]
