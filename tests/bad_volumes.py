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
"""Bad and odd volumes, as hospitals' folders hold them beside good scans; and how to make a file that is wrong."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from tiny_scans import AFFINES, affine_of, dicom_series, nifti

Make = Callable[[Path], Any]
RNG = np.random.RandomState(0)
BODY = RNG.rand(18, 20, 4).astype(np.float32)
# file -> (how it is made, what it is refused for; None: it gets a mask)
Corpus = dict[str, tuple[Make, str | None]]


def array(values: np.ndarray, affine: np.ndarray = AFFINES["LPS"], kind: type = nib.Nifti1Image) -> Make:
    return lambda path: nib.save(kind(values, affine), path)


def content(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


def stored(make: Make, name: str, change: Callable[[bytes], bytes]) -> Make:
    """A good file, changed byte by byte."""

    def spoil(path: Path) -> None:
        good = path.with_name(name)
        make(good)
        data = change(good.read_bytes())
        good.unlink()
        path.write_bytes(data)

    return spoil


def header(**fields: Any) -> Make:
    """A NIfTI file whose header says otherwise, unchecked."""

    def make(path: Path) -> None:
        nifti(path, BODY)
        changed = nib.load(path).header.copy()
        changed["vox_offset"] = 352  # nibabel has set it to 0
        for field, value in fields.items():
            changed[field] = value
        data = path.read_bytes()
        path.write_bytes(changed.binaryblock + data[len(changed.binaryblock) :])

    return make


def voxel_sizes(*sizes: float) -> Make:
    return header(sform_code=0, qform_code=0, pixdim=[1, *sizes, 0, 0, 0, 0])


def big_endian(path: Path) -> None:
    image = nib.Nifti1Image((BODY * 1000).astype(">i2"), AFFINES["RAS"])
    swapped = nib.Nifti1Image(image.dataobj, image.affine, image.header.as_byteswapped(">"))
    nib.save(swapped, path)


def int64(path: Path) -> None:
    nib.save(nib.Nifti1Image((BODY * 250).astype(np.int64), AFFINES["LPS"], dtype="int64"), path)


def with_value(value: float, base: np.ndarray = BODY) -> np.ndarray:
    changed = base.copy()
    changed[3, 4, 1] = value
    return changed


def itk_image(values: np.ndarray, **options: Any) -> Make:
    def make(path: Path) -> None:
        itk = pytest.importorskip("itk")
        itk.imwrite(itk.image_from_array(values, **options), str(path))

    return make


def folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("unpacked")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("gone" + path.name)


def series(change: Callable[[Path], Any] = lambda folder: None, values: np.ndarray | None = None) -> Make:
    def make(path: Path) -> None:
        dicom_series(path, (BODY.T * 1000).astype(np.int16) if values is None else values)
        change(path)

    return make


def mixed(path: Path) -> None:
    for file in dicom_series(path.with_name("another"), (BODY.T * 1000).astype(np.int16), uid="1.2.9").iterdir():
        file.rename(path / f"x{file.name}")
    path.with_name("another").rmdir()


def without_pixels(path: Path) -> None:
    for file in path.iterdir():
        data = file.read_bytes()
        file.write_bytes(data[: data.index(b"\xe0\x7f\x10\x00")])


def meta_header(line: str, kept: bool = True) -> Callable[[bytes], bytes]:
    """An MHA file with a line of its header replaced, and no more than that, or the header alone."""
    name = line.split(" =")[0].encode()

    def change(data: bytes) -> bytes:
        end = data.index(b"\n", data.index(b"ElementDataFile")) + 1
        lines = [known for known in data[:end].splitlines() if not known.startswith(name)]
        lines.insert(len(lines) - (name != b"ElementDataFile"), line.encode())
        return b"\n".join(lines) + b"\n" + data[end:] * kept

    return change


def with_names(path: Path) -> None:
    """A header whose free fields, and whose extension, tell the patient's name."""
    image = nib.Nifti1Image(BODY, AFFINES["LPS"])
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[field] = b"DOE^JOHN"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JOHN, born 1950-01-01"))
    nib.save(image, path)


def missing_raw(path: Path) -> None:
    itk_image(BODY.T)(path)
    path.with_suffix(".raw").unlink(missing_ok=True)
    path.with_suffix(".zraw").unlink(missing_ok=True)


