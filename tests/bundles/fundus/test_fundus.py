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
"""The fundus bundle end to end on synthetic sites: federate, score, serve photographs, refuse what is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fundus_runs import (
    BUNDLE,
    Run,
    bare_retina,
    check_mask,
    cut_short,
    dice,
    first_of,
    grey,
    pixels,
    refusal,
    rows,
    run_fundus,
    vertical_ratio,
)
from PIL import Image
from typed import run_bundle

from shared_iopfl.data.splits import site_cases
from shared_iopfl.evaluation.records import routes

# enough for disc and cup to be learnt, in seconds
LEARN: dict[str, Any] = {
    "rounds": 12,
    "own_rounds": 1,
    "passes": 8,
    "batch_size": 2,
    "learning_rate": 0.01,
    "server_momentum": 0.0,  # at so large a rate it would overshoot
    "val_interval": 6,
}
EXIF_ORIENTATION, TURNED = 0x0112, 6  # stored on its side: to be turned by 90 degrees clockwise


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
    statistics = rows(federated / "statistics.csv")
    assert [row["site"] for row in statistics] == ["A", "B"]
    assert all(0 <= float(row[key]) <= 1 for row in statistics for key in ("global", "own"))
    html = (federated / "report.html").read_text(encoding="utf-8")
    assert "</html>" in html
    assert ">finished<" in html and ">unfinished<" not in html
    settings = json.loads((federated / "run.json").read_text())["settings"]
    assert settings["val_interval"] == LEARN["val_interval"] and settings["client_config"]["val_interval"] == 0
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
        assert scores[case["site"], case["model"], case["case"]] == pytest.approx(expected, abs=2e-6, nan_ok=True)


def test_federation_learns_disc_and_cup(federated: Path) -> None:
    """A swapped, shifted or turned target would not be found: the soup outlines both at the outside site."""
    soup = [row for row in rows(federated / "metrics.csv") if row["model"] == "soup"]
    for metric in ("dice_disc", "dice_cup"):
        assert np.mean([float(row["value"]) for row in soup if row["metric"] == metric]) > 0.55


# ---- outside --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(
    sites: Path, federated: Path, tmp_path_factory: pytest.TempPathFactory, run_config: Run
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
    run_fundus(run_config, "inference", dataset_dir=folder, ckpt_dir=federated / "models", output_dir=output)
    return folder, output


UPRIGHT = {
    "plain": (96, 96), "alpha": (96, 96), "scan": (96, 96), "old": (96, 96), "camera": (80, 96), "upright": (80, 96),
}  # fmt: skip


def test_pictures_of_every_kind_get_their_mask(served: tuple[Path, Path]) -> None:
    """PNG, JPEG, TIFF and BMP: a mask in the upright picture's pixels, and an overlay."""
    _, output = served
    assert {path.name for path in output.iterdir()} == {
        *(f"{name}{ending}" for name in UPRIGHT for ending in (".png", "_overlay.png")),
        "measures.csv", "review.csv", "routes.csv", "routes.json", "run.json", "report.html", "scans.csv",
        "written.jsonl",
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


def test_the_mask_of_a_photograph_lies_on_its_disc(
    photographs: Path, federated: Path, tmp_path: Path, run_config: Run
) -> None:
    """The crop around the disc is undone: the mask lies where the disc is in the photograph's own pixels.

    Served alone: among crops, where the site decides, it would be taken for one of them and flagged.
    """
    image = first_of(photographs / "images")
    run_fundus(run_config, "inference", dataset_dir=image, ckpt_dir=federated / "models", output_dir=tmp_path)
    reference = pixels(first_of(photographs / "masks")) >= 1
    assert dice(pixels(tmp_path / image.name) >= 1, reference) > 0.6


def test_no_cup_without_a_disc(sites: Path, federated: Path, tmp_path: Path, run_config: Run) -> None:
    """A network sure of the cup and of no disc gets an empty mask, whose ratio is undefined."""
    state = torch.load(federated / "models" / "model.pt")
    state["final_conv.bias"] = torch.tensor([-1e3, 1e3])
    torch.save(state, tmp_path / "model.pt")
    image = first_of(sites / "E" / "images")
    run_fundus(
        run_config, "inference", dataset_dir=image, ckpt=tmp_path / "model.pt", mode="off", crop="never",
        output_dir=tmp_path / "masks", empty_masks="allow",
    )  # fmt: skip
    assert not pixels(tmp_path / "masks" / image.name).any()
    (row,) = rows(tmp_path / "masks" / "measures.csv")
    assert row["vertical_cup_to_disc_ratio"] == "nan"


# ---- what is refused ------------------------------------------------------------------------------------------------


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
    assert not list((tmp_path / "masks").glob("*.png"))


def test_command_line_ends_a_truncated_jpeg_in_one_line(sites: Path, federated: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(first_of(sites / "E" / "images").read_bytes())
    cut_short(bad)
    given = {"dataset_dir": bad, "ckpt_dir": federated / "models", "output_dir": tmp_path / "masks"}
    process = run_bundle(BUNDLE, "inference", **given, image_size=32, features=4, device="cpu")
    assert process.returncode == 1
    lines = (process.stdout + process.stderr).replace("\r", "\n").splitlines()
    (line,) = [line for line in lines if "error" in line.lower() or "Traceback" in line or line.startswith("  File")]
    assert line.startswith("error: ")
    assert str(bad) in line
    assert not list((tmp_path / "masks").glob("*.png"))


# ---- what a folder is taken for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "preset", "mode"), [(3, "default", ""), (3, "paper", ""), (3, "default", "site")])
def test_photographs_are_routed_one_by_one_unless_a_folder_is_to_be_one_site(
    count: int, preset: str, mode: str, sites: Path, federated: Path, tmp_path: Path, run_config: Run
) -> None:
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    for image in sorted((sites / "E" / "images").iterdir())[:count]:
        (scans / image.name).write_bytes(image.read_bytes())
    common = {"dataset_dir": scans, "ckpt_dir": federated / "models", "output_dir": masks, "preset": preset}
    run_fundus(run_config, "inference", **common, **({"mode": mode} if mode else {}))
    routed = json.loads((masks / "routes.json").read_text())["cases"]
    assert (masks / "site.pt").is_file() == (mode == "site")
    assert set(routed) == ({"site"} if mode == "site" else {image.stem for image in scans.iterdir()})
    assert mode != "site" or routed["site"]["scans"] == count
    assert preset == "paper" or len(rows(masks / "review.csv")) == count  # which judges by views


def test_a_site_is_measured_on_so_many_of_its_photographs(
    sites: Path, federated: Path, tmp_path: Path, run_config: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many a folder holds: evenly spaced, so that memory and time are bounded."""
    monkeypatch.setattr(routes, "SITE_SCANS", 2)
    common = {"dataset_dir": sites / "E" / "images", "ckpt_dir": federated / "models", "output_dir": tmp_path}
    run_fundus(run_config, "inference", mode="site", **common)
    assert json.loads((tmp_path / "routes.json").read_text())["cases"]["site"]["scans"] == 2
    assert len(rows(tmp_path / "review.csv")) == len(list((sites / "E" / "images").iterdir())) > 2


def test_of_a_folder_of_bad_photographs_each_is_named(federated: Path, tmp_path: Path, run_config: Run) -> None:
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    scans.mkdir()
    for name in ("one.png", "two.png"):
        (scans / name).write_bytes(b"no picture")
    line = refusal(run_config, "inference", dataset_dir=scans, ckpt_dir=federated / "models", output_dir=masks)
    assert line.startswith("2 of 2 scans failed")
    assert {row["case"] for row in rows(masks / "failed.csv")} == {"one", "two"}
