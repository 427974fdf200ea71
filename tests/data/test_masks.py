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
"""Masks fit their scans voxel by voxel, including the header; they are written completely and never over a scan."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor, PILReader, decollate_batch
from monai.transforms import Compose, Invertd, Orientationd, ResizeWithPadOrCropd, Spacingd
from PIL import Image
from tiny_scans import AFFINES, PICTURE, RNG, SERIES, VALUES, dicom_series, nifti, rotation

from shared_iopfl.data.loading import LoadCased
from shared_iopfl.data.masks import KeepMiddleComponent, KeepMiddleComponentd, SaveMaskd
from shared_iopfl.data.scan_files import find_scans
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import check_writable


def threshold(case: dict, save: SaveMaskd, level: float) -> Path:
    """Process a case as a bundle does: a batch, a prediction, the decollated case, the mask's file."""
    batch = next(iter(DataLoader([case], batch_size=1)))
    batch["pred"] = (batch["image"][:, :1] > level).to(torch.float32)
    return Path(save(decollate_batch(batch)[0])["pred_file"])


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("shape", [(6, 7, 5), (6, 7, 5, 1), (6, 7, 1), (6, 7)])
def test_nifti_mask_fits_its_scan(tmp_path, name, ending, shape):
    """Format, shape, qform, sform, their codes and units are those of the scan; the type is the mask's own."""
    scan = nib.Nifti1Image(RNG.rand(*shape).astype(np.float32), AFFINES[name])
    scan.set_sform(AFFINES[name], code=1)
    scan.set_qform(AFFINES[name], code=0 if name == "sheared" else 3)  # which no qform can hold
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
def test_inverted_transforms_restore_the_mask_in_the_grid_of_the_scan(tmp_path, name):
    """The mask is predicted on the reoriented, resampled and padded scan, and the transforms are inverted."""
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
def test_itk_mask_fits_its_scan(tmp_path, ending, shape):
    """Origin, spacing and direction are those of the scan, and so is the position of every voxel."""
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


def test_dicom_mask_fits_its_series(tmp_path):
    """The mask is a NIfTI file whose voxels have the positions that ITK gives those of the series."""
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


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.jpg"])
def test_picture_mask_fits_its_picture(tmp_path, name):
    """Both files, opened by PIL, have corresponding pixels at the same position."""
    Image.fromarray(PICTURE).save(tmp_path / name)
    case = LoadCased(spatial_dims=2, channels=3)({"image": tmp_path / name, "case": "eye"})
    written = threshold(case, SaveMaskd(output_dir=tmp_path / "out"), 128)
    assert written == tmp_path / "out" / "eye.png"
    mask = Image.open(written)
    assert mask.mode == "L"
    assert np.array_equal(np.asarray(mask), np.asarray(Image.open(tmp_path / name))[..., 0] > 128)


def test_mask_of_a_picture_read_upright(tmp_path):
    """A reader that applies EXIF returns another shape than the file's: the mask is that of the upright picture."""

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


def test_masks_of_scans_of_the_same_name_do_not_overwrite_each_other(tmp_path, caplog):
    """Two scans give two files and a warning; one scan that is processed twice gives one file."""
    save = SaveMaskd(output_dir=tmp_path / "out")
    for site in ("A", "B"):
        (tmp_path / site).mkdir()
        data = predicted(tmp_path, f"{site}/a.nii.gz")
        for _ in range(2):
            save(data)
    assert sorted(os.listdir(tmp_path / "out")) == ["a.nii.gz", "a_2.nii.gz"]
    assert len(caplog.records) == 1
    assert str(tmp_path / "B" / "a.nii.gz") in caplog.text


def test_a_mask_has_the_name_of_its_case(tmp_path):
    data = {**predicted(tmp_path), "case": "Case7"}
    assert SaveMaskd(output_dir=tmp_path)(data)["pred_file"] == str(tmp_path / "Case7.nii.gz")


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
def test_invalid_masks_are_not_written(tmp_path, spoil, error):
    """After NaN, fractions, several channels or another grid, the folder is empty."""
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
def test_a_folder_that_is_not_writable_or_full_is_reported_in_one_line(tmp_path, kind, reason):
    """Both check_writable and SaveMaskd give one line, and leave no incomplete file."""
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


# ---- one component --------------------------------------------------------------------------------------------------


def organs(shape: tuple[int, ...] = (32, 32, 16)) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a gland in the middle of a volume, and a bladder twice its size in the last slices."""
    gland, bladder = torch.zeros(1, *shape), torch.zeros(1, *shape)
    gland[:, 12:20, 12:20, 6:10] = 1
    bladder[:, 10:20, 10:22, 12:] = 1
    return gland, bladder


def test_a_larger_component_in_the_last_slices_is_not_kept():
    gland, bladder = organs()
    assert bladder.sum() > gland.sum()
    assert torch.equal(KeepMiddleComponent()(gland + bladder), gland)


@pytest.mark.parametrize("name", AFFINES)
def test_the_slice_axis_is_found_by_the_affine(name):
    gland, bladder = organs()
    affine = torch.as_tensor(AFFINES[name], dtype=torch.float64)
    slices = int(affine[2, :3].abs().argmax())
    here, there = (each.movedim(3, 1 + slices) for each in (gland, bladder))
    assert torch.equal(KeepMiddleComponent()(MetaTensor(here + there, affine=affine)).as_tensor(), here)


def test_the_position_within_a_slice_has_no_weight():
    gland, _ = organs()
    mask = gland.roll(10, 1)  # at the border of its slices
    mask[:, 10:14, 10:14, 6:10] = 1
    assert torch.equal(KeepMiddleComponent()(mask), gland.roll(10, 1))


def test_a_mask_with_at_most_one_component_is_unchanged():
    _, bladder = organs()
    for mask in (bladder, torch.zeros(1, 8, 8, 4)):
        assert torch.equal(KeepMiddleComponent()(mask), mask)
    diagonal = torch.eye(8)[None, ..., None]  # voxels that touch by a corner belong together
    assert torch.equal(KeepMiddleComponent()(diagonal), diagonal)


def test_a_kept_component_has_the_type_and_the_affine_of_the_mask():
    gland, bladder = organs()
    mask = MetaTensor((gland + bladder).to(torch.uint8), affine=2 * torch.eye(4))
    kept = KeepMiddleComponentd("pred")({"pred": mask})["pred"]
    assert isinstance(kept, MetaTensor) and kept.dtype == torch.uint8 and torch.equal(kept.affine, mask.affine)
