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
"""Synthetic sites for a first run and for tests; they contain no scan of any patient."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from tqdm import tqdm

from shared_iopfl.data.phantoms.fundus import fundus_case, fundus_style
from shared_iopfl.data.phantoms.prostate import FIELD_OF_VIEW, prostate_case, prostate_style
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import whole_file

SITES = ("A", "B", "C", "D", "E")


def make_prostate_sites(
    output_dir: str | os.PathLike,
    sites: Sequence[str] = SITES,
    cases: int = 8,
    size: Sequence[int] = (96, 96, 16),
    seed: int = 0,
) -> None:
    """Write synthetic T2 MRI of the prostate in the layout of the public six-site set.

    The files are ``<output_dir>/<SITE>/CaseNN.nii.gz`` (int16, raw intensities) and ``CaseNN_segmentation.nii.gz``
    (uint8, 0 or 1), numbered consecutively over the sites. The contents of a case depend only on the seed, its site and
    its position within the site.

    Args:
        output_dir: Folder to write to; it is created if necessary.
        sites: Names of the sites. A to E have given styles: A and D without endorectal coil, B, C and E with one, which
            is far more sensitive at E. Another name gets a style drawn from the seed and the name.
        cases: Number of cases per site.
        size: Number of voxels to the left, to the back and to the head, at least 32, 32 and 8.
        seed: Seed of all random numbers.

    Raises:
        InputError: If sites, cases or size are invalid.
    """
    names = _check(sites, cases)
    size = tuple(int(n) for n in np.atleast_1d(size))
    if len(size) != 3 or any(n < least for n, least in zip(size, (32, 32, 8))):
        raise InputError(f"size {size}: give three numbers of voxels, at least (32, 32, 8)")
    # voxel axes point to the left, to the back and to the head, NIfTI's world axes to the right, front and head
    spacing = (FIELD_OF_VIEW[0] / size[0], FIELD_OF_VIEW[1] / size[1], 3.0)
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(size) - 1) / 2)

    for number, (site, case) in enumerate(_progress(names, cases)):
        image, label = prostate_case(prostate_style(site, seed), size, _random_state(seed, site, case))
        for ending, voxels in (("", image), ("_segmentation", label)):
            volume = nib.Nifti1Image(voxels, affine)
            volume.header.set_xyzt_units("mm")
            _write(Path(output_dir) / site / f"Case{number:02d}{ending}.nii.gz", volume.to_filename)


def make_fundus_sites(
    output_dir: str | os.PathLike,
    sites: Sequence[str] = SITES,
    cases: int = 16,
    size: int = 192,
    seed: int = 0,
    photographs: bool = False,
) -> None:
    """Write synthetic pictures of the eye fundus with their optic discs and cups.

    The files are ``<output_dir>/<SITE>/images/caseNNN.png`` (uint8, RGB) and ``<output_dir>/<SITE>/masks/caseNNN.png``
    (uint8: 0 background, 1 disc rim, 2 cup), numbered consecutively over the sites. The contents of a case depend only
    on the seed, its site and its position within the site.

    Args:
        output_dir: Folder to write to; it is created if necessary.
        sites: Names of the sites. A to E have given styles, with E between B and C; another name gets a style drawn
            from the seed and the name.
        cases: Number of cases per site.
        size: Height of the pictures in pixels, at least 32 for crops and 128 for photographs.
        seed: Seed of all random numbers.
        photographs: Write whole photographs, a third wider than high and with discs of about a ninth of the width,
            instead of square crops around the disc.

    Raises:
        InputError: If sites, cases or size are invalid.
    """
    names = _check(sites, cases)
    if size < (least := 128 if photographs else 32):
        raise InputError(f"size {size}: give at least {least} pixels")
    for number, (site, case) in enumerate(_progress(names, cases)):
        pictures = fundus_case(fundus_style(site, seed), size, _random_state(seed, site, case), photographs)
        for folder, picture in zip(("images", "masks"), pictures):
            _write(Path(output_dir) / site / folder / f"case{number:03d}.png", Image.fromarray(picture).save)


def _check(sites: Sequence[str] | str, cases: int) -> list[str]:
    """Return the sites' names as a list; names from the command line may be one text with commas."""
    names = [str(site).strip() for site in (sites.split(",") if isinstance(sites, str) else sites)]
    if not names or len(set(names)) < len(names) or any(not n or Path(n).name != n for n in names):
        raise InputError(f"sites {names}: give one or more different names that can be folders")
    if cases < 1:
        raise InputError(f"cases {cases}: give at least 1")
    return names


def _progress(names: Sequence[str], cases: int) -> tqdm:
    return tqdm([(site, case) for site in names for case in range(cases)], desc="synthetic cases", unit="case")


def _random_state(seed: int, site: str, case: int) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(f"{seed}/{site}/{case}".encode()))


def _write(path: Path, save: Callable[[Path], object]) -> None:
    with whole_file(path) as temporary:
        save(temporary)
