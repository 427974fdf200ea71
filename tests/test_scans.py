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
"""Scans: what cannot be used is refused in one line, and a mask lies on its scan voxel by voxel, header and all."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, MetaTensor, PILReader, decollate_batch
from monai.transforms import Compose, Invertd, Orientationd, ResizeWithPadOrCropd, Spacingd
from PIL import Image

from shared_iopfl.errors import InputError, root_input_error
from shared_iopfl.scans import LoadCased, SaveMaskd, check_writable
from shared_iopfl.sites import find_scans

RNG = np.random.RandomState(0)
VALUES = RNG.rand(6, 7, 5).astype(np.float32)
MASK = (VALUES > 0.5).astype(np.uint8)
PICTURE = (RNG.rand(20, 30, 3) * 255).astype(np.uint8)  # height, width: not the same, so that a swap shows


def rotation(angle: float = 0.3) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def affine_of(matrix: np.ndarray, origin: tuple = (5, -6, 7)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix, origin
    return affine


AFFINES = {
    "RAS": affine_of(np.diag([0.7, 0.9, 3])),
    "LPS": affine_of(np.diag([-0.7, -0.9, 3])),
    "permuted": affine_of(np.array([[0, 0, 3], [-0.7, 0, 0], [0, -0.9, 0]])),
    "oblique": affine_of(rotation() @ np.diag([-0.7, 0.9, 3])),
    "sheared": affine_of(np.array([[0.7, 0.2, 0], [0, 0.9, 0], [0, 0, 3]])),
}


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINES["LPS"]) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def load(path: Path, **options) -> MetaTensor:
    return LoadCased("image", **options)({"image": str(path)})["image"]


def refused(path: Path, what: str, key: str = "image", **options) -> None:
    with pytest.raises(InputError, match=what) as error:
        LoadCased(**options)({key: str(path)})
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.png", "a.jpg", "a.mha", "a.nrrd", "a.dcm"])
def test_files_that_are_no_scans(tmp_path, name):
    """Missing, empty and with the wrong content, for each kind of ending."""
    if name.endswith(("mha", "nrrd", "dcm")):
        pytest.importorskip("itk")
    path = tmp_path / name
    refused(path, "no such file")
    path.write_bytes(b"")
    refused(path, "0 bytes")
    path.write_bytes(b"not a scan " * 100)
    refused(path, "cannot be read as a scan")


def test_other_kinds_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    refused(tmp_path / "a.txt", "expected DICOM or nii.gz")
    (tmp_path / "folder").mkdir()
    pytest.importorskip("itk")
    refused(tmp_path / "folder", "no DICOM files")


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.png", "a.jpg", "a.mha", "a.nrrd"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_truncated_files(tmp_path, name, kept):
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
def test_images_that_cannot_be_used(tmp_path, array, what):
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
def test_labels_that_cannot_be_used(tmp_path, array, what):
    refused(nifti(tmp_path / "a.nii.gz", array), what, key="label")


@pytest.mark.parametrize("value", [0.0, np.nan])
@pytest.mark.parametrize("field", ["srow_x", "pixdim"])
def test_broken_affines(tmp_path, value, field):
    path = nifti(tmp_path / "a.nii", VALUES)
    header = nib.load(path).header.copy()
    if field == "pixdim":
        header["sform_code"] = header["qform_code"] = 0
        header["pixdim"][1:4] = value
    else:
        header["srow_x"] = value
    content = path.read_bytes()
    path.write_bytes(header.binaryblock + content[len(header.binaryblock) :])
    refused(path, "mend its header")


def test_colours_are_counted(tmp_path):
    Image.fromarray(PICTURE[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(PICTURE).save(tmp_path / "colour.png")
    refused(tmp_path / "grey.png", "expected a 2D picture of 3 channels", spatial_dims=2, channels=3)
    refused(tmp_path / "colour.png", "expected a 2D picture of 1 channel, got", spatial_dims=2)
    refused(tmp_path / "colour.png", "expected a 2D picture of 1 channel, got", key="label", spatial_dims=2, channels=3)


def test_label_of_another_shape(tmp_path):
    """Both files are named."""
    image, label = nifti(tmp_path / "a.nii", VALUES), nifti(tmp_path / "m.nii", MASK[..., :4])
    with pytest.raises(InputError, match=r"m\.nii has shape \(6, 7, 4\) but its image .*a\.nii has \(6, 7, 5\)"):
        LoadCased()({"image": image, "label": label})


def test_input_error_is_found_under_what_monai_wraps_around_it(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"")
    with pytest.raises(Exception) as error:  # whatever MONAI raises
        CacheDataset([{"image": str(tmp_path / "a.nii.gz")}], Compose([LoadCased()]), progress=False)
    assert "0 bytes" in str(root_input_error(error.value))


def test_without_itk(tmp_path, monkeypatch):
    """NIfTI needs no ITK; what does says what to install."""
    monkeypatch.setitem(sys.modules, "itk", None)
    load(nifti(tmp_path / "a.nii", VALUES))
    (tmp_path / "a.mha").write_bytes(b"x")
    refused(tmp_path / "a.mha", "pip install itk")


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
def test_shapes(tmp_path, shape, dims, result):
    """Few slices, one slice, no slice axis and a fourth axis of length 1 are volumes like any other."""
    array = RNG.rand(*shape)
    scan = load(nifti(tmp_path / "a.nii.gz", array), spatial_dims=dims)
    assert scan.shape == result
    assert scan.dtype == torch.float32
    assert np.allclose(scan.numpy().ravel(), array.ravel())
    assert scan.meta["filename_or_obj"] == str(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint8])
def test_values_and_affine_are_the_files(tmp_path, name, dtype):
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


def test_label_lies_in_its_images_grid(tmp_path, caplog):
    """A label's rounded affine is replaced silently, one that lies elsewhere with a single warning."""
    image = nifti(tmp_path / "a.nii", VALUES, AFFINES["oblique"])
    near = nifti(tmp_path / "near.nii", MASK, AFFINES["oblique"].round(2))
    far = nifti(tmp_path / "far.nii", MASK, np.eye(4))
    loader = LoadCased()
    with caplog.at_level(logging.WARNING, "shared_iopfl"):
        case = loader({"image": image, "label": near})
        assert not caplog.records
        for _ in range(2):
            case = loader({"image": image, "label": far})
    assert len(caplog.records) == 1
    assert torch.equal(case["label"].affine, case["image"].affine)
    assert np.array_equal(case["label"][0].numpy(), MASK)


