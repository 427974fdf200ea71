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
"""The fundus bundle end to end on synthetic sites: federate in every coding, score, serve photographs, refuse."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from PIL import Image
from scipy import ndimage

from shared_iopfl.errors import root_input_error
from shared_iopfl.federation import Federation
from shared_iopfl.phantoms import make_fundus_sites
from shared_iopfl.sites import site_cases

BUNDLE = Path(__file__).parents[2] / "bundles" / "fundus_iopfl"
# enough for disc and cup to be learnt, in seconds
LEARN: dict[str, Any] = {
    "rounds": 12,
    "own_rounds": 1,
    "passes": 8,
    "batch_size": 2,
    "learning_rate": 0.01,
    "val_interval": 6,
}
GLANCE: dict[str, Any] = {
    "rounds": 1,
    "own_rounds": 1,
    "passes": 1,
    "batch_size": 2,
    "val_interval": 1,
    "crop": "never",
}
EXIF_ORIENTATION, TURNED = 0x0112, 6  # stored on its side: to be turned by 90 degrees clockwise
Run = Callable[..., ConfigWorkflow]


def run_fundus(run_config: Run, config: str, **overrides: Any) -> ConfigWorkflow:
    return run_config(config, "fundus_iopfl", **overrides)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pixels(path: str | Path) -> np.ndarray:
    """(H, W) or (H, W, 3), as the file stores them."""
    with Image.open(path) as picture:
        return np.asarray(picture)


def first_of(folder: Path) -> Path:
    return min(folder.iterdir())


def check_mask(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A mask is an 8-bit PNG of one channel in the picture's pixels: 0, 1 a disc in one piece, 2 a cup in it."""
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "L")
        mask = np.asarray(picture)
    assert mask.shape == shape[:2]
    assert set(np.unique(mask)) <= {0, 1, 2}
    for target in (mask >= 1, mask == 2):
        assert ndimage.label(target, np.ones((3, 3)))[1] <= 1
        filled = ndimage.binary_fill_holes(target, np.ones((3, 3)))  # MONAI takes a diagonal gap for open
        np.testing.assert_array_equal(filled, target)
    return mask


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def vertical_ratio(disc: np.ndarray, cup: np.ndarray) -> float:
    """Rows that the cup extends over, for those of the disc, in (H, W)."""
    heights = [np.ptp(np.flatnonzero(target.any(axis=1))) + 1 for target in (cup, disc)]
    return float(heights[0] / heights[1])


def as_dofe(source: Path, target: Path, held_out: int = 2) -> None:
    """A site of ``images`` and ``masks`` as the public four-domain set has it: other folders, other values, a split."""
    images = sorted((source / "images").iterdir())
    for number, image in enumerate(images):
        rois = target / ("test" if number < held_out else "train") / "ROIs"
        for kind in ("image", "mask"):
            (rois / kind).mkdir(parents=True, exist_ok=True)
        coded = np.array([255, 128, 0], np.uint8)[pixels(source / "masks" / image.name)]
        Image.open(image).save(rois / "image" / image.name)
        Image.fromarray(coded).convert("RGB" if number % 2 else "L").save(rois / "mask" / image.name)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Disc crops: A, B and E coded 0, 1, 2; Domain1 and Domain2, the same eyes, as the public set codes them."""
    folder = tmp_path_factory.mktemp("sites")
    make_fundus_sites(folder, sites=("A", "B", "E"), cases=5, size=96)
    as_dofe(folder / "A", folder / "Domain1")
    as_dofe(folder / "B", folder / "Domain2")
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site of whole photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    make_fundus_sites(folder, sites=("E",), cases=3, size=192, photographs=True)
    return folder / "E"


@pytest.fixture(scope="module")
def federated(sites: Path, tmp_path_factory: pytest.TempPathFactory, run_config: Run) -> Path:
    """A run over A and B with E outside, from crops to the report."""
    folder = tmp_path_factory.mktemp("run")
    inside = {"sites": ["A", "B"], "outside_sites": ["E"]}
    run_fundus(run_config, "federate", dataset_dir=sites, output_dir=folder, **inside, **LEARN)
    return folder


# ---- inside ---------------------------------------------------------------------------------------------------------


def test_federation_leaves_its_files(federated: Path) -> None:
    """The models, what a resumption needs, tables and a report in which every site's cases are pictured."""
    for name in ("model.pt", "model_A.pt", "model_B.pt"):
        state = torch.load(federated / "models" / name, weights_only=True)
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    assert not (federated / "models" / "model_E.pt").exists()
    assert all((federated / name).is_file() for name in ("federation.pt", "history.csv", "run.json"))
    html = (federated / "report.html").read_text(encoding="utf-8")
    assert "</html>" in html
    assert "vcdr error" in html
    assert "Left out" not in html
    assert [path for path in federated.rglob(".*") if path.is_file()] == []


