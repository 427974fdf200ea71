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
"""Headers of DICOM files, read without MONAI: whether a file holds an image, its patient and its series."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared_iopfl.data.scan_names import is_dicom
from shared_iopfl.data.volumes.headers import import_itk

PATIENT, DESCRIPTION = "0010|0020", "0008|103e"
# storage classes (below STORAGE) without an image of the patient: waveforms, presentation states, raw data,
# registrations, segmentations, real-world values, measurements, reports and key objects, documents, radiotherapy
NO_IMAGES = ("9.", "11.", "66", "67", "78.", "79.", "80.", "88.", "104.", "481.2", "481.3", "481.4", "481.5")
STORAGE = "1.2.840.10008.5.1.4.1.1."


def is_no_image(file: Path) -> bool:
    """Return whether the start of a DICOM file declares it a report or another object without voxels."""
    kind = _storage_class(file)
    return kind.startswith(STORAGE) and kind.removeprefix(STORAGE).startswith(NO_IMAGES)


def patient_id(path: Path) -> str:
    """Return the PatientID of a DICOM file, or of the first image of a series; "" if missing, and for other scans."""
    return _tag(path, PATIENT)


def series_description(path: Path) -> str:
    """Return the SeriesDescription of a DICOM file, or of the first image of a series; "" if it is missing."""
    return _tag(path, DESCRIPTION)


def _tag(path: Path, tag: str) -> str:
    files = [file for file in sorted(path.iterdir()) if is_dicom(file)] if path.is_dir() else [path] * is_dicom(path)
    files = [file for file in files if not is_no_image(file)] or files
    if not files:
        return ""
    try:
        return tag_of(open_header(files[0]), tag)
    except Exception:  # reading the scan will report the error
        return ""


def open_header(file: Path) -> Any:
    """Open the header of a DICOM file by ITK.

    Raises:
        RuntimeError: If the file holds no image that can be read.
    """
    io = import_itk(file).GDCMImageIO.New()
    io.SetFileName(str(file))
    io.ReadImageInformation()
    return io


def tag_of(io: Any, tag: str) -> str:
    """Return the value of a tag, such as "0010|0020", of a header that is open; "" if it is missing."""
    found = io.GetMetaDataDictionary()
    return str(found[tag]).strip() if found.HasKey(tag) else ""


def _storage_class(file: Path) -> str:
    """Return the storage class of a file from its first elements, which are always explicit and little endian."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(1024)
    except OSError:  # reading the scan will report the error
        return ""
    at = start.find(b"\x02\x00\x02\x00UI")
    if start[128:132] != b"DICM" or at < 0:
        return ""
    length = int.from_bytes(start[at + 6 : at + 8], "little")
    return start[at + 8 : at + 8 + length].decode("ascii", errors="replace").strip("\0 ")
