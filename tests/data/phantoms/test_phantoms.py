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
from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import label as components

from shared_iopfl.data.phantoms.fundus import fundus_style
from shared_iopfl.data.phantoms.prostate import prostate_style
from shared_iopfl.data.phantoms.sites import make_fundus_sites, make_prostate_sites
from shared_iopfl.utils.errors import InputError

SIZE = (48, 48, 12)


def volumes(site: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the scans and masks of a site's folder, in the order of their names."""
    masks = sorted(site.glob("*_segmentation.nii.gz"))
    return [
        tuple(np.asarray(nib.load(p).dataobj) for p in (str(m).replace("_segmentation", ""), m))  # type: ignore[misc]
        for m in masks
    ]


def pictures(site: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the pictures and masks of a site's folder, in the order of their names."""
    return [
        (np.asarray(Image.open(p)), np.asarray(Image.open(site / "masks" / p.name)))
        for p in sorted((site / "images").glob("*.png"))
    ]


@pytest.fixture(scope="module")
def prostate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prostate")
    make_prostate_sites(folder, cases=3, size=SIZE, seed=7)
    return folder


@pytest.fixture(scope="module")
def fundus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fundus")
    make_fundus_sites(folder, cases=4, size=96, seed=7)
    return folder


def test_prostate_layout_is_that_of_the_public_set(prostate: Path) -> None:
    expected = {
        f"{site}/Case{3 * i + case:02d}{ending}.nii.gz"
        for i, site in enumerate("ABCDE")
        for case in range(3)
        for ending in ("", "_segmentation")
    }
    assert {p.relative_to(prostate).as_posix() for p in prostate.rglob("*") if p.is_file()} == expected
    image = nib.load(prostate / "B" / "Case03.nii.gz")
    mask = nib.load(prostate / "B" / "Case03_segmentation.nii.gz")
    assert image.shape == mask.shape == SIZE
    assert image.get_data_dtype() == np.int16
    assert mask.get_data_dtype() == np.uint8
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert np.array_equal(image.affine, mask.affine)
    assert image.header.get_zooms()[2] == pytest.approx(3)


def test_every_prostate_is_connected_and_in_the_middle_slices(prostate: Path) -> None:
    for site in "ABCDE":
        for _, mask in volumes(prostate / site):
            assert set(np.unique(mask)) == {0, 1}
            assert components(mask)[1] == 1
            assert not mask[..., [0, -1]].any()
            assert 0.3 <= mask.any(axis=(0, 1)).mean() <= 0.7


def test_prostate_is_not_found_by_a_threshold(prostate: Path) -> None:
    """The best intensity window, even if chosen with the mask, includes as much of other tissue."""
    for site in "ABCDE":
        image, mask = volumes(prostate / site)[0]
        inside = image[mask == 1]
        dice = []
        for low in range(0, 60, 10):
            for high in range(40, 101, 10):
                found = (image >= np.percentile(inside, low)) & (image <= np.percentile(inside, high))
                dice.append(2 * (found & (mask == 1)).sum() / (found.sum() + mask.sum()))
        assert max(dice) < 0.5


def test_prostate_sites_depend_on_the_seed_and_not_on_each_other(prostate: Path, tmp_path: Path) -> None:
    make_prostate_sites(tmp_path / "again", sites=("C",), cases=2, size=SIZE, seed=7)
    make_prostate_sites(tmp_path / "other", sites=("C",), cases=1, size=SIZE, seed=8)
    whole, alone, other = (volumes(f / "C") for f in (prostate, tmp_path / "again", tmp_path / "other"))
    for (image, mask), (same_image, same_mask) in zip(whole, alone):
        assert np.array_equal(image, same_image)
        assert np.array_equal(mask, same_mask)
    assert not np.array_equal(whole[0][1], whole[1][1])
    assert not np.array_equal(whole[0][0], other[0][0])


def test_making_sites_leaves_global_random_state_unchanged(tmp_path: Path) -> None:
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.rand()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    make_prostate_sites(tmp_path / "p", sites="A", cases=1, size=SIZE)
    make_fundus_sites(tmp_path / "f", sites="A", cases=1, size=64)
    assert np.random.rand() == expected  # noqa: NPY002


def spread(features: dict[str, list[np.ndarray]]) -> tuple[float, float]:
    """Return the mean distance between the sites' mean features, and that of the cases from their site's mean."""
    means = {site: np.mean(values, axis=0) for site, values in features.items()}
    between = [np.linalg.norm(means[a] - means[b]) for a in means for b in means if a < b]
    within = [np.linalg.norm(value - means[site]) for site, values in features.items() for value in values]
    return float(np.mean(between)), float(np.mean(within))


def test_prostate_sites_differ_in_appearance_and_units(prostate: Path) -> None:
    """After robust normalisation the histograms of two sites differ more than those of one site's cases."""
    features: dict[str, list[np.ndarray]] = {}
    units = {}
    for site in "ABCDE":
        images = [image.astype(float) for image, _ in volumes(prostate / site)]
        units[site] = np.mean([np.percentile(image, 99.5) for image in images])
        for image in images:
            low, high = np.percentile(image, [0.5, 99.5])
            quantiles = np.quantile(np.clip((image - low) / (high - low), 0, 1), np.linspace(0.1, 0.9, 9))
            features.setdefault(site, []).append(quantiles)
    between, within = spread(features)
    assert between > 1.5 * within
    assert max(units.values()) > 4 * min(units.values())


def test_fundus_layout_and_coding(fundus: Path) -> None:
    for i, site in enumerate("ABCDE"):
        names = [f"case{4 * i + case:03d}.png" for case in range(4)]
        assert sorted(p.name for p in (fundus / site / "images").iterdir()) == names
        assert sorted(p.name for p in (fundus / site / "masks").iterdir()) == names
        for image, mask in pictures(fundus / site):
            assert image.shape == (96, 96, 3)
            assert mask.shape == (96, 96)
            assert image.dtype == mask.dtype == np.uint8
            assert set(np.unique(mask)) == {0, 1, 2}


def test_cup_is_connected_and_surrounded_by_the_rim(fundus: Path) -> None:
    for site in "ABCDE":
        for _, mask in pictures(fundus / site):
            cup, disc = mask == 2, mask > 0
            assert components(cup)[1] == components(disc)[1] == 1
            for shift in (-1, 1):
                for axis in (0, 1):
                    assert not (np.roll(cup, shift, axis) & ~disc).any()  # no cup borders on the background
            width = disc.any(axis=0).sum() / disc.shape[1]
            assert 0.25 < width < 0.55


def test_fundus_sites_differ_in_appearance(fundus: Path) -> None:
    """The colours of two sites differ more than those of one site's cases."""
    features = {
        site: [np.quantile(image / 255, (0.25, 0.5, 0.9), axis=(0, 1)).ravel() for image, _ in pictures(fundus / site)]
        for site in "ABCDE"
    }
    between, within = spread(features)
    assert between > 1.5 * within


def test_photographs_show_the_whole_field_of_view(tmp_path: Path) -> None:
    make_fundus_sites(tmp_path, sites=("A", "B"), cases=3, size=150, seed=1, photographs=True)
    sides = set()
    for site in "AB":
        for image, mask in pictures(tmp_path / site):
            assert image.shape == (150, 200, 3)
            assert image[[0, 0, -1, -1], [0, -1, 0, -1]].max() < 20  # black corners
            disc = mask > 0
            assert 1 / 12 < disc.any(axis=0).sum() / 200 < 1 / 7
            sides.add(bool(np.argwhere(disc)[:, 1].mean() > 100))
    assert sides == {True, False}  # both eyes


def test_fundus_sites_depend_on_the_seed_and_not_on_each_other(fundus: Path, tmp_path: Path) -> None:
    make_fundus_sites(tmp_path, sites=("D",), cases=2, size=96, seed=7)
    for (image, mask), (same_image, same_mask) in zip(pictures(fundus / "D"), pictures(tmp_path / "D")):
        assert np.array_equal(image, same_image)
        assert np.array_equal(mask, same_mask)


@pytest.mark.parametrize("style", [prostate_style, fundus_style])
def test_another_name_has_its_own_style(style) -> None:
    assert style("north", 1) == style("north", 1)
    assert style("north", 1) != style("south", 1)
    assert style("north", 1) != style("north", 2)
    assert style("A", 1) == style("A", 2)


def test_sites_may_be_named_on_the_command_line(tmp_path: Path) -> None:
    make_fundus_sites(tmp_path, sites="A,north", cases=1, size=48)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A", "north"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"sites": ()},
        {"sites": ("A", "A")},
        {"sites": ("../A",)},
        {"cases": 0},
        {"size": 96},
        {"size": (96, 96)},
        {"size": (9, 9, 9)},
    ],
)
def test_invalid_arguments_are_rejected_before_anything_is_written(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(InputError):
        make_prostate_sites(tmp_path, **wrong)
    with pytest.raises(InputError):
        make_fundus_sites(tmp_path, **(wrong if "size" not in wrong else {"size": 8}))
    assert not list(tmp_path.iterdir())
