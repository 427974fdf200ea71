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
from PIL import Image

from shared_iopfl.data.phantoms.fundus import fundus_case, fundus_style
from shared_iopfl.data.phantoms.prostate import prostate_case, prostate_style

ROOT = Path(__file__).parents[2]
BUNDLES = ("prostate_iopfl", "fundus_iopfl")
SIZE = 32
# an adaptation as it is, as published, and one whose steps are far too large
WAYS: dict[str, tuple[str, dict[str, Any]]] = {  # preset, and settings on top of the config's
    "default": ("default", {}),
    "adapted": ("adapted", {}),
    "paper": ("paper", {"steps": 4}),
    "wild": ("adapted", {"learning_rate": 1000.0, "affine": True, "agreement": 0.0}),
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


class Server:
    """Serves a folder of scans with a bundle's models of random weights.

    Attributes:
        bundle: its name.
        scans: the folder.
    """

    def __init__(self, bundle: str, folder: Path, run_config: Callable, random_models: Callable[..., Path]) -> None:
        self.bundle, self.scans, self._folder, self._run_config = bundle, folder / "scans", folder, run_config
        self.scans.mkdir()
        self._options: dict[str, Any] = {
            "dataset_dir": self.scans,
            "ckpt_dir": random_models(folder / "models", bundle),
        }
        if bundle == "fundus_iopfl":
            self._options.update(crop="never", grey="replicate")
            for name, array in photographs().items():
                Image.fromarray(array.astype(np.uint8)).save(self.scans / f"{name}.png")
        else:
            for name, array in volumes().items():
                scan = nib.Nifti1Image(array.astype(np.float32), np.diag([-1.0, -1, 3, 1]))
                nib.save(scan, self.scans / f"{name}.nii")

    def masks(self, mode: str, preset: str, settings: dict[str, Any]) -> Path:
        """The folder of their masks, made once for the same settings."""
        folder = self._folder / f"{mode}_{preset}_{'_'.join(map(str, settings.items()))}"
        if not folder.exists():
            options = {**self._options, "overlays": False, "mode": mode, "preset": preset, "routing": settings}
            self._run_config("inference", self.bundle, output_dir=folder, **options)
        return folder


@pytest.fixture(scope="module", params=BUNDLES)
def server(
    request: Any, tmp_path_factory: pytest.TempPathFactory, run_config: Callable, random_models: Callable[..., Path]
) -> Server:
    return Server(request.param, tmp_path_factory.mktemp(request.param), run_config, random_models)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "mode"), [*((way, "episodic") for way in WAYS), ("adapted", "site"), ("wild", "site")])
def test_what_is_served_is_never_worse_than_the_start(way: str, mode: str, server: Server) -> None:
    """No crash, no NaN; the guard's decision, the objective before and after, and the routes are in the output.

    Where the guard kept the start, the mask is the one of no step at all, to the byte.
    """
    preset, settings = WAYS[way]
    run = server.masks(mode, preset, settings)
    routed = json.loads((run / "routes.json").read_text())["cases"]
    with (run / "routes.csv").open(newline="") as file:
        weights = [(row["case"], row["layer"], float(row["weight"])) for row in csv.DictReader(file)]
    ending = ".png" if server.bundle == "fundus_iopfl" else ".nii"
    names = sorted(path.name.removesuffix(ending) for path in server.scans.iterdir())
    reported = names if mode == "episodic" else ["site"]  # one network for them all
    assert sorted(routed) == sorted({case for case, _, _ in weights}) == reported
    for case, layer in {(case, layer) for case, layer, _ in weights}:
        total = sum(weight for at, of, weight in weights if (at, of) == (case, layer))
        assert total == pytest.approx(1, abs=1e-4), f"routes of {case}, {layer}"
    for name in names:
        report, mask = routed[name if mode == "episodic" else "site"], run / f"{name}{ending}"
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
            start = server.masks(mode, preset, {"steps": 0})
            assert mask.read_bytes() == (start / mask.name).read_bytes(), name
    decisions = {report["decision"] for report in routed.values()}
    if (way, mode) == ("wild", "episodic"):
        assert "start" in decisions  # the guard had something to refuse