def test_readers_can_be_given_one_a_key(tmp_path):
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


def test_formats_mix_in_one_batch(tmp_path):
    itk = pytest.importorskip("itk")
    nifti(tmp_path / "a.nii.gz", VALUES)
    itk.imwrite(itk.image_from_array(np.ascontiguousarray(VALUES.T)), str(tmp_path / "b.nrrd"))
    batch = next(iter(DataLoader(CacheDataset(find_scans(tmp_path), LoadCased(), progress=False), batch_size=2)))
    assert batch["image"].shape == (2, 1, 6, 7, 5)
    assert [item["case"] for item in decollate_batch(batch)] == ["a", "b"]


# ---- what is written ------------------------------------------------------------------------------------------------


def threshold(case: dict, save: SaveMaskd, level: float) -> Path:
    """Serve a case as a bundle does: a batch, a prediction, the decollated case, the mask's file."""
    batch = next(iter(DataLoader([case], batch_size=1)))
    batch["pred"] = (batch["image"][:, :1] > level).to(torch.float32)
    return Path(save(decollate_batch(batch)[0])["pred_file"])


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("shape", [(6, 7, 5), (6, 7, 5, 1), (6, 7, 1), (6, 7)])
def test_nifti_mask_lies_on_its_scan(tmp_path, name, ending, shape):
    """Same format, shape, qform, sform, their codes and units; its own type and no display window."""
    scan = nib.Nifti1Image(RNG.rand(*shape).astype(np.float32), AFFINES[name])
    scan.set_sform(AFFINES[name], code=1)
    scan.set_qform(AFFINES["oblique"], code=3)
    scan.header.set_xyzt_units("mm")
    scan.header["cal_max"] = 1000
    scan.header.set_slope_inter(0.5, 3)
    nib.save(scan, tmp_path / f"a{ending}")
    written = threshold(LoadCased()({"image": tmp_path / f"a{ending}"}), SaveMaskd(output_dir=tmp_path / "out"), 0.5)
    assert written == tmp_path / "out" / f"a{ending}"
    scan, mask = nib.load(tmp_path / f"a{ending}"), nib.load(written)
    assert np.array_equal(mask.dataobj, scan.get_fdata() > 0.5)
    assert mask.get_data_dtype() == np.uint8
    for field in ("qform_code", "sform_code", "pixdim", "srow_x", "srow_y", "srow_z", "quatern_b", "xyzt_units", "dim"):
        assert np.array_equal(mask.header[field], scan.header[field]), field
    assert mask.header["cal_max"] == 0