def test_federation_scores_both_targets_and_their_ratio(federated: Path, sites: Path) -> None:
    """Dice of disc, cup and both, and the vertical ratio with its error, are what the written masks show."""
    scores: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows(federated / "metrics.csv"):
        scores.setdefault((row["site"], row["model"], row["case"]), {})[row["metric"]] = float(row["value"])
    cases = rows(federated / "cases.csv")
    inside = {
        (site, model, case["case"])
        for site in "AB"
        for case in site_cases(sites, site, "test")
        for model in ("global", "personalised")
    }
    outside = {
        ("E", model, case["case"]) for case in site_cases(sites, "E", "all") for model in ("global", "soup", "routed")
    }
    assert set(scores) == inside | outside
    assert len(cases) == len(scores)
    for case in cases:
        mask = check_mask(federated / case["mask"], pixels(case["image"]).shape)
        reference = pixels(case["label"])
        expected = {
            "dice_disc": dice(mask >= 1, reference >= 1),
            "dice_cup": dice(mask == 2, reference == 2),
            "vcdr": vertical_ratio(mask >= 1, mask == 2),
            "vcdr_reference": vertical_ratio(reference >= 1, reference == 2),
        }
        expected["dice"] = (expected["dice_disc"] + expected["dice_cup"]) / 2
        expected["vcdr_error"] = abs(expected["vcdr"] - expected["vcdr_reference"])
        assert scores[case["site"], case["model"], case["case"]] == pytest.approx(expected, abs=2e-6)


def test_federation_learns_disc_and_cup(federated: Path) -> None:
    """A swapped, shifted or turned target would not be found: the soup outlines both at the outside site."""
    soup = [row for row in rows(federated / "metrics.csv") if row["model"] == "soup"]
    for metric in ("dice_disc", "dice_cup"):
        assert np.mean([float(row["value"]) for row in soup if row["metric"] == metric]) > 0.55


@dataclass
class PublicRun:
    folder: Path
    read_in_rounds: set[str]


@pytest.fixture(scope="module")
def public(sites: Path, tmp_path_factory: pytest.TempPathFactory, run_config: Run, opened_files: Any) -> PublicRun:
    """A short run over the public layout and coding, and what its rounds opened."""
    folder, opened = tmp_path_factory.mktemp("public"), set()
    rounds = Federation.run

    def recorded_rounds(self: Federation) -> dict[str, torch.Tensor]:
        with opened_files.record() as paths:
            result = rounds(self)
        opened.update(paths)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "run", recorded_rounds)
        run_fundus(
            run_config, "federate", dataset_dir=sites, output_dir=folder, sites=["Domain1"],
            outside_sites=["Domain2"], coding="dofe", **GLANCE,
        )  # fmt: skip
    return PublicRun(folder, opened)


def test_the_public_split_is_kept(public: PublicRun, sites: Path) -> None:
    """Rounds train and validate on the train folder, all of it, and open nothing else of the public sites."""
    train, test = (
        {os.path.abspath(path) for path in (sites / "Domain1" / part).rglob("*.png")} for part in ("train", "test")
    )
    assert len(test) == 4
    assert train <= public.read_in_rounds
    assert not test & public.read_in_rounds
    assert not any("Domain2" in path for path in public.read_in_rounds)
    scored = {row["case"] for row in rows(public.folder / "metrics.csv") if row["site"] == "Domain1"}
    assert scored == {Path(path).stem for path in test}


