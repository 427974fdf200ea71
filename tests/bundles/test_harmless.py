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
"""Scans that no model was made for: adaptation says what it did, and what it serves is never worse than its start."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser
from PIL import Image

from shared_iopfl.data.phantoms.fundus import fundus_case, fundus_style
from shared_iopfl.data.phantoms.prostate import prostate_case, prostate_style

BUNDLES = ("prostate_iopfl", "fundus_iopfl")
SIZE = 32
# an adaptation as it is, as published, and one whose steps are far too large
WAYS: dict[str, dict[str, Any]] = {
    "default": {"preset": "default"},
    "adapted": {"preset": "adapted"},
    "paper": {"preset": "paper", "routing": {"steps": 4}},
    "wild": {"preset": "adapted", "routing": {"learning_rate": 1000.0, "affine": True, "agreement": 0.0}},
}


def volumes() -> dict[str, np.ndarray]:
    rng = np.random.RandomState(0)
    scan, _ = prostate_case(prostate_style("A"), (SIZE, SIZE, 8), np.random.RandomState(0))
    x, y, z = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j, -1:1:8j]
    return {
        "noise": rng.rand(SIZE, SIZE, 8).astype(np.float32),
        "empty": 0.37 * (rng.rand(SIZE, SIZE, 8) < 0.001),  # a few hot pixels of an empty scanner
        "other_organ": 900 * (np.abs(x) + y**2 + z**2 < 0.5) + 100 * (x**2 + y**2 < 0.8),
        "upside_down": np.asarray(scan)[:, ::-1],
        "back_to_front": np.asarray(scan)[..., ::-1],
        "good": np.asarray(scan),
    }


def photographs() -> dict[str, np.ndarray]:
    rng = np.random.RandomState(0)
    eye, _ = fundus_case(fundus_style("A"), SIZE, np.random.RandomState(0))
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    empty = rng.randint(0, 3, (SIZE, SIZE, 3))  # lens cap on
    return {
        "noise": rng.randint(0, 256, (SIZE, SIZE, 3)),
        "empty": empty,
        "other_organ": np.stack([200 * (np.abs(x) < 0.3), 180 * (y > 0), 90 + 60 * x], -1),
        "upside_down": eye[::-1],
        "negative": 255 - eye,
        "good": eye,
    }


@pytest.fixture(scope="module", params=BUNDLES)
def scans(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "fundus_iopfl":
        for name, array in photographs().items():
            Image.fromarray(array.astype(np.uint8)).save(folder / f"{name}.png")
    else:
        for name, array in volumes().items():
            nib.save(nib.Nifti1Image(array.astype(np.float32), np.diag([-1.0, -1, 3, 1])), folder / f"{name}.nii")
    return request.param, folder


@pytest.mark.slow
@pytest.mark.parametrize(("way", "mode"), [*((way, "episodic") for way in WAYS), ("adapted", "site"), ("wild", "site")])
def test_what_is_served_is_never_worse_than_the_start(
    way: str,
    mode: str,
    scans: tuple[str, Path],
    tmp_path: Path,
    run_config: Callable,
    random_models: Callable[..., Path],
) -> None:
    """No crash, no NaN; the guard's decision, the objective before and after, and the routes are in the output.

    Where the guard kept the start, the mask is the one of no step at all, to the byte.
    """
    bundle, folder = scans
    options: dict[str, Any] = {"dataset_dir": folder, "ckpt_dir": random_models(tmp_path / "models", bundle)}
    options.update(overlays=False, mode=mode, **WAYS[way])
    if bundle == "fundus_iopfl":
        options.update(crop="never", grey="replicate")
    run_config("inference", bundle, output_dir=tmp_path / "run", **options)
    config = ConfigParser()
    config.read_config(str(Path(__file__).parents[2] / "bundles" / bundle / "configs" / "inference.json"))
    config.update({"preset": WAYS[way].get("preset", "default"), "mode": mode})
    routing = WAYS[way].get("routing", config.get_parsed_content("routing"))
    options["routing"] = {**routing, "steps": 0}
    run_config("inference", bundle, output_dir=tmp_path / "start", **options)

    routed = json.loads((tmp_path / "run" / "routes.json").read_text())["cases"]
    with (tmp_path / "run" / "routes.csv").open(newline="") as file:
        weights = [(row["case"], row["layer"], float(row["weight"])) for row in csv.DictReader(file)]
    ending = ".png" if bundle == "fundus_iopfl" else ".nii"
    names = sorted(path.name.removesuffix(ending) for path in folder.iterdir())
    reported = names if mode == "episodic" else ["site"]  # one network for them all
    assert sorted(routed) == sorted({case for case, _, _ in weights}) == reported
    for case, layer in {(case, layer) for case, layer, _ in weights}:
        total = sum(weight for at, of, weight in weights if (at, of) == (case, layer))
        assert total == pytest.approx(1, abs=1e-4), f"routes of {case}, {layer}"
    for name in names:
        report, mask = routed[name if mode == "episodic" else "site"], tmp_path / "run" / f"{name}{ending}"
        values = np.asarray(Image.open(mask)) if ending == ".png" else np.asarray(nib.load(mask).dataobj)  # type: ignore[attr-defined]
        assert set(np.unique(values)) <= {0, 1, 2}
        assert report["decision"] in ("start", "adapted") and report["reason"]
        if way == "default":
            assert report["decision"] == "start"
            continue
        before, after = report["objective_start"], report["objective_end"]
        assert math.isfinite(before), name
        if report["decision"] == "adapted":
            assert math.isfinite(after) and after < before, name
        else:
            assert mask.read_bytes() == (tmp_path / "start" / mask.name).read_bytes(), name
    decisions = {report["decision"] for report in routed.values()}
    if (way, mode) == ("wild", "episodic"):
        assert "start" in decisions  # the guard had something to refuse