@pytest.mark.parametrize("name", [name for name in AFFINES if name != "sheared"])
def test_mask_comes_back_through_a_bundles_transforms(tmp_path, name):
    """Reoriented, resampled and padded, predicted there, inverted: the mask is that of the scan's own grid."""
    blocks = np.kron(RNG.rand(3, 4, 3) > 0.5, np.ones((4, 4, 4))).astype(np.float32)
    path = nifti(tmp_path / "a.nii.gz", blocks, AFFINES[name])
    before = Compose(
        [
            LoadCased("image"),
            Orientationd("image", "RAS", labels=None),
            Spacingd("image", (0.6, 0.6, 0.6), mode="nearest"),
            ResizeWithPadOrCropd("image", (64, 64, 64)),
        ]
    )
    batch = next(iter(DataLoader([before({"image": str(path), "case": "a"})], batch_size=1)))
    batch["pred"] = (batch["image"] > 0.5).to(torch.float32)
    after = Compose([Invertd("pred", before, "image", nearest_interp=True), SaveMaskd(output_dir=tmp_path / "out")])
    mask = nib.load(after(decollate_batch(batch)[0])["pred_file"])
    assert np.mean(np.asarray(mask.dataobj) == blocks) > 0.95
    assert np.array_equal(mask.affine, nib.load(path).affine)


@pytest.mark.parametrize("ending", [".mha", ".nrrd", ".mhd"])
@pytest.mark.parametrize("shape", [(5, 7, 6), (1, 7, 6), (7, 6)])
def test_itk_mask_lies_on_its_scan(tmp_path, ending, shape):
    """Origin, spacing and direction are the scan's own, and so is every voxel's place."""
    itk = pytest.importorskip("itk")
    array = (RNG.rand(*shape) * 100).astype(np.int16)
    scan = itk.image_from_array(array)
    scan.SetOrigin([1.5, -2.25, 3.125][: len(shape)])
    scan.SetSpacing([0.7, 0.9, 3.3][: len(shape)])
    if len(shape) == 3:
        scan.SetDirection(itk.matrix_from_array(rotation() @ np.diag([-1.0, 1.0, -1.0])))
    itk.imwrite(scan, str(tmp_path / f"a{ending}"))
    written = threshold(LoadCased()({"image": tmp_path / f"a{ending}"}), SaveMaskd(output_dir=tmp_path / "out"), 50)
    assert written.name == f"a{ending}".replace("mhd", "mha")
    assert os.listdir(written.parent) == [written.name]
    scan, mask = itk.imread(str(tmp_path / f"a{ending}")), itk.imread(str(written))
    assert np.array_equal(itk.array_from_image(mask), array > 50)
    for get in ("GetOrigin", "GetSpacing"):
        assert np.allclose(getattr(mask, get)(), getattr(scan, get)(), rtol=0, atol=1e-12)
    directions = [itk.array_from_matrix(image.GetDirection()) for image in (mask, scan)]
    assert np.allclose(*directions, rtol=0, atol=1e-12)