def check_references(run: Path, originals: Path, site: str, count: int) -> None:
    """The scored references of a site are its eyes', whatever values its files have."""
    metrics = [row for row in rows(run / "metrics.csv") if row["site"] == site and row["metric"] == "vcdr_reference"]
    assert len({row["case"] for row in metrics}) == count
    for row in metrics:
        mask = pixels(originals / "masks" / f"{row['case']}.png")
        assert float(row["value"]) == pytest.approx(vertical_ratio(mask >= 1, mask == 2), abs=1e-6)


def test_public_masks_are_read_as_they_are_coded(public: PublicRun, sites: Path) -> None:
    """A mask of 255, 128, 0 is the same reference as one of 0, 1, 2; masks are written as 0, 1, 2; all are pictured."""
    check_references(public.folder, sites / "A", "Domain1", 2)
    check_references(public.folder, sites / "B", "Domain2", 5)
    for case in rows(public.folder / "cases.csv"):
        check_mask(public.folder / case["mask"], pixels(case["image"]).shape)
    assert "Left out" not in (public.folder / "report.html").read_text(encoding="utf-8")


def test_a_coding_for_each_site(sites: Path, tmp_path: Path, run_config: Run) -> None:
    """Sites of different codings federate."""
    run_fundus(
        run_config, "federate", dataset_dir=sites, output_dir=tmp_path, sites=["Domain1", "A"],
        coding={"Domain1": "dofe", "A": "index"}, **GLANCE,
    )  # fmt: skip
    check_references(tmp_path, sites / "A", "Domain1", 2)
    check_references(tmp_path, sites / "A", "A", len(site_cases(sites, "A", "test")))


def test_a_coding_of_ones_own(sites: Path, tmp_path: Path, run_config: Run) -> None:
    """A coding may be spelt out instead of named; the values mean what it says, not what another coding says."""
    swapped = {"disc": [1, 2], "cup": [1], "background": [0]}  # the rim taken for the cup
    run_fundus(
        run_config, "federate", dataset_dir=sites, output_dir=tmp_path, sites=["A"], coding=swapped, **GLANCE
    )  # fmt: skip
    for row in rows(tmp_path / "metrics.csv"):
        if row["metric"] == "vcdr_reference":
            assert float(row["value"]) == 1


def test_whole_photographs_federate(photographs: Path, tmp_path: Path, run_config: Run) -> None:
    """A site of whole photographs trains on crops around the disc, and is scored in the photographs' own pixels."""
    run_fundus(
        run_config, "federate", dataset_dir=photographs.parent, output_dir=tmp_path, sites=["E"],
        **{**GLANCE, "crop": "auto"},
    )  # fmt: skip
    assert {row["metric"] for row in rows(tmp_path / "history.csv")} >= {"train_loss", "val_mean_dice"}
    check_references(tmp_path, photographs, "E", 1)
    for case in rows(tmp_path / "cases.csv"):
        assert check_mask(tmp_path / case["mask"], (192, 256)).any()


# ---- outside --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(
    sites: Path, photographs: Path, federated: Path, tmp_path_factory: pytest.TempPathFactory, run_config: Run
) -> tuple[Path, Path]:
    """A folder of pictures of every kind, and another with what inference writes of them."""
    folder, output = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("masks")
    crops = [Image.open(path) for path in sorted((sites / "E" / "images").iterdir())]
    crops[0].save(folder / "plain.png")
    crops[0].convert("RGBA").save(folder / "alpha.png")
    crops[1].save(folder / "scan.tif")
    crops[2].save(folder / "old.bmp")
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = TURNED
    camera = crops[3].crop((0, 8, 96, 88)).transpose(Image.Transpose.ROTATE_90)
    camera.save(folder / "camera.jpg", exif=exif, quality=95)
    Image.open(folder / "camera.jpg").transpose(Image.Transpose.ROTATE_270).save(folder / "upright.png")
    (folder / "whole.png").write_bytes(first_of(photographs / "images").read_bytes())
    run_fundus(run_config, "inference", dataset_dir=folder, ckpt_dir=federated / "models", output_dir=output)
    return folder, output


UPRIGHT = {
    "plain": (96, 96), "alpha": (96, 96), "scan": (96, 96), "old": (96, 96), "camera": (80, 96), "upright": (80, 96),
    "whole": (192, 256),
}  # fmt: skip


