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
"""DICOM SEG and RTSTRUCT: read back, each voxel has its value and its position."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image
from skimage.draw import polygon2mask
from tiny_scans import SERIES, dicom_series, nifti

from shared_iopfl.data.loading import LoadCased
from shared_iopfl.data.volumes.dicom_masks import SaveDicomd
from shared_iopfl.utils.errors import InputError

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
LARGER = np.kron(SERIES, np.ones((1, 8, 8), SERIES.dtype))  # GDCM reads no RLE of a few bytes
SEGMENTS = [{"label": "prostate", "code": ["41216001", "SCT", "Prostate"]}, {"label": "lesion"}]


def turned(angle: float) -> np.ndarray:
    """Return directions that are oblique about all axes."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def exam(folder: Path, direction: np.ndarray, array: np.ndarray = SERIES) -> Path:
    """Write a series whose slices are named in reverse order, with the tags of an archive."""
    pydicom = pytest.importorskip("pydicom")
    dicom_series(folder, array, "1.2.826.0.1.3680043.8.498.1", direction=direction)
    files = sorted(folder.iterdir())
    for number, file in enumerate(files):
        dataset = pydicom.dcmread(file)
        dataset.FrameOfReferenceUID, dataset.StudyInstanceUID = "1.2.826.0.1.7", "1.2.826.0.1.5"
        dataset.StudyID, dataset.AccessionNumber, dataset.PatientSex = "1", "A1", "M"
        dataset.SeriesNumber, dataset.StudyDate, dataset.StudyTime = 3, "20200101", "101010"
        dataset.ReferringPhysicianName, dataset.SeriesDescription = "", "t2 tra"
        dataset.save_as(folder / f"{(number * 3) % len(files)}_{number}.dcm")
        file.unlink()
    return folder


def case_of(source: Path, seed: int = 0) -> dict[str, Any]:
    """Return the loaded scan with a random mask of two classes, including holes and edges."""
    image = LoadCased("image")({"image": str(source)})["image"]
    values = torch.from_numpy(np.random.RandomState(seed).randint(0, 3, tuple(image.shape)).astype(np.uint8))
    return {"image": image, "pred": MetaTensor(values, affine=image.affine), "case": "exam"}


def save(case: dict[str, Any], out: Path, formats: str = "nifti,dicomseg,rtstruct") -> None:
    SaveDicomd(output_dir=out, formats=formats, segments=SEGMENTS, algorithm="IOP-FL test")(case)


def index_of(affine: np.ndarray, point: Any) -> np.ndarray:
    """Return the voxel indices of a point in mm (LPS)."""
    return (np.linalg.inv(LPS @ affine) @ [*map(float, point), 1])[:3]


@pytest.mark.parametrize("direction", [np.eye(3), turned(0.4), turned(-2.0)], ids=["axial", "oblique", "far"])
def test_a_segmentation_is_read_back_voxel_by_voxel(direction, tmp_path):
    hd = pytest.importorskip("highdicom")
    case = case_of(exam(tmp_path / "series", direction))
    save(case, tmp_path)
    mask, affine = case["pred"][0].numpy(), np.asarray(case["image"].affine)
    read = hd.seg.segread(tmp_path / "exam.seg.dcm")
    found = np.zeros_like(mask)
    for frame, about in zip(np.atleast_3d(read.pixel_array), read.PerFrameFunctionalGroupsSequence):
        place = about.PlanePositionSequence[0].ImagePositionPatient
        number = about.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        index = index_of(affine, place)
        assert np.allclose(index, index.round(), atol=1e-2) and np.allclose(index[:2], 0, atol=1e-2)
        found[:, :, round(float(index[2]))][frame.T > 0] = number
    assert np.array_equal(found, mask)
    assert read.SegmentSequence[0].SegmentLabel == "prostate"
    algorithm = read.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, bool(algorithm.AlgorithmVersion)) == ("IOP-FL test", True)


