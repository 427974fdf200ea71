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
"""Inference leaves a picture beside each mask: the right slice, the right way up, nothing of the patient in it."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from shared_iopfl.data.loading import LoadCased
from shared_iopfl.data.masks import SaveMaskd
from shared_iopfl.data.photographs.reader import PhotographReader
from shared_iopfl.report import overlays, pictures
from shared_iopfl.report.overlays import SaveOverlayd
from shared_iopfl.utils.errors import InputError


@pytest.fixture
def drawn(monkeypatch):
    """What was handed on to be drawn: the views and the figure's axes."""
    seen = {}
    draw = pictures.overlay_picture

    def spy(views, *args, **kwargs):
        figure = draw(views, *args, **kwargs)
        seen.update(views=views, panel=figure.axes[0])
        return figure

    monkeypatch.setattr(overlays.pictures, "overlay_picture", spy)
    return seen


def volume_case(folder: Path, affine: np.ndarray, mask: np.ndarray, name: str = "p1") -> dict:
    folder.mkdir(exist_ok=True)
    scan = np.random.RandomState(0).rand(*mask.shape).astype(np.float32)
    image = nib.Nifti1Image(scan, affine)
    image.header["descrip"] = b"DOE^JOHN"
    nib.save(image, folder / f"{name}.nii.gz")
    return {**LoadCased("image")({"image": folder / f"{name}.nii.gz"}), "pred": torch.from_numpy(mask)[None]}


def organ(slices: dict[int, int]) -> np.ndarray:
    """A mask (24, 20, 7) of squares, slice -> side, near one corner."""
    mask = np.zeros((24, 20, 7), np.uint8)
    for index, side in slices.items():
        mask[4 : 4 + side, 3 : 3 + side, index] = 1
    return mask


def finish(case: dict, folder: Path) -> Path:
    """Save the mask and the overlay; where the overlay is."""
    data = SaveMaskd(output_dir=folder)(case)
    assert SaveOverlayd(output_dir=folder)(data).keys() == data.keys()
    (path,) = folder.glob("*_overlay.png")
    return path


@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1)])
def test_volume_shows_the_slice_with_the_largest_area_in_radiological_convention(tmp_path, drawn, flips):
    """However the axes are stored: the mask near the first corner shows where the affine says that corner is."""
    affine = np.diag([*np.multiply(flips, (0.5, 0.5, 3.0)), 1.0])
    path = finish(volume_case(tmp_path / "in", affine, organ({1: 4, 2: 6, 3: 5})), tmp_path / "out")
    assert path.name == "p1_overlay.png"
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
    (view,) = drawn["views"]
    assert view.index == (2 if flips[2] > 0 else 4)  # slices are counted from the feet
    assert view.title == f"p1\nslice {view.index + 1}/7, largest area"
    mask = view.case.masks["mask"][..., view.index]
    x, y = np.argwhere(mask).mean(0)
    assert (x > 12) == (flips[0] > 0)  # the first voxel of an axis towards the right is the patient's left
    assert (y > 10) == (flips[1] > 0)
    assert [text.get_text() for text in drawn["panel"].texts] == ["R", "L"]
    assert len(drawn["panel"].collections) == 1


def test_empty_mask_shows_the_middle_slice_without_outline_and_says_so(tmp_path, drawn):
    path = finish(volume_case(tmp_path / "in", np.eye(4), organ({})), tmp_path / "out")
    assert path.is_file()
    assert [(view.index, view.title) for view in drawn["views"]] == [(3, "p1\nslice 4/7, nothing found")]
    assert not drawn["panel"].collections


@pytest.mark.parametrize("classes, outlines", [((0, 1, 2), 2), ((0, 1, 1), 1), ((0, 0, 0), 0)])
def test_picture_is_whole_with_every_class_outlined(tmp_path, drawn, classes, outlines):
    nested = np.zeros((30, 40), int)
    nested[5:20, 6:30], nested[8:15, 10:20] = 1, 2
    (tmp_path / "in").mkdir()
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 30, 3)).astype(np.uint8)).save(tmp_path / "in/p.png")
    case = LoadCased("image", spatial_dims=2, channels=3, reader=PhotographReader())({"image": tmp_path / "in/p.png"})
    mask = np.array(classes, np.uint8)[nested]
    finish({**case, "pred": torch.from_numpy(mask)[None]}, tmp_path / "out")
    assert np.asarray(drawn["panel"].get_images()[0].get_array()).shape == (40, 30, 3)
    assert [view.title for view in drawn["views"]] == ["p" if outlines else "p\nnothing found"]
    extents = [collection.get_paths()[0].get_extents() for collection in drawn["panel"].collections]
    assert [(e.x0, e.y0, e.x1, e.y1) for e in extents] == [(4.5, 5.5, 19.5, 29.5), (7.5, 9.5, 14.5, 19.5)][:outlines]


def test_nothing_of_the_scan_but_the_name_of_the_case_is_in_the_file(tmp_path):
    path = finish(volume_case(tmp_path / "doe", np.eye(4), organ({2: 5})), tmp_path / "out")
    content = path.read_bytes()
    assert not any(private in content for private in (b"DOE", b"doe", str(tmp_path).encode(), b".nii", b"tEXt"))
    with Image.open(path) as picture:
        assert set(picture.info) == {"dpi"}


def test_two_scans_of_one_name_have_an_overlay_each(tmp_path):
    save_mask, save_overlay = SaveMaskd(output_dir=tmp_path / "out"), SaveOverlayd(output_dir=tmp_path / "out")
    for folder in "ab":
        save_overlay(save_mask(volume_case(tmp_path / folder, np.eye(4), organ({2: 5}))))
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"p1_overlay.png", "p1_2_overlay.png"}


def test_a_scan_that_is_gone_is_a_warning_and_the_mask_stays(tmp_path, caplog):
    data = SaveMaskd(output_dir=tmp_path / "out")(volume_case(tmp_path / "in", np.eye(4), organ({2: 5})))
    (tmp_path / "in" / "p1.nii.gz").unlink()
    SaveOverlayd(output_dir=tmp_path / "out")(data)
    assert "no overlay of p1" in caplog.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["p1.nii.gz"]


def test_half_a_picture_is_never_left(tmp_path, monkeypatch):
    data = SaveMaskd(output_dir=tmp_path / "out")(volume_case(tmp_path / "in", np.eye(4), organ({2: 5})))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(InputError, match="disk full"):
        SaveOverlayd(output_dir=tmp_path / "out")(data)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["p1.nii.gz"]


def test_a_scan_is_never_replaced(tmp_path):
    """A scan that is called as the overlay of another case would be."""
    scan = tmp_path / "p_overlay.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 30, 3)).astype(np.uint8)).save(scan)
    case = LoadCased("image", spatial_dims=2, channels=3, reader=PhotographReader())({"image": scan, "case": "p"})
    data = SaveMaskd(output_dir=tmp_path)({**case, "pred": torch.ones(1, 30, 40, dtype=torch.uint8)})
    with pytest.raises(InputError, match="would replace"):
        SaveOverlayd(output_dir=tmp_path)(data)
