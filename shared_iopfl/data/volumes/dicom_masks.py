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
"""Masks as DICOM SEG and RTSTRUCT for the series that they were predicted from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform

from shared_iopfl import __version__
from shared_iopfl.data.scan_names import case_name, is_dicom, source_of
from shared_iopfl.data.volumes.dicom_headers import is_no_image
from shared_iopfl.data.volumes.rtstruct import Slice, structure_set
from shared_iopfl.utils.checks import output_formats
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import whole_file

ENDINGS = {"dicomseg": ".seg.dcm", "rtstruct": ".rtstruct.dcm"}
MAKER = "IOP-FL for MONAI"
ANATOMY = ("123037004", "SCT", "Anatomical Structure")
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


class SaveDicomd(MapTransform):
    """Write ``<case>.seg.dcm`` and ``<case>.rtstruct.dcm`` for a mask of a DICOM series.

    The objects belong to the patient and the study of the series, as their readers expect, and so contain the patient's
    name and id as the series does. They reference its slices, and name the algorithm and its version. A segmentation
    has one binary segment for each class; a structure set has one region for each class, whose contours follow the
    borders between pixels, so that filling them restores the mask.

    Args:
        keys: Key of the mask, (1, *spatial) in the axes of the scan.
        image_key: Key of the image, whose metadata names the scan and has the affine with which it was read.
        output_dir: Folder to write to.
        formats: As ``output_format`` of a bundle, such as "nifti,dicomseg"; with "nifti" alone, nothing is written.
        segments: One entry for each class from 1, ``{"label": "prostate", "code": ["41216001", "SCT", "Prostate"]}``;
            without a code, it is an anatomical structure.
        algorithm: Name of the algorithm.
        pseudonyms: Pseudonyms of the run; rejected together with DICOM.

    Raises:
        InputError: If the library is not installed, pseudonyms are requested, or a scan is not a DICOM series.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        image_key: str = "image",
        output_dir: str | os.PathLike = ".",
        formats: str | Sequence[str] = "nifti",
        segments: Sequence[Mapping[str, Any]] = ({"label": "target"},),
        algorithm: str = "IOP-FL",
        pseudonyms: str = "",
    ) -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.output_dir = Path(output_dir)
        self.formats = [name for name in output_formats(formats) if name in ENDINGS]
        self.segments = list(segments)
        self.algorithm = algorithm
        if self.formats and pseudonyms:
            raise InputError("DICOM output names the patient of its series: leave out --output_format or --pseudonyms.")
        if self.formats:
            _import_highdicom()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the files and return the data unchanged."""
        d = dict(data)
        for key in self.key_iterator(d) if self.formats else ():
            source, meta = source_of(d, self.image_key, key)
            case = str(d.get("case") or case_name(source))
            self._save(np.asarray(d[key].detach().cpu())[0], source, np.asarray(meta["original_affine"]), case)
        return d

    def _save(self, mask: np.ndarray, source: Path, affine: np.ndarray, case: str) -> None:
        files = _files(source)
        if not files:
            formats = " and ".join(self.formats)
            raise InputError(
                f"{source} is not a DICOM series, which {formats} output requires: leave out --output_format, or give "
                "the series."
            )
        import pydicom

        read = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
        lacking = [name for name in ("FrameOfReferenceUID", "StudyInstanceUID") if not read[0].get(name)]
        if lacking:
            raise InputError(f"{source} has no {' and no '.join(lacking)}, which DICOM output needs: export it again.")
        slices = _slices(read, affine, mask, source)
        identity = [
            str(read[0].SeriesInstanceUID),
            self.algorithm,
            __version__,
            hashlib.sha256(mask.tobytes()).hexdigest(),
        ]
        for name in self.formats:
            uids = [pydicom.uid.generate_uid(entropy_srcs=[*identity, name, kind]) for kind in ("series", "object")]
            try:
                if name == "dicomseg":
                    made = self._segmentation(read, slices, uids)
                else:
                    labels = [segment["label"] for segment in self.segments]
                    made = structure_set(read[0], slices, labels, uids, MAKER, self.algorithm, __version__)
            except (AttributeError, KeyError, TypeError, ValueError) as error:  # the series lacks required tags
                line = " ".join(str(error).split())
                raise InputError(f"{source} cannot be referenced by {name} ({line:.160}): export it again") from error
            with whole_file(self.output_dir / f"{case}{ENDINGS[name]}") as temporary:
                made.save_as(temporary, enforce_file_format=True)

    def _segmentation(self, read: Sequence[Any], slices: Sequence[Slice], uids: Sequence[str]) -> Any:
        hd = _import_highdicom()
        from pydicom.sr.codedict import codes

        identification = hd.AlgorithmIdentificationSequence(
            self.algorithm, codes.cid7162.ArtificialIntelligence, __version__, source=MAKER
        )
        descriptions = [
            hd.seg.SegmentDescription(
                number,
                segment["label"],
                hd.sr.CodedConcept(*ANATOMY),
                hd.sr.CodedConcept(*segment.get("code", ANATOMY)),
                hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                identification,
            )
            for number, segment in enumerate(self.segments, 1)
        ]
        written = hd.seg.Segmentation(
            list(read),
            np.stack([one.mask for one in slices]),
            hd.seg.SegmentationTypeValues.BINARY,
            descriptions,
            series_instance_uid=uids[0],
            series_number=1000,
            sop_instance_uid=uids[1],
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name=self.algorithm,
            software_versions=__version__,
            device_serial_number="0",
            content_label="SEGMENTATION",
            omit_empty_frames=any(one.mask.any() for one in slices),
        )
        written.ContentCreatorName = ""  # the standard requires the tag, which may be empty
        return written


def _import_highdicom() -> Any:
    try:
        import highdicom
    except ImportError as error:
        raise InputError("DICOM output needs highdicom: pip install highdicom") from error
    return highdicom


def _files(source: Path) -> list[Path]:
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    return [file for file in files if not file.name.startswith(".") and is_dicom(file) and not is_no_image(file)]


def _slices(read: Sequence[Any], affine: np.ndarray, mask: np.ndarray, source: Path) -> list[Slice]:
    """Return the mask's slices in the order of the files, or of the frames of one file, found by their positions."""
    to_index = np.linalg.inv(LPS @ affine)
    slices = []
    for instance, frame, position, across, pixels in (place for dataset in read for place in _places(dataset)):
        origin = np.array(position, dtype=float)
        rows, columns = (np.array(across[at : at + 3], dtype=float) for at in (0, 3))
        step = np.stack([rows * float(pixels[1]), columns * float(pixels[0])])
        ends = np.stack([origin, origin + step[0], origin + step[1]])
        x, y, z = (to_index[:3, :3] @ ends.T + to_index[:3, 3:]).round(2)
        number = round(float(z[0]))
        if not (np.allclose(x, [0, 1, 0], atol=0.1) and np.allclose(y, [0, 0, 1], atol=0.1)) or not (
            abs(z[0] - number) < 0.1 and 0 <= number < mask.shape[2]
        ):
            raise InputError(f"{source} was read in another grid than that of its slices: export it again.")
        slices.append(Slice(mask[:, :, number].T.astype(np.uint8), origin, step, instance, frame))
    return slices


def _places(dataset: Any) -> Iterator[tuple[str, int | None, Any, Any, Any]]:
    """Yield instance, number (None in a file of one), position, orientation and pixel spacing of each frame."""
    instance = str(dataset.SOPInstanceUID)
    frames = dataset.get("PerFrameFunctionalGroupsSequence")
    if not frames:
        yield instance, None, dataset.ImagePositionPatient, dataset.ImageOrientationPatient, dataset.PixelSpacing
        return
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [None])[0]
    for number, frame in enumerate(frames, 1):
        orientation, measures = (
            getattr(frame if name in frame else shared, name)[0]
            for name in ("PlaneOrientationSequence", "PixelMeasuresSequence")
        )
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        yield instance, number, position, orientation.ImageOrientationPatient, measures.PixelSpacing