def dicom_series(folder: Path, array: np.ndarray, uid: str = "1.2.3") -> Path:
    """An oblique series of slices, (slice, row, column)."""
    itk = pytest.importorskip("itk")
    folder.mkdir()
    direction = rotation()
    for k, slice_values in enumerate(array):
        image = itk.image_from_array(slice_values[None])
        position = np.array([5, 6, 7]) + 3.0 * k * direction[:, 2]
        tags = image.GetMetaDataDictionary()
        tags["0020|000d"], tags["0020|000e"], tags["0008|0018"] = "1.2", uid, f"{uid}.{k}"
        tags["0008|0060"], tags["0008|0021"], tags["0020|0013"] = "MR", "20200101", str(k)
        tags["0020|0032"] = "\\".join(f"{value:.6f}" for value in position)
        tags["0020|0037"] = "\\".join(f"{value:.6f}" for value in direction[:, :2].T.ravel())
        tags["0028|0030"], tags["0018|0050"], tags["0018|0088"] = "0.9\\0.7", "3.0", "3.0"
        image.SetOrigin(position.tolist())
        image.SetSpacing([0.7, 0.9, 3.0])
        image.SetDirection(itk.matrix_from_array(direction))
        image.SetMetaDataDictionary(tags)
        io = itk.GDCMImageIO.New()
        io.KeepOriginalUIDOn()
        itk.ImageFileWriter.New(image, FileName=str(folder / f"IM{k}.dcm"), ImageIO=io).Update()
    return folder


SERIES = (VALUES.T * 1000).astype(np.int16)


def test_dicom_mask_lies_on_its_series(tmp_path):
    """The mask is a NIfTI file whose voxels have the places in the patient that ITK gives those of the series."""
    itk = pytest.importorskip("itk")
    folder = dicom_series(tmp_path / "T2", SERIES)
    [case] = find_scans(tmp_path)
    written = threshold(LoadCased()(case), SaveMaskd(output_dir=tmp_path / "out"), 500)
    assert written == tmp_path / "out" / "T2.nii.gz"
    scan, mask = itk.imread([str(folder / f"IM{k}.dcm") for k in range(5)]), itk.imread(str(written))
    assert np.array_equal(itk.array_from_image(mask), SERIES > 500)
    for index in ([0, 0, 0], [5, 6, 4]):
        places = [image.TransformIndexToPhysicalPoint(index) for image in (scan, mask)]
        assert np.allclose(*places, atol=1e-3)


def test_dicom_series_must_be_one_and_whole(tmp_path):
    """ITK would pass over a broken slice, stretch over a missing one and take one series of two."""
    broken = dicom_series(tmp_path / "broken", SERIES)
    (broken / "IM2.dcm").write_bytes((broken / "IM2.dcm").read_bytes()[:-40])
    refused(broken, r"cannot be read, IM2\.dcm first")
    (broken / "IM2.dcm").unlink()
    refused(broken, "slices missing")
    two = dicom_series(tmp_path / "two", SERIES)
    for file in dicom_series(tmp_path / "other", SERIES, uid="1.2.4").iterdir():
        file.rename(two / f"x{file.name}")
    refused(two, "2 DICOM series")


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.jpg"])
def test_picture_mask_lies_on_its_picture(tmp_path, name):
    """Opened by PIL side by side, mask and picture have the same pixel at the same place."""
    Image.fromarray(PICTURE).save(tmp_path / name)
    case = LoadCased(spatial_dims=2, channels=3)({"image": tmp_path / name, "case": "eye"})
    written = threshold(case, SaveMaskd(output_dir=tmp_path / "out"), 128)
    assert written == tmp_path / "out" / "eye.png"
    mask = Image.open(written)
    assert mask.mode == "L"
    assert np.array_equal(np.asarray(mask), np.asarray(Image.open(tmp_path / name))[..., 0] > 128)


def test_mask_of_a_picture_read_upright(tmp_path):
    """A reader that obeys EXIF sees another shape than the file's: the mask is that of the upright picture."""

    class Upright(PILReader):
        def __init__(self):
            super().__init__(converter=lambda picture: picture.transpose(Image.Transpose.ROTATE_270))

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PICTURE).save(tmp_path / "a.png", exif=exif)
    case = LoadCased(spatial_dims=2, channels=3, reader=Upright())({"image": tmp_path / "a.png"})
    mask = np.asarray(Image.open(threshold(case, SaveMaskd(output_dir=tmp_path / "out"), 128)))
    assert np.array_equal(mask, np.rot90(PICTURE[..., 0], -1) > 128)


def predicted(tmp_path: Path, name: str = "a.nii.gz") -> dict:
    case = LoadCased("image")({"image": nifti(tmp_path / name, VALUES)})
    return {**case, "pred": (case["image"] > 0.5).to(torch.uint8)}


