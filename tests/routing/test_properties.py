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
"""Properties that hold for any input: splits, averages, collapsed routes, and refusals of the readers."""

from __future__ import annotations

import gzip
import os
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import experts, images, mixture, routes_of, unet

from shared_iopfl.data.layouts import PARTS
from shared_iopfl.data.loading import LoadCased
from shared_iopfl.data.photographs.reader import CodedMaskReader, PhotographReader
from shared_iopfl.data.scan_files import case_name, file_ending, find_scans, printable, unique_names
from shared_iopfl.data.splits import fold_cases, split_cases
from shared_iopfl.federation.averaging import average_updates
from shared_iopfl.routing.network import collapse, route
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.stacks import evenly, from_stack, to_stack

few = settings(max_examples=15, deadline=None)
fractions = st.tuples(*[st.integers(1, 20)] * 3).map(lambda parts: [part / sum(parts) for part in parts])


# ---- splits ---------------------------------------------------------------------------------------------------------


def cases_of(counts: list[int]) -> list[dict[str, str]]:
    """Cases of patients, by the number of each patient's cases."""
    return [{"case": f"p{p}_{c}", "patient": f"p{p}", "site": "A"} for p, n in enumerate(counts) for c in range(n)]


@given(st.lists(st.integers(1, 3), min_size=3, max_size=40), st.integers(0, 9), fractions)
@settings(max_examples=50, deadline=None)
def test_a_split_covers_all_cases_once_and_divides_no_patient(counts, seed, shares):
    cases = cases_of(counts)
    parts = split_cases(cases, seed, dict(zip(PARTS, shares)))
    assert sorted(case["case"] for part in parts.values() for case in part) == sorted(case["case"] for case in cases)
    patients = [{case["patient"] for case in part} for part in parts.values()]
    assert all(patients)
    assert sum(len(part) for part in patients) == len(counts)


@given(st.integers(4, 12), st.integers(2, 6), st.integers(0, 9), st.floats(0.05, 0.9))
@few
def test_folds_test_each_case_once_and_their_parts_are_disjoint(count, folds, seed, validation):
    folds = min(folds, count)
    with tempfile.TemporaryDirectory() as root:
        for number in range(count):
            for ending in ("", "_segmentation"):
                path = Path(root, "A", f"Case{number:02d}{ending}.nii.gz")
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(b"x")
        tested = []
        for fold in range(folds):
            parts = [
                {case["case"] for case in fold_cases(root, "A", part, fold, folds, seed, validation)}
                for part in ("train", "validation", "test")
            ]
            assert all(parts)
            assert sum(map(len, parts)) == len(set().union(*parts)) == count
            tested += sorted(parts[2])
        assert len(tested) == len(set(tested)) == count