@pytest.mark.skipif(shutil.which("segimage2itkimage") is None, reason="needs dcmqi: pip install dcmqi")
@pytest.mark.parametrize("direction", [np.eye(3), turned(0.4), turned(-2.0)], ids=["axial", "oblique", "far"])
def test_dcmqi_reads_the_same_voxels(direction, tmp_path):
    """The library behind 3D Slicer's reader finds each voxel at its position, without a warning."""
    case = case_of(exam(tmp_path / "series", direction))
    save(case, tmp_path, "dicomseg")
    words = ["segimage2itkimage", "--inputDICOM", str(tmp_path / "exam.seg.dcm"), "--outputDirectory", str(tmp_path)]
    words += ["--prefix", "read", "--outputType", "nii", "--mergeSegments"]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 0 and "W: " not in ran.stdout + ran.stderr
    (file,) = tmp_path.glob("read*.nii.gz")
    image = nib.load(file)
    values, affine = np.asarray(image.dataobj), np.asarray(case["image"].affine)
    places = np.argwhere(values)
    index = (np.linalg.inv(affine) @ image.affine @ np.c_[places, np.ones(len(places))].T)[:3].T
    assert np.allclose(index, index.round(), atol=1e-3)
    found = np.zeros_like(case["pred"][0].numpy())
    found[tuple(index.round().astype(int).T)] = values[tuple(places.T)]
    assert np.array_equal(found, case["pred"][0].numpy())


@pytest.mark.parametrize("direction", [np.eye(3), turned(0.4), turned(-2.0)], ids=["axial", "oblique", "far"])
def test_filled_contours_restore_the_mask(direction, tmp_path):
    pydicom = pytest.importorskip("pydicom")
    case = case_of(exam(tmp_path / "series", direction), seed=1)
    save(case, tmp_path, "rtstruct")
    mask, affine = case["pred"][0].numpy(), np.asarray(case["image"].affine)
    read = pydicom.dcmread(tmp_path / "exam.rtstruct.dcm")
    found = np.zeros(mask.shape, np.uint8)
    for roi in read.ROIContourSequence:
        inside = np.zeros(mask.shape, bool)
        for contour in roi.ContourSequence:
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
            index = np.stack([index_of(affine, point) for point in points])
            assert np.allclose(index[:, 2], index[0, 2].round(), atol=1e-2)
            inside[:, :, round(float(index[0, 2]))] ^= polygon2mask(mask.shape[:2], index[:, :2])
        found[inside] = roi.ReferencedROINumber
    assert np.array_equal(found, mask)