def test_pictures_of_every_kind_get_their_mask(served: tuple[Path, Path]) -> None:
    """PNG, JPEG, TIFF and BMP, crops and photographs: a mask in the upright picture's pixels, and an overlay."""
    _, output = served
    assert {path.name for path in output.iterdir()} == {
        *(f"{name}{ending}" for name in UPRIGHT for ending in (".png", "_overlay.png")),
        "measures.csv", "review.csv", "routes.csv", "routes.json", "run.json",
    }  # fmt: skip
    for name, shape in UPRIGHT.items():
        assert set(np.unique(check_mask(output / f"{name}.png", shape))) == {0, 1, 2}
        overlay = pixels(output / f"{name}_overlay.png")
        assert overlay.ndim == 3 and overlay.std() > 10


def test_each_mask_comes_with_its_ratio(served: tuple[Path, Path]) -> None:
    _, output = served
    measured = {row["case"]: float(row["vertical_cup_to_disc_ratio"]) for row in rows(output / "measures.csv")}
    masks = {name: pixels(output / f"{name}.png") for name in UPRIGHT}
    assert measured == pytest.approx({n: vertical_ratio(m >= 1, m == 2) for n, m in masks.items()}, abs=1e-4)


def test_how_a_picture_is_stored_does_not_matter(served: tuple[Path, Path]) -> None:
    """A camera's orientation and an opaque alpha channel change no pixel of the mask."""
    _, output = served
    np.testing.assert_array_equal(pixels(output / "camera.png"), pixels(output / "upright.png"))
    np.testing.assert_array_equal(pixels(output / "alpha.png"), pixels(output / "plain.png"))


def test_the_mask_of_a_photograph_lies_on_its_disc(served: tuple[Path, Path], photographs: Path) -> None:
    """The crop around the disc is undone: the mask lies where the disc is in the photograph's own pixels."""
    _, output = served
    reference = pixels(first_of(photographs / "masks")) >= 1
    assert dice(pixels(output / "whole.png") >= 1, reference) > 0.6


def test_no_cup_without_a_disc(sites: Path, federated: Path, tmp_path: Path, run_config: Run) -> None:
    """A network sure of the cup and of no disc gets an empty mask, whose ratio is undefined."""
    state = torch.load(federated / "models" / "model.pt")
    state["final_conv.bias"] = torch.tensor([-1e3, 1e3])
    torch.save(state, tmp_path / "model.pt")
    image = first_of(sites / "E" / "images")
    run_fundus(
        run_config, "inference", dataset_dir=image, ckpt=tmp_path / "model.pt", mode="off", crop="never",
        output_dir=tmp_path / "masks",
    )  # fmt: skip
    assert not pixels(tmp_path / "masks" / image.name).any()
    (row,) = rows(tmp_path / "masks" / "measures.csv")
    assert row["vertical_cup_to_disc_ratio"] == "nan"


# ---- what is refused ------------------------------------------------------------------------------------------------


def refusal(run_config: Run, config: str, **overrides: Any) -> str:
    """The one line that a run ends in."""
    with pytest.raises(Exception) as caught:
        run_fundus(run_config, config, **overrides)
    cause = root_input_error(caught.value)
    assert cause is not None
    assert "\n" not in str(cause)
    return str(cause)


@pytest.mark.parametrize(
    ("site", "coding", "value", "fitting"), [("A", "dofe", "1, 2", "index"), ("Domain1", "index", "128, 255", "dofe")]
)
def test_a_wrong_coding_is_refused(
    site: str, coding: str, value: str, fitting: str, sites: Path, tmp_path: Path, run_config: Run
) -> None:
    """Before the first round, naming a file, its unexpected values, and the coding that would fit."""
    line = refusal(
        run_config, "federate", dataset_dir=sites, sites=[site], coding=coding, output_dir=tmp_path, **GLANCE
    )
    assert f"values {value} in " in line
    assert any(case["label"] in line for case in site_cases(sites, site, "train"))
    assert f"'{fitting}' would fit" in line
    assert not (tmp_path / "federation.pt").exists()


