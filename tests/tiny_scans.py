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
"""Tiny scans for the tests: NIfTI with every kind of affine, pictures, a DICOM series."""

from __future__ import annotations

import locale
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

RNG = np.random.RandomState(0)
VALUES = RNG.rand(6, 7, 5).astype(np.float32)
MASK = (VALUES > 0.5).astype(np.uint8)
PICTURE = (RNG.rand(20, 30, 3) * 255).astype(np.uint8)  # height, width: not the same, so that a swap shows
SERIES = (VALUES.T * 1000).astype(np.int16)


def rotation(angle: float = 0.3) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def affine_of(matrix: np.ndarray, origin: tuple = (5, -6, 7)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = matrix, origin
    return affine


AFFINES = {
    "RAS": affine_of(np.diag([0.7, 0.9, 3])),
    "LPS": affine_of(np.diag([-0.7, -0.9, 3])),
    "permuted": affine_of(np.array([[0, 0, 3], [-0.7, 0, 0], [0, -0.9, 0]])),
    "oblique": affine_of(rotation() @ np.diag([-0.7, 0.9, 3])),
    "sheared": affine_of(np.array([[0.7, 0.2, 0], [0, 0.9, 0], [0, 0, 3]])),
}


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINES["LPS"]) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def dicom_series(
    folder: Path,
    array: np.ndarray,
    uid: str = "1.2.3",
    name: str = "IM",
    direction: np.ndarray = rotation(),  # noqa: B008
    thickness: Callable[[int], str] = lambda k: "3.0",
    place: Callable[[int], float] = float,
    tilt: float = 0,
) -> Path:
    """An oblique series of slices, (slice, row, column); `place` tells where a slice lies, in slices from
    the first, and `tilt` how far each is shifted along its rows, in mm."""
    itk = pytest.importorskip("itk")
    folder.mkdir(exist_ok=True)
    category = locale.setlocale(locale.LC_ALL)  # ITK's DICOM writer leaves "C" behind
    for k, slice_values in enumerate(array):
        image = itk.image_from_array(slice_values[None])
        position = np.array([5, 6, 7]) + 3.0 * place(k) * direction[:, 2] + tilt * k * direction[:, 0]
        tags = image.GetMetaDataDictionary()
        tags["0020|000d"], tags["0020|000e"], tags["0008|0018"] = "1.2", uid, f"{uid}.{name == 'IM':d}{k}"
        tags["0008|0060"], tags["0008|0021"], tags["0020|0013"] = "MR", "20200101", str(k)
        tags["0010|0010"], tags["0010|0020"], tags["0010|0030"] = "DOE^JOHN", "MRN1950", "19500101"
        tags["0020|0032"] = "\\".join(f"{value:.6f}" for value in position)
        tags["0020|0037"] = "\\".join(f"{value:.6f}" for value in direction[:, :2].T.ravel())
        tags["0028|0030"], tags["0018|0050"], tags["0018|0088"] = "0.9\\0.7", thickness(k), "3.0"
        image.SetOrigin(position.tolist())
        image.SetSpacing([0.7, 0.9, 3.0])
        image.SetDirection(itk.matrix_from_array(direction))
        image.SetMetaDataDictionary(tags)
        io = itk.GDCMImageIO.New()
        io.KeepOriginalUIDOn()
        itk.ImageFileWriter.New(image, FileName=str(folder / f"{name}{k}.dcm"), ImageIO=io).Update()
    locale.setlocale(locale.LC_ALL, category)
    return folder


def dicom_report(path: Path, kind: str = "88.22") -> None:
    """The header of a DICOM object without voxels, such as a structured report."""

    def element(number: int, vr: str, value: bytes) -> bytes:
        value += b"\0" * (len(value) % 2)
        length = bytes(2) + len(value).to_bytes(4, "little") if vr == "OB" else len(value).to_bytes(2, "little")
        return b"\x02\x00" + number.to_bytes(2, "little") + vr.encode() + length + value

    what = f"1.2.840.10008.5.1.4.1.1.{kind}".encode()
    meta = element(1, "OB", b"\0\1") + element(2, "UI", what) + element(3, "UI", b"1.9")
    meta += element(0x10, "UI", b"1.2.840.10008.1.2.1")
    path.write_bytes(bytes(128) + b"DICM" + element(0, "UL", len(meta).to_bytes(4, "little")) + meta)
