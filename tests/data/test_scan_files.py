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
"""Search for scans: which files in a folder are scans, and that each has a unique name."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from ignite.engine import Engine
from site_folders import names, touch
from tiny_scans import AFFINES, MASK, SERIES, VALUES, dicom_report, dicom_series, nifti

from shared_iopfl.data.scan_files import PICTURES, NotTaken, find_scans, not_taken
from shared_iopfl.utils.errors import InputError

DICOM = bytes(128) + b"DICM" + bytes(8)


def test_find_scans_in_a_mixed_folder(tmp_path):
    """Files and DICOM series at any depth are scans; masks and files of other kinds are listed as not taken."""
    touch(tmp_path, "a.nii.gz", "b.mha", "a_segmentation.nii.gz", "notes.txt", ".hidden.nii", "masks/c.png")
    touch(tmp_path, "images/d.nii", "results/e.nii.gz")
    touch(tmp_path, "patient1/study/1.dcm", "patient1/study/2.dcm")
    touch(tmp_path, "patient2/1.2.840.5", "patient2/DICOMDIR", content=DICOM)
    touch(tmp_path, "DICOMDIR", content=DICOM)
    (tmp_path / "patient2" / "loop").symlink_to(tmp_path)
    assert names(find_scans(tmp_path)) == ["a", "b", "d", "study", "patient2", "e"]
    assert all(Path(scan["image"]).exists() for scan in find_scans(tmp_path))
    line = not_taken(tmp_path)
    assert line.startswith("not taken: ")
    for part in ("1 files of other kinds (notes.txt)", "(a_segmentation.nii.gz)", "1 folders of masks (masks/)"):
        assert part in line


def label_map(path: Path, kind: type = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nifti(path, MASK.astype(kind))


def scan(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nifti(path, VALUES)


@pytest.mark.parametrize(
    "name",
    [
        *("Case00_mask", "Case00_seg", "Case00-label", "Case00_gt", "Case00_label", "Case00.seg", "CASE00_SEG"),
        *("Case00 Segmentation", "case00-labels", "Case00_mask_1", "seg_Case00", "mask-Case00", "Case00_groundtruth"),
        *("Case00_dseg", "Case00_ground_truth", "mask", "Segmentation", "Case00-labelmap", "Case00_ROI"),
    ],
)
@pytest.mark.parametrize("ending", [".nii.gz", ".mha", ".nii"])
def test_masks_beside_their_scan_are_recognised_by_name(tmp_path, name, ending):
    """Their values do not matter: a soft mask is a mask too."""
    touch(tmp_path, "Case00.nii.gz", f"{name}{ending}")
    assert names(find_scans(tmp_path)) == ["Case00"]
    assert f"1 masks by their names ({name}{ending})" in not_taken(tmp_path)


def test_masks_are_recognised_by_their_few_whole_numbers(tmp_path):
    """Their names do not matter; scans with the name of a mask, and scans with only two values, remain scans."""
    scan(tmp_path / "Case00.nii.gz")
    scan(tmp_path / "t2_seg_study" / "t2_seg.nii.gz")
    nifti(tmp_path / "two_bright_values.nii.gz", MASK * np.float32(1e6))
    nifti(tmp_path / "halves.nii.gz", MASK * np.float32(0.5))
    nifti(tmp_path / "constant.nii.gz", MASK * np.float32(0))
    for number, kind in enumerate((np.uint8, np.int16, np.float32, np.float64)):
        label_map(tmp_path / f"predictions/p{number}.nii.gz", kind)
        label_map(tmp_path / f"predictions/q{number}.nii", kind)
    label_map(tmp_path / "sub-01_space-T2w_mask.nii.gz")
    nifti(tmp_path / "coded.nii.gz", MASK * np.float32(255))
    nifti(tmp_path / "hair.nii.gz", MASK * np.float32(0.9999999))
    found = names(find_scans(tmp_path))
    assert sorted(found) == ["Case00", "constant", "halves", "t2_seg", "two_bright_values"]
    assert (
        "11 volumes of a few whole numbers, as masks are (coded.nii.gz, hair.nii.gz, predictions/p0.nii.gz, ...)"
        in not_taken(tmp_path)
    )


def test_labels_in_other_formats(tmp_path):
    itk = pytest.importorskip("itk")
    scan(tmp_path / "a.nii.gz")
    for ending in (".nrrd", ".mha", ".mhd", ".nhdr"):
        itk.imwrite(itk.image_from_array(np.ascontiguousarray(MASK.T)), str(tmp_path / f"b{ending[1:]}{ending}"))
    nib.save(nib.MGHImage(MASK, AFFINES["LPS"]), tmp_path / "c.mgz")
    assert names(find_scans(tmp_path)) == ["a"]
    assert "5 volumes of a few whole numbers" in not_taken(tmp_path)


def test_a_folder_of_masks_only_is_rejected_and_a_mask_given_directly_is_accepted(tmp_path):
    label_map(tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match=r"no scan at .*; not taken: 1 volumes of a few whole numbers.*\(a\.nii\.gz\)"):
        find_scans(tmp_path)
    assert names(find_scans(tmp_path / "a.nii.gz")) == ["a"]


@pytest.mark.parametrize("volume", ["a.nii.gz", "sub/b.mha", "series/1.dcm"])
def test_pictures_beside_volumes_are_passed_over_unless_pictures_are_requested(tmp_path, volume):
    touch(tmp_path, volume, "preview.png", "sub/Case.jpg")
    assert len(find_scans(tmp_path)) == 1
    assert "2 pictures beside volumes (preview.png, sub/Case.jpg)" in not_taken(tmp_path)
    assert names(find_scans(tmp_path, pictures=True)) == ["preview", "Case"]
    assert "1 volumes where pictures are wanted" in not_taken(tmp_path, pictures=True)


def test_the_output_folder_of_a_run_is_passed_over(tmp_path):
    scan(tmp_path / "a.nii.gz")
    touch(tmp_path, "masks_of_mine/run.json", "masks_of_mine/a.nii.gz", "masks_of_mine/a_overlay.png")
    assert names(find_scans(tmp_path)) == ["a"]
    assert "1 folders that a run wrote (masks_of_mine/)" in not_taken(tmp_path)


def test_the_output_of_a_run_is_passed_over_if_its_folder_is_given(tmp_path):
    """The files in its list are passed over, also empty masks and pictures; other files in the folder are found."""
    nifti(tmp_path / "empty.nii.gz", MASK * np.uint8(0))
    scan(tmp_path / "exam.nii.gz")
    touch(tmp_path, "run.json", "a.png", "a_overlay.png", "photo.png")
    listed = ("empty.nii.gz", "run.json", "a.png", "a_overlay.png")
    lines = "".join(f'{{"file": "{name}"}}\n' for name in listed)
    (tmp_path / "written.jsonl").write_text(f'{lines}{{"fi')
    assert names(find_scans(tmp_path)) == ["exam"]
    assert names(find_scans(tmp_path, pictures=True)) == ["photo"]
    assert "3 files that a run wrote (a.png, a_overlay.png, empty.nii.gz)" in not_taken(tmp_path)
    for name in listed[:1] + listed[2:]:
        (tmp_path / name).unlink()
    assert "a run wrote" not in not_taken(tmp_path)


def test_overlays_beside_their_scans_are_passed_over(tmp_path):
    """A photograph with such a name, but without a scan of the other name, is found."""
    touch(tmp_path, "a.jpg", "A_overlay.png", "b_overlay.png", "_overlay.png")
    assert names(find_scans(tmp_path, pictures=True)) == ["_overlay", "a", "b_overlay"]
    assert "1 overlays by their names (A_overlay.png)" in not_taken(tmp_path, pictures=True)


def test_all_formats_that_the_libraries_read_are_found(tmp_path):
    """A header and its voxels are one scan."""
    pictures = [f"{ending[1:]}{ending}" for ending in PICTURES]
    volumes = ["a.nii", "b.nii.gz", "c.hdr", "d.mha", "e.mhd", "f.nrrd", "g.nhdr", "h.mgz", "i.mgh"]
    touch(tmp_path / "p", *pictures)
    touch(tmp_path / "v", *volumes, "c.img", "e.raw", "g.raw.gz")
    assert len(find_scans(tmp_path / "p", pictures=True)) == len(pictures)
    assert names(find_scans(tmp_path / "v")) == list("abcdefghi")
    assert not_taken(tmp_path / "p", pictures=True) == not_taken(tmp_path / "v") == ""


def test_dicom_objects_without_voxels_are_not_slices(tmp_path):
    dicom_report(tmp_path / "SR.dcm")
    with pytest.raises(InputError, match=r"not taken: 1 DICOM objects without voxels \(SR\.dcm\)"):
        find_scans(tmp_path)
    touch(tmp_path, "IM0", content=DICOM)
    assert len(find_scans(tmp_path)) == 1
    assert "(SR.dcm)" in not_taken(tmp_path)


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_ends_with_a_list_of_the_files_that_were_not_taken(tmp_path, caplog, fails):
    touch(tmp_path, "a.nii.gz", *(f"{k}.txt" for k in range(5)))
    engine = Engine(lambda engine, batch: 1 / (not fails))
    NotTaken(tmp_path).attach(engine)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        engine.run([0])
    assert caplog.messages[-1] == "not taken: 5 files of other kinds (0.txt, 1.txt, 2.txt, ...)"
    NotTaken(tmp_path / "a.nii.gz").attach(engine)
    NotTaken(tmp_path / "gone").attach(engine)


def test_names_of_cases_are_unique_and_show_their_folder(tmp_path):
    touch(tmp_path, "a.nii.gz", "a.mha", "p1/T2/1.dcm", "p2/T2/1.dcm", "p1_T2.nii")
    assert sorted(names(find_scans(tmp_path))) == ["a_mha", "a_nii_gz", "p1_T2", "p1_T2_2", "p2_T2"]


def test_find_scans_accepts_a_file_or_a_series(tmp_path):
    touch(tmp_path, "s/IM0", content=DICOM)
    touch(tmp_path, "x/a.nii.gz")
    assert find_scans(tmp_path / "s") == [{"image": str(tmp_path / "s"), "case": "s"}]
    assert names(find_scans(tmp_path / "s" / "IM0")) == ["IM0"]
    assert names(find_scans(tmp_path / "x" / "a.nii.gz")) == ["a"]


def test_a_folder_without_scans_is_rejected_in_one_line(tmp_path):
    touch(tmp_path, "notes.txt")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "gone"):
        with pytest.raises(InputError) as error:
            find_scans(path)
        assert str(path) in str(error.value)


# ---- names of DICOM series -----------------------------------------------------------------------------------------

UID = "1.3.6.1.4.1.14519.5.2.1.7311.5101.160028252338004527274326500702"


@pytest.mark.parametrize(
    ("folders", "cases"),
    [
        ([f"P001/{UID}/{UID}1", f"P002/{UID}/{UID}2"], ["P001_t2_tse_tra", "P002_t2_tse_tra"]),
        ([f"P001/{UID}/{UID}1", f"P001/{UID}/{UID}2"], ["P001_t2_tse_tra", "P001_t2_tse_tra_2"]),
        ([f"{UID}/{UID}1"], ["scans_t2_tse_tra"]),
        (["P001/2020-01-01/4.0-t2", "P002/2020-01-01/4.0-t2"], ["P001_t2_tse_tra", "P002_t2_tse_tra"]),
        (["t2_tra", "t2_sag"], ["t2_sag", "t2_tra"]),
    ],
    ids=["patients", "two-series", "identifiers", "TCIA", "plain"],
)
def test_series_are_named_after_patient_folder_and_description(tmp_path, monkeypatch, folders, cases):
    """Neither the patient's name or id in the files nor an identifier of 64 digits is used."""
    asked = []
    monkeypatch.setattr(
        "shared_iopfl.data.scan_files.series_description", lambda path: asked.append(path) or "t2_tse/tra"
    )
    for folder in folders:
        (tmp_path / "scans" / folder).mkdir(parents=True)
        (tmp_path / "scans" / folder / "IM1.dcm").write_bytes(bytes(128) + b"DICM")
    found = find_scans(tmp_path / "scans")
    assert [scan["case"] for scan in found] == cases
    assert len(asked) == (0 if "t2_tra" in folders else len(folders))


def test_the_description_is_read_from_the_first_image(tmp_path):
    itk = pytest.importorskip("itk")
    assert itk
    dicom_series(tmp_path / UID, SERIES)
    (scan,) = find_scans(tmp_path)
    assert scan["case"].endswith("_series") and "DOE" not in scan["case"] and "MRN" not in scan["case"]