# ---- stacks ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from([1, 3, 5, 7]), st.integers(1, 4), st.integers(1, 4))
@few
def test_every_slice_lies_in_the_middle_of_its_own_input(depth, channels, slices, height, width):
    """The output for a slice belongs in its place; if the volume is reversed, the neighbours change sides."""
    scan = images(channels, height, width, depth)
    stack = to_stack(scan, slices)
    middle = stack.unflatten(1, (slices, channels))[:, slices // 2]
    assert torch.equal(from_stack(middle), scan)
    flipped = to_stack(scan.flip(-1), slices).flip(0).unflatten(1, (slices, channels)).flip(1).flatten(1, 2)
    assert torch.equal(flipped, stack)


@given(st.integers(1, 50), st.integers(1, 20))
@few
def test_evenly_takes_different_slices_in_order(depth, count):
    kept = evenly(torch.arange(depth), count).tolist()
    assert len(kept) == min(depth, count)
    assert kept == sorted(set(kept))


# ---- averaging ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=5), st.integers(0, 99), st.randoms(use_true_random=False))
@few
def test_an_average_lies_between_the_sites_in_any_order(counts, seed, order):
    """For any counts; the order of the sites and the unit of the counts do not matter."""
    updates = {str(n): {"w": images(4, 3, seed=seed + n)} for n in range(len(counts))}
    sizes = {str(n): count for n, count in enumerate(counts)}
    mean = average_updates(updates, sizes)["w"]
    every = torch.stack([update["w"] for update in updates.values()])
    assert (mean >= every.amin(0) - 1e-6).all() and (mean <= every.amax(0) + 1e-6).all()
    names = list(updates)
    order.shuffle(names)
    again = average_updates({name: updates[name] for name in names}, {name: 7 * sizes[name] for name in names})["w"]
    torch.testing.assert_close(again, mean, rtol=1e-6, atol=1e-6)


# ---- routing --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(0, 99), st.booleans())
@few
@torch.no_grad()
def test_a_collapsed_network_is_the_routed_one_and_the_mixture(count, seed, a_layer):
    """The output is the same for any routes; with equal routes in all layers, the weights are the mixture."""
    network, scan = unet(seed), images(2, 3, 32, 32, seed=seed)
    space = {"global": dict(network.state_dict()), **experts(count, first=seed + 1)}
    routed = route(network, space)
    routes = routes_of(count + 1, seed, layers=len(routed.layers) if a_layer else None)
    routed.start_from(routes)
    plain = collapse(routed)
    assert type(plain) is type(network)
    torch.testing.assert_close(plain(scan), routed(scan), rtol=1e-4, atol=1e-5)
    if not a_layer:
        for key, value in mixture(list(space.values()), routes).items():
            torch.testing.assert_close(plain.state_dict()[key], value, rtol=1e-5, atol=1e-6)


# ---- the front door -------------------------------------------------------------------------------------------------

NIFTI = bytes(nib.Nifti1Image(np.zeros((4, 4, 2), np.int16), np.eye(4)).header.binaryblock) + bytes(4)
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x20\0\0\0\x20\x08\x02\0\0\0"
DICOM = bytes(128) + b"DICM\x02\0\0\0UL\x04\0\xc0\0\0\0\x02\0\x10\0UI\x14\x001.2.840.10008.1.2.1\0"
JPEG, TIFF, BMP = b"\xff\xd8\xff\xe0\0\x10JFIF\0", b"II*\0\x08\0\0\0", b"BM"
STARTS = [b"", NIFTI, PNG, JPEG, TIFF, BMP, DICOM, b"NRRD0005\n", b"ObjectType = Image\n"]


def come_or_be_refused(load, path: Path) -> None:
    """The reader returns a tensor, or raises an `InputError` of one line with the name of the file."""
    refusal = None
    try:
        assert torch.as_tensor(load(path)).numel() > 0
    except InputError as error:
        refusal = str(error)
    if refusal is not None:
        assert str(path) in refusal
        assert "\n" not in refusal


@given(
    st.sampled_from([".nii.gz", ".nii", ".png", ".jpg", ".tif", ".bmp", ".dcm", ".mha", ".mhd", ".nrrd", "", ".txt"]),
    st.sampled_from(STARTS),
    st.binary(max_size=400),
    st.booleans(),
)
@settings(max_examples=120, deadline=None)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_random_bytes_are_refused_and_never_crash_a_reader(ending, start, rest, zipped):
    pytest.importorskip("itk")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"case{ending}")
        path.write_bytes(gzip.compress(start + rest) if zipped else start + rest)
        come_or_be_refused(lambda file: LoadCased("image")({"image": file})["image"], path)
        for reader in (PhotographReader(grey="replicate"), CodedMaskReader()):
            come_or_be_refused(lambda file, reader=reader: reader.get_data(reader.read(file))[0], path)
        come_or_be_refused(lambda file: torch.ones(len(find_scans(file))), path)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_damaged_header_is_refused_or_read(data):
    """With a few bytes of a valid NIfTI header changed, the result is a scan or a refusal."""
    content = bytearray(NIFTI + bytes(range(64)))
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, 351))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "case.nii")
        path.write_bytes(bytes(content))
        come_or_be_refused(lambda file: LoadCased("image")({"image": file})["image"], path)


names = st.text(st.characters(codec=None, exclude_characters="/\0"), min_size=1, max_size=12)


@given(st.lists(st.tuples(names, st.sampled_from([".nii", ".nii.gz", ".png", ".mha"])), max_size=6, unique=True))
@few
def test_whatever_files_are_called_their_cases_are_printable_and_unique(files):
    root = Path("scans")
    paths = list(dict.fromkeys(root / f"{name}{ending}" for name, ending in files if name not in (".", "..")))
    cases = unique_names(paths, root)
    assert len(set(cases.values())) == len(paths)
    for path, case in cases.items():
        assert case == printable(case) and "/" not in case
        case.encode("utf-8")
        assert case_name(path) + path.name[len(case_name(path)) :] == path.name
        assert file_ending(path)
        assert os.sep not in case
