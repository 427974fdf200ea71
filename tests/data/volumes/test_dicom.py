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
"""DICOM: a single volume with a known position is read in its grid; other series are rejected with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_scans import SERIES, dicom_report, dicom_series, rotation

from shared_iopfl.data.loading import LoadCased
from shared_iopfl.data.volumes import headers
from shared_iopfl.report.pictures import load_case
from shared_iopfl.utils.errors import InputError

SAGITTAL = np.array([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]])
POSITION, ORIENTATION, SPACING = (b"\x20\x00\x32\x00", b"\x20\x00\x37\x00", b"\x28\x00\x30\x00")


def load(path: Path):
    return LoadCased("image")({"image": str(path)})["image"]


def refused(path: Path, what: str) -> None:
    with pytest.raises(InputError, match=what) as error:
        load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def good(folder: Path) -> None:
    """Check values and position of the series."""
    scan = load(folder)
    assert np.array_equal(scan[0].numpy(), SERIES.T)
    direction, flip = rotation(), np.diag([-1, -1, 1])
    assert np.allclose(scan.affine[:3, :3], flip @ direction @ np.diag([0.7, 0.9, 3]), atol=1e-4)
    assert np.allclose(scan.affine[:3, 3], flip @ [5, 6, 7], atol=1e-4)


def without(folder: Path, *tags: bytes) -> Path:
    """Replace the tags by tags that no reader knows."""
    for file in folder.iterdir():
        data = file.read_bytes()
        for tag in tags:
            assert tag in data
            data = data.replace(tag, tag[:2] + bytes([tag[2] + 1]) + tag[3:], 1)
        file.write_bytes(data)
    return folder


def test_a_series_with_too_many_voxels_is_rejected_unread(tmp_path, monkeypatch):
    itk = pytest.importorskip("itk")
    folder = dicom_series(tmp_path / "scan", SERIES)
    monkeypatch.setattr(headers, "MOST_VOXELS", SERIES.size - 1)
    monkeypatch.setattr(itk, "imread", None)
    refused(folder, "too many voxels")


def test_slices_are_sorted_by_position(tmp_path):
    """The names of the files do not matter."""
    folder = dicom_series(tmp_path / "s", SERIES)
    good(folder)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(folder / f"x{(3 * number) % 5}.dcm")
    good(folder)


@pytest.mark.parametrize("noise", ["3.00000{}", "{}.0", "3{}"])
def test_a_different_text_of_the_slice_thickness_does_not_divide_a_series(tmp_path, noise):
    folder = dicom_series(tmp_path / "s", SERIES, thickness=lambda k: noise.format(k + 1))
    good(folder)
    assert sorted(load_case(folder, {}).image.shape[1:]) == sorted(SERIES.shape)  # as overlays and reports show it


@pytest.mark.parametrize("kind", ["88.22", "88.59", "11.1", "66.4", "104.1", "481.3"])
@pytest.mark.parametrize("name", ["SR.dcm", "0000", "zzz"])
def test_objects_without_voxels_are_ignored_with_a_warning(tmp_path, caplog, kind, name):
    folder = dicom_series(tmp_path / "s", SERIES)
    dicom_report(folder / name, kind)
    good(folder)
    assert any(name in record.getMessage() for record in caplog.records)


def test_a_folder_of_reports_is_not_a_scan(tmp_path):
    (tmp_path / "s").mkdir()
    dicom_report(tmp_path / "s" / "SR.dcm")
    refused(tmp_path / "s", r"no DICOM images, only reports or the like \(SR\.dcm\)")


@pytest.mark.parametrize(
    "tags, what",
    [
        ((POSITION,), r"does not say where IM0\.dcm lies \(no image position\)"),
        ((ORIENTATION,), "no image orientation"),
        ((POSITION, ORIENTATION), "no image position and no image orientation"),
        ((SPACING,), "no pixel spacing"),
    ],
)
@pytest.mark.parametrize("alone", [False, True], ids=["series", "file"])
def test_slices_without_position_are_rejected(tmp_path, tags, what, alone):
    folder = without(dicom_series(tmp_path / "s", SERIES), *tags)
    refused(folder / "IM0.dcm" if alone else folder, what)


def test_two_images_at_one_position_are_rejected(tmp_path):
    """They are phases, echoes or repetitions, or a slice that was copied twice."""
    folder = dicom_series(tmp_path / "s", SERIES)
    dicom_series(folder, SERIES // 2, name="second")
    refused(folder, r"two images at one place, IM0\.dcm and second0\.dcm")
    refused(dicom_series(tmp_path / "t", SERIES, place=lambda k: min(k, 3)), "two images at one place")


def test_a_single_slice_of_a_series_is_rejected(tmp_path):
    """A series with only one slice is accepted, also beside another series."""
    folder = dicom_series(tmp_path / "s", SERIES)
    refused(folder / "IM1.dcm", rf"IM1\.dcm is one of {len(SERIES)} slices of a DICOM series: give their folder, .*s$")
    dicom_series(folder, SERIES[:1], uid="1.2.4", name="second")
    assert LoadCased("image")({"image": folder / "second0.dcm"})["image"].shape[-1] == 1


def test_slices_of_several_directions_are_rejected(tmp_path):
    folder = dicom_series(tmp_path / "s", SERIES)
    dicom_series(folder, SERIES, name="sagittal", direction=SAGITTAL)
    refused(folder, "slices of several directions")


def test_slices_of_several_sizes_are_rejected(tmp_path):
    folder = dicom_series(tmp_path / "s", SERIES)
    dicom_series(folder, SERIES[:, 1:], name="small", place=lambda k: k + 5)
    refused(folder, "slices of several sizes")


@pytest.mark.parametrize("place", [lambda k: k + (k > 2), lambda k: k * (1 + 0.1 * k), lambda k: k**2])
def test_missing_or_uneven_slices_are_rejected(tmp_path, place):
    refused(dicom_series(tmp_path / "s", SERIES, place=place), r"missing or unevenly spaced \(.* mm apart\)")


def test_slices_shifted_against_each_other_are_rejected(tmp_path):
    """With a tilted gantry, the positions do not follow the slices' normal."""
    refused(dicom_series(tmp_path / "s", SERIES, tilt=1), "shifted against each other")