def test_scans_of_one_name_do_not_overwrite_each_other(tmp_path, caplog):
    """Two scans give two files and a warning; one scan served twice gives one file."""
    save = SaveMaskd(output_dir=tmp_path / "out")
    for site in ("A", "B"):
        (tmp_path / site).mkdir()
        data = predicted(tmp_path, f"{site}/a.nii.gz")
        for _ in range(2):
            save(data)
    assert sorted(os.listdir(tmp_path / "out")) == ["a.nii.gz", "a_2.nii.gz"]
    assert len(caplog.records) == 1
    assert str(tmp_path / "B" / "a.nii.gz") in caplog.text


def test_names_are_filled_in(tmp_path):
    data = {**predicted(tmp_path), "case": "Case7", "site": "UCL"}
    assert SaveMaskd(output_dir=tmp_path, name="{site}_{case}_pred")(data)["pred_file"].endswith(
        "/UCL_Case7_pred.nii.gz"
    )
    with pytest.raises(InputError, match=r"known of .* are case"):
        SaveMaskd(output_dir=tmp_path, name="{ward}")(data)


def test_a_scan_is_never_replaced_by_its_mask(tmp_path):
    data = predicted(tmp_path)
    before = (tmp_path / "a.nii.gz").read_bytes()
    with pytest.raises(InputError, match="replace the scan itself"):
        SaveMaskd(output_dir=tmp_path)(data)
    assert (tmp_path / "a.nii.gz").read_bytes() == before


@pytest.mark.parametrize(
    "spoil, error",
    [
        (lambda mask: mask * float("nan"), InputError),
        (lambda mask: mask * 0.5, ValueError),
        (lambda mask: mask * -1.0, ValueError),
        (lambda mask: mask * 300.0, ValueError),
        (lambda mask: mask.repeat(2, 1, 1, 1), ValueError),
        (lambda mask: mask[:, :3], ValueError),
        (lambda mask: MetaTensor(mask.as_tensor(), affine=torch.eye(4)), ValueError),
        (lambda mask: mask.permute(0, 2, 1, 3), ValueError),
    ],
)
def test_masks_that_are_not_written(tmp_path, spoil, error):
    """NaN, fractions, several channels, another grid: nothing is left in the folder."""
    data = predicted(tmp_path)
    with pytest.raises(error):
        SaveMaskd(output_dir=tmp_path / "out")({**data, "pred": spoil(data["pred"].to(torch.float32))})
    assert not list((tmp_path / "out").glob("*"))


# ---- where it is written --------------------------------------------------------------------------------------------


def test_check_writable_makes_the_folder_and_leaves_it_empty(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())


@contextmanager
def no_room(folder: Path, reason: str) -> Iterator[Path]:
    """A folder to which a mask cannot be written."""
    if reason == "a file in the way":
        folder.write_text("")
        yield folder / "sub"
    elif reason == "read-only":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        folder.mkdir(mode=0o500)
        yield folder
    else:
        resource = pytest.importorskip("resource")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # files end there, as on a disk that is full
        try:
            yield folder
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("reason", ["a file in the way", "read-only", "full"])
@pytest.mark.parametrize("kind", ["nii", "nii.gz", "png", "mha", "nrrd"])
def test_no_room(tmp_path, kind, reason):
    """One line at once from check_writable, one line from SaveMaskd, and no half file."""
    path = tmp_path / f"a.{kind}"
    array = (RNG.rand(200, 200) * 255).astype(np.uint8)
    if kind.startswith("nii"):
        nifti(path, array)
    elif kind == "png":
        Image.fromarray(array).save(path)
    else:
        itk = pytest.importorskip("itk")
        itk.imwrite(itk.image_from_array(array), str(path))
    data = LoadCased("image")({"image": path})
    data["pred"] = (data["image"] > 100).to(torch.uint8)
    with no_room(tmp_path / "out", reason) as folder:
        with pytest.raises(InputError, match="cannot write to"):
            check_writable(folder)
        with pytest.raises(InputError, match="cannot write to") as error:
            SaveMaskd(output_dir=folder)(data)
    assert "\n" not in str(error.value)
    assert not folder.is_dir() or not list(folder.iterdir())