def test_an_unknown_coding_is_refused(sites: Path, tmp_path: Path, run_config: Run) -> None:
    for coding in ("dofee", {"A": "dofee"}):
        line = refusal(
            run_config, "federate", dataset_dir=sites, sites=["A"], coding=coding, output_dir=tmp_path, **GLANCE
        )
        assert "dofee" in line
        assert "'dofe', 'index'" in line


def cut_short(path: Path) -> None:
    """A JPEG that ends in the middle, under the name it has: what a broken copy leaves."""
    Image.open(path).save(path, "JPEG", quality=95)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grey(path: Path) -> None:
    Image.open(path).convert("L").save(path)


def bare_retina(path: Path) -> None:
    """A picture of retina without any disc."""
    noise = 5 * np.random.RandomState(1).randn(96, 96, 3)
    Image.fromarray((np.array([170, 85, 40]) + noise).clip(0, 255).astype(np.uint8)).save(path)


def smaller(path: Path) -> None:
    Image.open(path).resize((90, 90), Image.Resampling.NEAREST).save(path)


def unexpected_value(path: Path) -> None:
    mask = pixels(path).copy()
    mask[0, 0] = 7
    Image.fromarray(mask).save(path)


def blurred(path: Path) -> None:
    """A mask saved as JPEG has values in between."""
    Image.open(path).save(path, "JPEG")


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (cut_short, "image", "broken picture"),
        (grey, "image", "grey"),
        (bare_retina, "image", "no optic disc"),
        (smaller, "label", "shape"),
        (unexpected_value, "label", "values 7 "),
        (blurred, "label", "lossy"),
    ],
)
def test_a_bad_file_is_named_in_one_line(
    damage: Callable[[Path], None], kind: str, words: str, sites: Path, tmp_path: Path, run_config: Run
) -> None:
    """A federation over a site with one bad picture or mask stops before its first round."""
    for name in ("images", "masks"):
        (tmp_path / "data" / "A" / name).mkdir(parents=True)
        for path in (sites / "A" / name).iterdir():
            (tmp_path / "data" / "A" / name / path.name).write_bytes(path.read_bytes())
    bad = Path(site_cases(tmp_path / "data", "A", "train")[0][kind])
    damage(bad)
    options = {**GLANCE, "crop": "auto", "dataset_dir": tmp_path / "data", "output_dir": tmp_path / "run"}
    line = refusal(run_config, "federate", sites=["A"], **options)
    assert str(bad) in line
    assert words in line
    assert not (tmp_path / "run" / "federation.pt").exists()


@pytest.mark.parametrize(("damage", "words"), [(grey, "grey"), (bare_retina, "no optic disc")])
def test_a_bad_photograph_is_named_in_one_line(
    damage: Callable[[Path], None], words: str, sites: Path, federated: Path, tmp_path: Path, run_config: Run
) -> None:
    """Inference says the same, and writes no mask of it."""
    bad = tmp_path / "bad.png"
    bad.write_bytes(first_of(sites / "E" / "images").read_bytes())
    damage(bad)
    line = refusal(
        run_config, "inference", dataset_dir=bad, ckpt_dir=federated / "models", output_dir=tmp_path / "masks"
    )
    assert str(bad) in line
    assert words in line
    assert not list((tmp_path / "masks").iterdir())


def test_command_line_ends_a_truncated_jpeg_in_one_line(sites: Path, federated: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(first_of(sites / "E" / "images").read_bytes())
    cut_short(bad)
    options = {
        "bundle_root": BUNDLE, "dataset_dir": bad, "ckpt_dir": federated / "models", "output_dir": tmp_path / "masks",
        "image_size": 32, "features": 4, "device": "cpu",
    }  # fmt: skip
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(BUNDLE / "configs" / "inference.json")]
    process = subprocess.run(
        [*command, *(part for key, value in options.items() for part in (f"--{key}", str(value)))],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 1
    lines = (process.stdout + process.stderr).replace("\r", "\n").splitlines()
    (line,) = [line for line in lines if "error" in line.lower() or "Traceback" in line or line.startswith("  File")]
    assert line.startswith("error: ")
    assert str(bad) in line
    assert not list((tmp_path / "masks").iterdir())
