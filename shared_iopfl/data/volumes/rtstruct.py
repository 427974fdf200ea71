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
"""A DICOM structure set (RTSTRUCT) of a mask's slices, by pydicom.

The contours are halfway between the centres of pixels inside and outside. Filling them by the even-odd rule at the
centres of pixels restores the mask, including its holes.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from skimage.measure import find_contours

STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
STUDY = "1.2.840.10008.3.1.2.3.1"
LITTLE = "1.2.840.10008.1.2.1"
PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
OF_STUDY = ("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName")
COLOURS = ([0, 158, 115], [213, 94, 0], [0, 114, 178], [230, 159, 0])


class Slice(NamedTuple):
    """A slice of a mask, with its position.

    Attributes:
        mask: Classes, (rows, columns).
        origin: Position of the first pixel in mm (LPS).
        step: Vectors in mm to the next pixel along a row and along a column, (2, 3).
        instance: UID of the instance that holds the slice.
        frame: Number of the slice in a file of several; otherwise None.
    """

    mask: np.ndarray
    origin: np.ndarray
    step: np.ndarray
    instance: str
    frame: int | None = None


def structure_set(
    source: Any,
    slices: Sequence[Slice],
    labels: Sequence[str],
    uids: Sequence[str],
    maker: str,
    algorithm: str,
    version: str,
) -> Any:
    """Return the structure set as a pydicom dataset with its file header.

    Args:
        source: Header of a file of the series.
        slices: Slices of the mask.
        labels: Labels of the classes from 1.
        uids: UIDs of the new series and of the object.
        maker, algorithm, version: Origin of the object.
    """
    from pydicom.dataset import Dataset, FileMetaDataset

    now = datetime.datetime.now()
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.MediaStorageSOPClassUID, made.file_meta.MediaStorageSOPInstanceUID = STRUCTURE_SET, uids[1]
    made.file_meta.TransferSyntaxUID = LITTLE
    made.SOPClassUID, made.SOPInstanceUID, made.SeriesInstanceUID = STRUCTURE_SET, uids[1], uids[0]
    if "SpecificCharacterSet" in source:
        made.SpecificCharacterSet = source.SpecificCharacterSet
    for name in (*PATIENT, *OF_STUDY):
        setattr(made, name, source.get(name, ""))
    made.Modality, made.SeriesNumber, made.InstanceNumber, made.OperatorsName = "RTSTRUCT", 1001, 1, ""
    made.SeriesDescription = algorithm
    made.Manufacturer, made.ManufacturerModelName, made.SoftwareVersions = maker, algorithm, version
    made.StructureSetLabel, made.StructureSetName = "SEGMENTATION", f"{algorithm} {version}"[:64]
    made.StructureSetDate, made.StructureSetTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    made.FrameOfReferenceUID = source.FrameOfReferenceUID
    made.PositionReferenceIndicator = ""
    made.ReferencedFrameOfReferenceSequence = [_frame_of_reference(source, slices)]
    rois, contours, observations = [], [], []
    for number, label in enumerate(labels, 1):
        roi, contour, observation = Dataset(), Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ROIGenerationAlgorithm = number, label, "AUTOMATIC"
        roi.ReferencedFrameOfReferenceUID = source.FrameOfReferenceUID
        roi.ROIGenerationDescription = f"{algorithm} {version}"[:64]
        contour.ReferencedROINumber, contour.ROIDisplayColor = number, COLOURS[(number - 1) % len(COLOURS)]
        contour.ContourSequence = [item for one in slices for item in _contours(one, number, source)]
        observation.ObservationNumber = observation.ReferencedROINumber = number
        observation.RTROIInterpretedType, observation.ROIInterpreter = "ORGAN", ""
        rois.append(roi)
        contours.append(contour)
        observations.append(observation)
    made.StructureSetROISequence, made.ROIContourSequence = rois, contours
    made.RTROIObservationsSequence = observations
    made.ApprovalStatus = "UNAPPROVED"
    return made


def _frame_of_reference(source: Any, slices: Sequence[Slice]) -> Any:
    from pydicom.dataset import Dataset

    frame, study, series = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = source.SeriesInstanceUID
    series.ContourImageSequence = [_reference(one, source) for one in slices]
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = STUDY, source.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID = source.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    return frame


def _reference(one: Slice, source: Any) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.SOPClassUID, one.instance
    if one.frame is not None:
        item.ReferencedFrameNumber = one.frame
    return item


def _contours(one: Slice, number: int, source: Any) -> Iterator[Any]:
    from pydicom.dataset import Dataset

    padded = np.pad(one.mask == number, 1).astype(float)  # so that contours at the edge are closed
    for line in find_contours(padded, 0.5):
        rows, columns = (line[:-1] - 1).T  # the last point repeats the first
        points = one.origin + columns[:, None] * one.step[0] + rows[:, None] * one.step[1]
        item = Dataset()
        item.ContourImageSequence = [_reference(one, source)]
        item.ContourGeometricType, item.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
        item.ContourData = [f"{value:.4f}" for value in points.ravel()]
        yield item
