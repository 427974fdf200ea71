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
"""Cases are shown the right way up, with every outline where its mask ends."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from shared_iopfl.report import pictures


@pytest.mark.parametrize("order", ["RAS", "LPS", "SAL", "PIR"])
def test_volumes_show_in_radiological_convention_however_they_are_stored(tmp_path, order):
    """The patient's right is on the picture's left, anterior is up, slices start at the feet."""
    scan = np.zeros((20, 16, 4), np.float32)  # indices grow to the patient's right, to the front and to the head
    scan[10:13, 11:13, 2] = 100
    mask = (scan > 0).astype(np.uint8)
    scan[14, 9, 2] = 100  # beside the organ, to its right and behind it
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(order))
    )
    for name, array in (("scan", scan), ("mask", mask)):
        nib.save(nib.Nifti1Image(array, np.diag([0.5, 0.8, 3, 1])).as_reoriented(turn), tmp_path / f"{name}.nii.gz")
    case = pictures.load_case(tmp_path / "scan.nii.gz", {"global": tmp_path / "mask.nii.gz"})
    (view,) = pictures.case_views(case, "global", "title")
    assert (case.is_volume, case.aspect, view.index) == (True, pytest.approx(1.6), 2)
    panel = pictures.overlay_picture([view], "global", pictures.colours(["global"])).axes[0]
    picture = np.asarray(panel.get_images()[0].get_array())
    assert picture.shape == (10, 10)  # zoomed in on the organ
    expected = np.zeros((10, 10), bool)
    expected[3:5, 3:6] = expected[6, 1] = True
    np.testing.assert_array_equal(picture > 0, expected)
    assert [text.get_text() for text in sorted(panel.texts, key=lambda text: text.get_position()[0])] == ["R", "L"]
    outline = panel.collections[0].get_paths()[0].get_extents()  # half a pixel around the mask
    assert (outline.x0, outline.x1, outline.y0, outline.y1) == (2.5, 5.5, 2.5, 4.5)


def test_pictures_in_colour_are_whole_and_upright_with_both_classes_outlined(tmp_path):
    photograph = np.full((12, 18, 3), (60, 40, 20), np.uint8)
    photograph[2, 15] = (255, 128, 0)
    mask = np.zeros((12, 18), np.uint8)
    mask[3:9, 3:9], mask[5:7, 5:7] = 1, 2
    Image.fromarray(photograph).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = {"reference": tmp_path / "mask.png", "routed": tmp_path / "mask.png"}
    case = pictures.load_case(tmp_path / "image.png", files)
    (view,) = pictures.case_views(case, "routed", "title", disagreement=True)
    panel = pictures.overlay_picture([view], "routed", pictures.colours(["routed"])).axes[0]
    picture = np.asarray(panel.get_images()[0].get_array())
    assert np.abs(picture - photograph / 255).max() < 1e-6
    extents = [collection.get_paths()[0].get_extents().intervalx for collection in panel.collections]
    assert np.array_equal(extents, [(2.5, 8.5), (4.5, 6.5)] * 2)
    assert not panel.texts  # a photograph has no patient's right


def test_worst_case_shows_the_slices_of_largest_area_and_of_largest_disagreement():
    reference, predicted = np.zeros((2, 8, 8, 5), np.uint8)
    reference[2:6, 2:6, 3] = predicted[2:6, 2:6, 3] = 1
    predicted[1:3, 1:3, 0] = 1
    case = pictures.CaseImages(np.ones((1, 8, 8, 5)), {"reference": reference, "routed": predicted}, 1.0, True)
    assert [view.index for view in pictures.case_views(case, "routed", "", disagreement=True)] == [3, 0]
    assert [view.index for view in pictures.case_views(case, "routed", "")] == [3]
    right = pictures.CaseImages(case.image, {"reference": reference, "routed": reference}, 1.0, True)
    assert [view.index for view in pictures.case_views(right, "routed", "", disagreement=True)] == [3]
    del case.masks["reference"]  # of unlabelled cases the largest prediction
    assert [view.index for view in pictures.case_views(case, "routed", "", disagreement=True)] == [3]


def test_a_model_has_its_own_colour_whatever_else_is_shown():
    few, many = pictures.colours(["routed"]), pictures.colours(["soup", "global", "tent", "routed", "BIDMC", "local"])
    assert all(many[model] == few[model] for model in few)
    assert len(set(many.values())) == len(many) == 7


@pytest.mark.parametrize("coding", [(0, 1, 2), (255, 128, 0)])
def test_a_reference_is_outlined_alike_however_its_file_codes_it(tmp_path, coding):
    """As the public fundus sets do: 0, 1, 2 from the outside in, or 255, 128, 0."""
    classes = np.zeros((20, 30), int)
    classes[3:15, 3:20], classes[6:12, 8:14] = 1, 2
    Image.fromarray(np.full((20, 30, 3), 40, np.uint8)).save(tmp_path / "image.png")
    Image.fromarray(classes.astype(np.uint8)).save(tmp_path / "mask.png")
    Image.fromarray(np.array(coding, np.uint8)[classes]).save(tmp_path / "reference.png")
    files = {"reference": tmp_path / "reference.png", "routed": tmp_path / "mask.png"}
    case = pictures.load_case(tmp_path / "image.png", files)
    views = pictures.case_views(case, "routed", "title")
    panel = pictures.overlay_picture(views, "routed", pictures.colours(["routed"])).axes[0]
    extents = [tuple(collection.get_paths()[0].get_extents().intervalx) for collection in panel.collections]
    assert sorted(extents) == [(2.5, 19.5)] * 2 + [(7.5, 13.5)] * 2


def test_a_photograph_is_shown_as_the_camera_says_with_the_mask_that_lies_on_it(tmp_path):
    """EXIF orientation: masks are written on the upright picture, so the picture has to be shown upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(np.full((20, 30, 3), 40, np.uint8)).save(tmp_path / "image.jpg", exif=exif)
    Image.fromarray(np.ones((30, 20), np.uint8)).save(tmp_path / "mask.png")
    case = pictures.load_case(tmp_path / "image.jpg", {"routed": tmp_path / "mask.png"})
    assert case.image.shape[1:] == case.masks["routed"].shape == (20, 30, 1)  # width, height
