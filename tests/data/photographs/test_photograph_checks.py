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
"""Pictures that are not a colour photograph of one eye are rejected with the reason; others pass, for all cameras."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from shared_iopfl.data.phantoms.fundus import fundus_case, fundus_style
from shared_iopfl.data.photographs.reader import PhotographReader
from shared_iopfl.utils.errors import InputError

Change = Callable[[np.ndarray], np.ndarray]


def eye(site: str, whole: bool) -> np.ndarray:
    return fundus_case(fundus_style(site), 240, np.random.RandomState(ord(site)), whole)[0]


EYES = {f"{site}, {'whole' if whole else 'crop'}": eye(site, whole) for site in "ABCD" for whole in (True, False)}
EYES["retina"] = data.retina()[::4, ::4].copy()
WHOLE = [name for name in EYES if "crop" not in name]


def read(path: Path, picture: np.ndarray, **options: str) -> np.ndarray:
    Image.fromarray(np.ascontiguousarray(picture).astype(np.uint8)).save(path)
    reader = PhotographReader(**options)  # type: ignore[arg-type]
    return reader.get_data(reader.read(path))[0]


def resized(width: float, height: float) -> Change:
    return lambda eye: np.asarray(
        Image.fromarray(eye).resize((round(eye.shape[1] * width), round(eye.shape[0] * height)))
    )


def cut(eye: np.ndarray) -> np.ndarray:
    """Crop the circle above and below, as cameras do."""
    rows = np.flatnonzero(eye.max(axis=(1, 2)) > 30)
    less = (rows[-1] - rows[0]) // 8
    return np.where((np.arange(len(eye)) > rows[0] + less)[:, None, None], eye, 0)[: rows[-1] - less]


@pytest.mark.parametrize("name", EYES)
def test_good_photographs_are_accepted_unchanged(tmp_path, name):
    for change in (lambda eye: eye, lambda eye: eye * 0.4, lambda eye: np.rot90(eye), lambda eye: eye[:, ::-1]):
        picture = change(EYES[name])
        assert np.abs(read(tmp_path / "a.png", picture) - picture.astype(np.uint8).swapaxes(0, 1)).max() == 0


@pytest.mark.parametrize("name", WHOLE)
def test_a_field_of_view_cropped_by_the_camera_is_not_stretched(tmp_path, name):
    read(tmp_path / "a.png", cut(EYES[name]))
    read(tmp_path / "a.png", np.rot90(cut(EYES[name])))
    read(tmp_path / "a.png", np.pad(EYES[name], ((0, 0), (60, 200), (0, 0))))


@pytest.mark.parametrize("name", EYES)
@pytest.mark.parametrize(
    "change, what",
    [
        (lambda eye: eye[..., 1:2] * [1.01, 1, 0.99], "got grey with a tint in"),
        (lambda eye: eye[..., :1] * np.array([0.98, 1, 0.95]), "got grey with a tint in"),
        (lambda eye: eye * [0, 1, 0], "got a single colour in"),
        (lambda eye: eye * [1, 0, 0], "got a single colour in"),
        (lambda eye: eye * [0.05, 1, 0.05], "got a single colour in"),
        (lambda eye: eye[..., ::-1], "correct the order of its channels"),
        (lambda eye: eye[..., [1, 0, 2]], "correct the order of its channels"),
        (lambda eye: eye[..., [2, 0, 1]], "correct the order of its channels"),
        (lambda eye: 255 - eye, "correct the order of its channels|fields of view|grey with a tint"),
        (lambda eye: np.concatenate([eye, eye[:, ::-1]], axis=1), "each eye as a picture of its own"),
        (lambda eye: np.concatenate([eye, eye], axis=0), "each eye as a picture of its own"),
    ],
)
def test_pictures_that_are_not_a_photograph_of_one_fundus_are_rejected(tmp_path, name, change, what):
    with pytest.raises(InputError, match=what) as error:
        read(tmp_path / "x.png", change(EYES[name]))
    assert "x.png" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("width, height", [(1.4, 1), (1, 1.4), (2, 1), (1, 1.8), (0.5, 1)])
def test_stretched_photographs_are_rejected(tmp_path, name, width, height):
    with pytest.raises(InputError, match="square pixels"):
        read(tmp_path / "x.png", resized(width, height)(EYES[name]))


@pytest.mark.parametrize("name", ["A, whole", "C, crop"])
def test_grey_and_other_colours_are_accepted_on_request(tmp_path, name):
    """The only channel, or the mean of nearly grey ones, is repeated three times; swapped channels are unchanged."""
    eye = EYES[name]
    for change in (lambda eye: eye * [0, 1, 0], lambda eye: eye[..., 1:2] * [1.01, 1, 0.99]):
        taken = read(tmp_path / "x.png", change(eye), grey="replicate")
        assert np.array_equal(taken[..., 0], taken[..., 1]) and np.array_equal(taken[..., 0], taken[..., 2])
        assert np.abs(taken[..., 0] - eye[..., 1].T).max() <= 1
    assert np.array_equal(read(tmp_path / "x.png", eye[..., ::-1], grey="replicate"), eye[..., ::-1].swapaxes(0, 1))
