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
"""Scans without masks: what in a folder is a scan, and that each has a name of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from site_folders import names, touch

from shared_iopfl.errors import InputError
from shared_iopfl.scan_files import find_scans

DICOM = bytes(128) + b"DICM" + bytes(8)


def test_find_scans_in_a_mixed_folder(tmp_path):
    """Files, DICOM series folders at any depth and an images folder are scans; masks and odd files are not."""
    touch(tmp_path, "a.nii.gz", "b.mha", "c.png", "a_segmentation.nii.gz", "notes.txt", ".hidden.nii", "masks/c.png")
    touch(tmp_path, "images/d.jpg", "results/e.nii.gz")
    touch(tmp_path, "patient1/study/1.dcm", "patient1/study/2.dcm")
    touch(tmp_path, "patient2/1.2.840.5", "patient2/DICOMDIR", content=DICOM)
    touch(tmp_path, "DICOMDIR", content=DICOM)
    (tmp_path / "patient2" / "loop").symlink_to(tmp_path)
    assert names(find_scans(tmp_path)) == ["a", "b", "c", "d", "study", "patient2"]
    assert all(Path(scan["image"]).exists() for scan in find_scans(tmp_path))


def test_find_scans_names_are_unique_and_tell_where_they_come_from(tmp_path):
    touch(tmp_path, "a.nii.gz", "a.mha", "p1/T2/1.dcm", "p2/T2/1.dcm", "p1_T2.nii")
    assert sorted(names(find_scans(tmp_path))) == ["a_mha", "a_nii_gz", "p1_T2", "p1_T2_2", "p2_T2"]


def test_find_scans_takes_one_file_or_one_series(tmp_path):
    touch(tmp_path, "s/IM0", content=DICOM)
    touch(tmp_path, "x/a.nii.gz")
    assert find_scans(tmp_path / "s") == [{"image": str(tmp_path / "s"), "case": "s"}]
    assert names(find_scans(tmp_path / "s" / "IM0")) == ["IM0"]
    assert names(find_scans(tmp_path / "x" / "a.nii.gz")) == ["a"]


def test_find_scans_refuses_nothing_in_one_line(tmp_path):
    touch(tmp_path, "notes.txt")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "gone"):
        with pytest.raises(InputError) as error:
            find_scans(path)
        assert str(path) in str(error.value)