READ = "cannot be read as a scan"
VOLUMES: Corpus = {
    # no scan at all
    "empty.nii.gz": (content(b""), "0 bytes"),
    "text.nii.gz": (content(b"patient moved, scan again\n" * 20), READ),
    "text.nii": (content(b"patient moved, scan again\n" * 40), READ),
    "zeros.nii": (content(bytes(5000)), READ),
    "noise.nii": (content(RNG.bytes(5000)), READ),
    "picture.nii.gz": (stored(lambda p: Image.new("RGB", (50, 50)).save(p), "p.png", bytes), READ),
    "nothing_zipped.nii.gz": (content(gzip.compress(b"")), READ),
    "html.mha": (content(b"<html>login expired</html>"), READ),
    "text.nrrd": (content(b"NRRD"), READ),
    "folder.nii.gz": (folder, READ),
    "loop.nii.gz": (loop, "no such file"),
    "dangling.nii": (dangling, "no such file"),
    "pipe.nii.gz": (os.mkfifo, "neither a file nor a folder"),
    # cut, damaged
    "cut.nii.gz": (stored(array(BODY), "g.nii.gz", lambda data: data[: len(data) // 2]), READ),
    "cut.nii": (stored(array(BODY), "g.nii", lambda data: data[:-100]), READ),
    "header_alone.nii": (stored(array(BODY), "g.nii", lambda data: data[:352]), READ),
    "wrong_sum.nii.gz": (stored(array(BODY), "g.nii.gz", lambda data: data[:-8] + bytes(8)), READ),
    "wrong_magic.nii": (stored(array(BODY), "g.nii", lambda data: data[:344] + b"xxxx" + data[348:]), READ),
    "cut.mha": (stored(itk_image(BODY.T), "g.mha", lambda data: data[:-500]), READ),
    "cut.nrrd": (stored(itk_image(BODY.T), "g.nrrd", lambda data: data[: len(data) // 2]), READ),
    "lost_raw.mhd": (missing_raw, READ),
    "bomb.nii.gz": (stored(array(BODY), "g.nii", lambda data: gzip.compress(data + bytes(2**24))), "unpacks to more"),
    "zipped_twice.nii.gz": (stored(array(BODY), "g.nii.gz", gzip.compress), READ),
    "zipped_and_more.nii.gz": (stored(array(BODY), "g.nii.gz", lambda data: data + b"more"), READ),
    "not_zipped.nii.gz": (stored(array(BODY), "g.nii", bytes), READ),
    "zipped.nii": (stored(array(BODY), "g.nii.gz", bytes), READ),
    "of_nothing.nii": (header(datatype=0), READ),
    "of_unknown.nii": (header(datatype=9999), READ),
    "offset_beyond.nii": (header(vox_offset=1e9), "cut short"),
    "offset_nan.nii": (header(vox_offset=np.nan), READ),
    "intercept_nan.nii": (header(scl_slope=1e-38, scl_inter=np.nan), READ),
    # what would have other files opened
    "device.nii": (lambda path: path.symlink_to("/dev/zero"), "neither a file nor a folder"),
    "system.nii": (lambda path: path.symlink_to(__file__), READ),
    "escape.mhd": (content(b"NDims = 2\nDimSize = 9 9\nElementDataFile = ../../x\n"), "takes its voxels from"),
    "escape.mha": (
        stored(itk_image(BODY.T), "g.mha", meta_header("ElementDataFile = /etc/hosts")),
        "takes its voxels from '/etc/hosts'",
    ),
    "list.mha": (
        stored(itk_image(BODY.T), "g.mha", meta_header("ElementDataFile = LIST", kept=False)),
        "takes its voxels from 'LIST'",
    ),
    "escape.nrrd": (
        content(b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 9 9 9\nencoding: raw\ndata file: /etc/hosts\n"),
        "takes its voxels from '/etc/hosts'",
    ),
    "endless.mha": (content(b"ObjectType = Image\n" + b"Comment = x\n" * 9999), "header does not end"),
    # shapes
    "axis_0.nii": (array(BODY[:, :0]), "axis of length 0"),
    "axis_negative.nii": (header(dim=[3, 18, -20, 4, 1, 1, 1, 1]), READ),
    "axes_huge.nii": (header(dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]), "too many voxels"),
    "axes_large.nii": (header(dim=[3, 1024, 1024, 129, 1, 1, 1, 1]), "too many voxels"),
    "axes_promised.nii": (header(dim=[3, 18, 20, 4000, 1, 1, 1, 1]), "cut short"),
    "axes_promised.nii.gz": (stored(header(dim=[3, 18, 20, 4000, 1, 1, 1, 1]), "g.nii", gzip.compress), "cut short"),
    "axes_huge.mha": (stored(itk_image(BODY.T), "g.mha", meta_header("DimSize = 30000 30000 9")), "too many voxels"),
    "axes_negative.mha": (stored(itk_image(BODY.T), "g.mha", meta_header("DimSize = -3 20 18")), "too many voxels"),
    "axes_eight.nii": (header(dim=[8, 18, 20, 4, 1, 1, 1, 1]), READ),
    "axes_none.nii": (header(dim=[0, 18, 20, 4, 1, 1, 1, 1]), "expected a 3D scan|axis of length 0|" + READ),
    "series.nii.gz": (array(np.stack([BODY] * 3, -1)), "extract one volume first"),
    "field.nii.gz": (array(np.stack([BODY] * 3, -1)[..., None, :]), "expected a 3D scan"),
    "line.nii.gz": (array(BODY[:, 0, 0]), "expected a 3D scan"),
    "voxel.nii.gz": (array(BODY[:1, :1, :1]), "shows nothing"),
    "rgb.nii.gz": (array(np.zeros((6, 6, 2), [("R", "u1"), ("G", "u1"), ("B", "u1")])), "RGB"),
    "rgb.mha": (itk_image((BODY.T[..., None].repeat(3, -1) * 255).astype(np.uint8), is_vector=True), READ),
    "complex.nii.gz": (array(BODY.astype(np.complex64)), "complex"),
    # values
    "nan.nii.gz": (array(with_value(np.nan)), "1 NaN or infinite"),
    "inf.nii.gz": (array(with_value(-np.inf)), "1 NaN or infinite"),
    "all_nan.nii.gz": (array(BODY * np.nan), "NaN or infinite"),
    "beyond_single.nii.gz": (array(BODY.astype(np.float64) * 1e300), "NaN or infinite"),
    "zero.nii.gz": (array(BODY * 0), "shows nothing"),
    "constant.nii.gz": (array(BODY * 0 + 7), "shows nothing"),
    # grids
    "spacing_0.nii": (voxel_sizes(0, 0, 0), "correct its header"),
    "spacing_nan.nii": (voxel_sizes(np.nan, 1, 1), "correct its header"),
    "singular.nii.gz": (array(BODY, affine_of(np.array([[1, 1, 0], [1, 1, 0], [0, 0, 3.0]]))), "correct its header"),
    "affine_nan.nii": (header(srow_y=[np.nan] * 4), "correct its header"),
    "qform_nan.nii": (header(sform_code=0, qform_code=1, quatern_b=np.nan), "correct its header"),
    "qform_wrong.nii": (header(sform_code=0, qform_code=1, quatern_b=5, quatern_c=5), READ),
    "spacing_inf.nii": (voxel_sizes(np.inf, 1, 1), "correct its header"),
    "spacing_0_of_one.nii": (voxel_sizes(1, 1, 0), "correct its header"),
    "spacing_0.mha": (stored(itk_image(BODY.T), "g.mha", meta_header("ElementSpacing = 0 0 0")), READ),
    "direction_0.mha": (stored(itk_image(BODY.T), "g.mha", meta_header("TransformMatrix = 0 0 0 0 0 0 0 0 0")), READ),
    "affine_0.nii": (header(srow_z=[0] * 4), "correct its header"),
    "two_grids.nii": (header(qform_code=1, quatern_b=1, quatern_c=0, quatern_d=0, qoffset_x=500), "in two places"),
    "analyze.hdr": (array(BODY, np.eye(4), nib.AnalyzeImage), "ANALYZE"),
    # DICOM
    "slice_missing": (series(lambda path: (path / "IM1.dcm").unlink()), "slices missing"),
    "slice_cut": (series(lambda path: os.truncate(path / "IM2.dcm", 200)), r"IM2\.dcm first"),
    "two_series": (series(mixed), "2 DICOM series"),
    "slice_twice": (series(lambda path: shutil.copy(path / "IM1.dcm", path / "copy.dcm")), "two images at one place"),
    "slice_empty": (series(lambda path: (path / "IM9.dcm").write_bytes(b"")), r"IM9\.dcm first"),
    "slice_gone": (series(lambda path: (path / "IM9.dcm").symlink_to("gone")), "leads nowhere"),
    "no_pixels": (series(without_pixels), "."),
    "report": (lambda path: (path.mkdir(), (path / "a.dcm").write_bytes(b"text")), "."),
    "blank_series": (series(values=np.full((4, 20, 18), 5, np.int16)), "shows nothing"),
    # odd, but scans
    "good.nii.gz": (array(BODY), None),
    "good.mha": (itk_image(BODY.T), None),
    "good.mhd": (itk_image(BODY.T), None),
    "good.nrrd": (itk_image((BODY.T * 99).astype(np.uint16)), None),
    "good.nhdr": (itk_image(BODY.T), None),
    "good.mgz": (array(BODY, kind=nib.MGHImage), None),
    "pair.hdr": (array(BODY, kind=nib.Nifti1Pair), None),
    "good_series": (series(), None),
    "series_and_notes": (series(lambda path: (path / "notes.txt").write_text("moved")), None),
    "nifti2.nii.gz": (array(BODY, kind=nib.Nifti2Image), None),
    "big_endian.nii": (big_endian, None),
    "scaled.nii": (header(scl_slope=2.5, scl_inter=-100), None),
    "slope_nan.nii": (header(scl_slope=np.nan, scl_inter=np.nan), None),
    **{
        f"{kind}.nii.gz": (array((BODY * 250).astype(kind) if kind != "int8" else (BODY * 100).astype(kind)), None)
        for kind in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "float64")
    },
    "int64.nii.gz": (int64, None),
    "full_uint16.nii.gz": (array(np.where(BODY > 0.5, 65535, 0).astype(np.uint16)), None),
    "negative.nii.gz": (array(BODY * 1000 - 2000), None),
    "huge_values.nii.gz": (array(BODY * np.float32(1e30)), None),
    "widest_values.nii.gz": (array(((BODY - 0.5) * 3e38).astype(np.float32)), None),
    "tiny_values.nii.gz": (array(BODY * np.float32(1e-30)), None),
    "one_bright_voxel.nii.gz": (array(with_value(1e6, BODY * 0)), None),
    "outlier.nii.gz": (array(with_value(1e9)), None),
    "spacing_huge.nii.gz": (array(BODY, np.diag([1e5, 1e5, 1e5, 1])), None),
    "spacing_tiny.nii.gz": (array(BODY, np.diag([1e-4, 1e-4, 1e-4, 1])), None),
    "spacing_negative.nii": (voxel_sizes(-0.7, -0.9, -3), None),
    "far_away.nii.gz": (array(BODY, affine_of(np.eye(3), (1e5, -1e5, 1e5))), None),
    **{f"{name}.nii.gz": (array(BODY, affine), None) for name, affine in AFFINES.items()},
    "strides.nii.gz": (array(BODY[::-1, :, ::-1]), None),
    "fortran.nii.gz": (array(np.asfortranarray(BODY)), None),
    "trailing_ones.nii.gz": (array(BODY[..., None, None, None]), None),
    "codes_unknown.nii": (header(sform_code=99, qform_code=99), None),
    "more_behind.nii": (stored(array(BODY), "g.nii", lambda data: data + bytes(1000)), None),
    "in_two_parts.nii.gz": (stored(array(BODY), "g.nii", lambda d: gzip.compress(d[:9]) + gzip.compress(d[9:])), None),
    "names_inside.nii.gz": (with_names, None),
    "slice_alone": (series(lambda path: [(path / f"IM{k}.dcm").unlink() for k in (1, 2, 3)]), None),
    "one_slice.nii.gz": (array(BODY[..., :1]), None),
    "flat.nii.gz": (array(BODY[..., 0]), None),
    "trailing_1.nii.gz": (array(BODY[..., None]), None),
    "one_row.nii.gz": (array(BODY[:1]), None),
    "one_column.nii.gz": (array(BODY[:1, :1]), None),
    "two_voxels.nii.gz": (array(BODY[:2, :1, :1]), None),
    "long.nii.gz": (array(RNG.rand(300, 3, 2).astype(np.float32)), None),
    "UPPER.NII.GZ": (stored(array(BODY), "g.nii.gz", bytes), None),
    "with space, comma & ümlaut.nii.gz": (array(BODY), None),
    "two\nlines.nii.gz": (array(BODY), None),
    "{case} {0}.nii.gz": (array(BODY), None),
    "@device $x %y.nii.gz": (array(BODY), None),
    "-rf.nii.gz": (array(BODY), None),
    "=1+1.nii.gz": (array(BODY), None),
    "日本語 \u202e😀.nii.gz": (array(BODY), None),
    f"{'long' * 61}.nii.gz": (array(BODY), None),
    os.fsdecode(b"latin_\xfc.nii.gz"): (array(BODY), None),
    "twice.nii": (array(BODY), None),
    "twice.nii.gz": (array(BODY), None),
}  # fmt: skip
