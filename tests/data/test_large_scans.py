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
"""Large scans: files that are too large are rejected unread, and resizing and padding need little memory."""

from __future__ import annotations

import gzip
import subprocess
import sys
import zlib

import nibabel as nib
import numpy as np
import pytest
import torch
from bad_pictures import png_file
from monai.data import CacheDataset, MetaTensor
from monai.transforms import Compose, Invertd, RandFlipd, Resized

from shared_iopfl.data import loading
from shared_iopfl.data.loading import ResizedByParts, UncachedBorderPadd


@pytest.mark.parametrize(
    "shape, size", [((1, 50, 41, 11), (16, 16, -1)), ((1, 30, 31, 9), (8, 8, 4)), ((3, 50, 41), (16, 16))]
)
def test_resizing_by_parts_equals_monai(shape, size):
    """The result is equal to the bit for larger, smaller and fewer slices, and so is its inverse."""
    image = MetaTensor(torch.rand(shape, generator=torch.Generator().manual_seed(0)), affine=torch.eye(4))
    options = {"mode": "trilinear" if len(shape) == 4 else "bilinear", "anti_aliasing": True}
    results = []
    for kind in (Resized, ResizedByParts):
        for wanted in (size, (60, *size[1:])):
            transform = kind("image", wanted, **options)
            resized = transform({"image": image})
            back = Invertd("image", transform)(resized)["image"]
            results.append((resized["image"], back))
    for expected, found in zip(results[:2], results[2:]):
        for one, other in zip(expected, found):
            assert torch.equal(one.as_tensor(), other.as_tensor()) and torch.equal(one.affine, other.affine)
            assert one.shape == other.shape and one.dtype == other.dtype


def test_volumes_are_smoothed_a_few_slices_at_a_time(monkeypatch):
    """This limits the memory: MONAI's convolutions allocate a volume for each weight of their kernel."""
    depths = []

    class Recording(loading.GaussianSmooth):
        def __call__(self, img):
            depths.append(img.shape[-1])
            return super().__call__(img)

    monkeypatch.setattr(loading, "GaussianSmooth", Recording)
    ResizedByParts("image", (8, 8, -1), mode="trilinear", anti_aliasing=True)({"image": torch.rand(1, 20, 20, 10)})
    assert depths == [4, 4, 2]


PEAK = """
import resource, sys
from shared_iopfl.data.loading import LoadCased
from shared_iopfl.data.photographs.reader import PhotographReader
from shared_iopfl.utils.errors import InputError

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

options = {"reader": PhotographReader(), "spatial_dims": 2, "channels": 3} if sys.argv[1].endswith("png") else {}
before = peak()
try:
    LoadCased("image", **options)({"image": sys.argv[1]})
except InputError as error:
    print(error)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of a process's peak memory differs")
@pytest.mark.parametrize("name, what", [("large.nii.gz", "too many voxels"), ("large.png", "megapixels")])
def test_files_that_are_too_large_are_rejected_before_memory_is_allocated(tmp_path, name, what):
    """For a volume of 2^28 voxels and a photograph of 169 megapixels, the process grows by less than 64 MiB."""
    path = tmp_path / name
    if name.endswith("gz"):
        header = nib.Nifti1Header()
        header.set_data_dtype(np.uint8)
        header.set_data_shape((1024, 1024, 256))
        header.set_sform(np.eye(4), code=1)
        header["vox_offset"], header["magic"] = 352, b"n+1"
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(header.binaryblock + bytes(4))
            for _ in range(256):
                file.write(bytes(2**20))
    else:
        row = zlib.compress(bytes((3 * 13000 + 1) * 13000), 1)
        path.write_bytes(png_file(13000, 13000, 8, row))
    told = subprocess.run([sys.executable, "-c", PEAK, path], check=True, capture_output=True, text=True).stdout
    reason, grown = told.strip().splitlines()
    assert what in reason and str(path) in reason
    assert float(grown) < 64


def test_padding_is_not_cached():
    volume = MetaTensor(torch.rand(1, 3, 3, 4))
    pad = UncachedBorderPadd("image", [0, 0, 1], mode="edge")
    data = CacheDataset([{"image": volume}], Compose([pad, RandFlipd("image")]), progress=False)
    assert data._cache[0]["image"].shape[-1] == 4
    assert data[0]["image"].shape[-1] == 6