def test_the_series_and_each_of_its_slices_are_referenced(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    source = exam(tmp_path / "series", turned(0.4))
    save(case_of(source), tmp_path)
    slices = {str(pydicom.dcmread(file).SOPInstanceUID) for file in source.iterdir()}
    of_series = pydicom.dcmread(next(source.iterdir()))
    for name in ("exam.seg.dcm", "exam.rtstruct.dcm"):
        read = pydicom.dcmread(tmp_path / name)
        assert (read.StudyInstanceUID, read.PatientID) == (of_series.StudyInstanceUID, of_series.PatientID)
        assert read.FrameOfReferenceUID == of_series.FrameOfReferenceUID
        assert read.SeriesInstanceUID != of_series.SeriesInstanceUID
        assert slices <= {str(item.value) for item in read.iterall() if item.keyword == "ReferencedSOPInstanceUID"}
        assert str(of_series.SeriesInstanceUID) in {
            str(item.value) for item in read.iterall() if item.keyword == "SeriesInstanceUID"
        }


def test_the_same_mask_gets_the_same_uids(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    case = case_of(exam(tmp_path / "series", np.eye(3)))
    other = {**case, "pred": MetaTensor(1 - case["pred"].clamp(max=1), affine=case["image"].affine)}
    uids = []
    for number, one in enumerate((case, case, other)):
        save(one, tmp_path / str(number), "dicomseg")
        uids.append(pydicom.dcmread(tmp_path / str(number) / "exam.seg.dcm").SOPInstanceUID)
    assert uids[0] == uids[1] != uids[2]


def test_an_empty_mask_is_an_object_too(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    case = case_of(exam(tmp_path / "series", np.eye(3)))
    case["pred"] = MetaTensor(torch.zeros_like(case["pred"]), affine=case["image"].affine)
    save(case, tmp_path)
    assert not pydicom.dcmread(tmp_path / "exam.seg.dcm").pixel_array.any()
    assert not list(pydicom.dcmread(tmp_path / "exam.rtstruct.dcm").ROIContourSequence[0].ContourSequence)


def test_other_scans_are_rejected_in_one_line(tmp_path):
    pytest.importorskip("highdicom")
    source = nifti(tmp_path / "scan.nii.gz", SERIES.T.astype("f4"))
    with pytest.raises(
        InputError, match=r"scan\.nii\.gz is not a DICOM series, which dicomseg and rtstruct output requires"
    ):
        save(case_of(source), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_a_series_without_a_frame_of_reference_is_rejected_in_one_line(tmp_path):
    pytest.importorskip("highdicom")
    source = dicom_series(tmp_path / "series", SERIES)
    with pytest.raises(InputError, match="has no FrameOfReferenceUID"):
        save(case_of(source), tmp_path)


def test_the_library_is_only_needed_for_dicom_output(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(InputError, match="pip install highdicom"):
        SaveDicomd(formats="rtstruct")
    assert SaveDicomd(formats="nifti")({"pred": 1}) == {"pred": 1}


def test_pseudonyms_and_dicom_exclude_each_other():
    with pytest.raises(InputError, match="names the patient"):
        SaveDicomd(formats=["nifti", "dicomseg"], pseudonyms="table.csv")


# ---- ways in which archives store series ----------------------------------------------------------------------------


def compressed(folder: Path, syntax: str) -> Path:
    """Return the exam with its pixels compressed without loss."""
    pydicom = pytest.importorskip("pydicom")
    source = exam(folder, turned(0.4), LARGER)
    for file in source.iterdir():
        dataset = pydicom.dcmread(file)
        if syntax == "JPEG2000Lossless":
            dataset.PixelData = pydicom.encaps.encapsulate([jpeg2000(dataset.pixel_array)])
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
            dataset["PixelData"].VR = "OB"
        else:
            dataset.compress(getattr(pydicom.uid, syntax), generate_instance_uid=False)
        dataset.save_as(file)
    return source


def jpeg2000(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint16)).save(stream, "JPEG2000", no_jp2=True, irreversible=False)
    return stream.getvalue()


@pytest.mark.parametrize("syntax", ["RLELossless", "JPEGLSLossless", "JPEG2000Lossless"])
def test_compressed_series_are_served(syntax, tmp_path):
    pytest.importorskip("highdicom")
    plain, packed = (
        case_of(source) for source in (exam(tmp_path / "a", turned(0.4), LARGER), compressed(tmp_path / "b", syntax))
    )
    assert torch.equal(plain["image"], packed["image"])
    save(packed, tmp_path)
    assert (tmp_path / "exam.seg.dcm").is_file()


def test_an_enhanced_multi_frame_file_is_served_like_its_series(tmp_path):
    """MR scanners export a single file whose frames are referenced by number."""
    hd, pydicom = pytest.importorskip("highdicom"), pytest.importorskip("pydicom")
    single = exam(tmp_path / "series", turned(0.4))
    datasets = [pydicom.dcmread(file) for file in sorted(single.iterdir())]
    datasets.sort(key=lambda dataset: int(dataset.InstanceNumber))
    for dataset in datasets:
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "OTHER"]
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.MRImageStorage
    whole = hd.legacy.LegacyConvertedEnhancedMRImage(datasets, "1.2.9", 5, "1.2.9.1", 1)
    whole.save_as(tmp_path / "whole.dcm")
    one, other = case_of(single), case_of(tmp_path / "whole.dcm")
    assert torch.equal(one["image"], other["image"].flip(-1))  # its frames are stored the other way round
    flip = np.diag([1, 1, -1, 1])
    flip[2, 3] = len(datasets) - 1
    assert np.allclose(one["image"].affine, np.asarray(other["image"].affine) @ flip, atol=1e-3)
    save(other, tmp_path, "dicomseg,rtstruct")
    read = hd.seg.segread(tmp_path / "exam.seg.dcm")
    mask, affine = other["pred"][0].numpy(), np.asarray(other["image"].affine)
    found = np.zeros_like(mask)
    for frame, about in zip(read.pixel_array, read.PerFrameFunctionalGroupsSequence):
        index = index_of(affine, about.PlanePositionSequence[0].ImagePositionPatient)
        found[:, :, round(float(index[2]))][frame.T > 0] = about.SegmentIdentificationSequence[
            0
        ].ReferencedSegmentNumber
    assert np.array_equal(found, mask)
