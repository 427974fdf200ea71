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
"""The pages of ``docs/extending``, followed to the letter, extend the package as they say."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from extending import follow, run
from monai.bundle import ConfigParser
from PIL import Image

from shared_iopfl.data.phantoms.sites import make_prostate_sites
from shared_iopfl.models.files import load_weights
from shared_iopfl.models.weights import equal_weights

FEDERATE = (
    "python -m monai.bundle run --config_file bundles/prostate_iopfl/configs/federate.json "
    "--bundle_root bundles/prostate_iopfl --dataset_dir DIR"
)
MOST_LINES = 120  # of a task


def make_lesions(folder: Path, sites: tuple[str, ...] = ("clinic_a", "clinic_b", "clinic_c"), cases: int = 5) -> None:
    """Dark spots on skin of one colour per site, with masks of the values 0 and 255."""
    rng = np.random.default_rng(0)
    x, y = np.mgrid[:40, :40]
    for number, site in enumerate(sites):
        for kind in ("images", "masks"):
            (folder / site / kind).mkdir(parents=True)
        for case in range(cases):
            lesion = np.hypot(x - rng.integers(15, 25), y - rng.integers(15, 25)) < rng.integers(7, 12)
            skin = np.array([210 - 20 * number, 160, 140]) + rng.normal(0, 6, (40, 40, 3)) - 70 * lesion[..., None]
            Image.fromarray(skin.clip(0, 255).astype(np.uint8)).save(folder / site / "images" / f"{case}.png")
            Image.fromarray((255 * lesion).astype(np.uint8)).save(folder / site / "masks" / f"{case}.png")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_task_by_json_alone(tmp_path: Path) -> None:
    """Skin lesions, one target: train, federate, inference and report, of a short task.json and no Python."""
    make_lesions(tmp_path / "DIR")
    printed = follow("task.md", tmp_path)
    bundle = tmp_path / "bundles" / "skin_iopfl"
    assert len((bundle / "task.json").read_text().splitlines()) <= MOST_LINES
    assert {path.name for path in bundle.iterdir()} == {"task.json", "configs"}
    assert "clinic_a: 3 train" in printed and "masks of 0, 255" in printed
    assert (tmp_path / "OUT_TRAIN" / "models" / "model_clinic_a.pt").is_file()
    scores = rows(tmp_path / "OUT" / "metrics.csv")
    assert {row["site"] for row in scores} == {"clinic_a", "clinic_b", "clinic_c"}
    assert {row["metric"] for row in scores if "dice" in row["metric"]} == {"dice"}
    masks = sorted((tmp_path / "MASKS").glob("*.png"))
    assert len([path for path in masks if Image.open(path).mode == "L"]) == 5
    assert "clinic_c" in (tmp_path / "OUT" / "report.html").read_text(encoding="utf-8")
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    config = ConfigParser(ConfigParser.load_config_file(bundle / "configs" / "inference.json"))
    assert metadata["network_data_format"]["outputs"]["pred"]["num_channels"] == config["network_def#out_channels"] == 1


@pytest.mark.slow
def test_a_flare_job(tmp_path: Path) -> None:
    """FLARE's average of the differences that the sites sent makes the mean of what they trained."""
    pytest.importorskip("nvflare")
    make_prostate_sites(tmp_path / "DIR", sites=("A", "B"), cases=4, size=(32, 32, 8))
    path = follow("plain_flare.md", tmp_path).rpartition("global model: ")[2].split()[0]
    found = torch.load(path, weights_only=True)["model"]
    local = [torch.load(tmp_path / "OUT" / site / "local_model.pt", weights_only=True) for site in "AB"]
    assert not equal_weights(*local)
    for key, tensor in found.items():  # of as many cases each
        torch.testing.assert_close(tensor.float(), (local[0][key].float() + local[1][key].float()) / 2)


@pytest.mark.slow
def test_a_method_outside(tmp_path: Path) -> None:
    """An inferer and an entry in baselines.json become a row of the comparison."""
    make_prostate_sites(tmp_path / "DIR", sites=("A", "B", "E"), cases=4, size=(32, 32, 8))
    follow("outside_method.md", tmp_path)
    scores = {row["method"]: row for row in rows(tmp_path / "OUT" / "comparison.csv")}
    assert {"global", "standardised"} <= set(scores)
    assert "standardised" in (tmp_path / "OUT" / "comparison.md").read_text(encoding="utf-8")
    for task in ("prostate", "fundus"):
        baselines = tmp_path / "bundles" / f"{task}_iopfl" / "configs" / "baselines.json"
        assert (
            json.loads(baselines.read_text())["baselines"]["standardised"]["_target_"]
            == "my_inferers.StandardisedInferer"
        )


@pytest.mark.slow
def test_a_method_inside(tmp_path: Path) -> None:
    """A handler and one key are a method that federate.json switches on: with it, the weights differ."""
    make_prostate_sites(tmp_path / "DIR", sites=("A", "B"), cases=4, size=(32, 32, 8))
    follow("inside_method.md", tmp_path)
    settings = json.loads((tmp_path / "OUT" / "run.json").read_text())["settings"]
    assert settings["gradient_limit"] == 0.001
    for task in ("prostate", "fundus"):
        config = json.loads((tmp_path / "bundles" / f"{task}_iopfl" / "configs" / "train.json").read_text())
        assert config["gradient_limit"] == 0.0
        kinds = [handler.get("_target_") for handler in config["train"]["handlers"] if isinstance(handler, dict)]
        assert "my_handlers.GradientLimit" in kinds
    with_limit = load_weights(str(tmp_path / "OUT" / "models" / "model.pt"))
    federate = f"{FEDERATE} --output_dir OUT_PLAIN"
    run(federate, tmp_path)
    without = load_weights(str(tmp_path / "OUT_PLAIN" / "models" / "model.pt"))
    assert not equal_weights(with_limit, without)


@pytest.mark.slow
def test_a_routing_objective(tmp_path: Path) -> None:
    """A module that a JSON file names is what adaptation minimises, with the weight given there."""
    make_prostate_sites(tmp_path / "sites", sites=("A",), cases=1, size=(32, 32, 8))
    (tmp_path / "DIR").mkdir()
    (scan,) = [path for path in (tmp_path / "sites" / "A").iterdir() if "segmentation" not in path.name]
    shutil.copy(scan, tmp_path / "DIR" / scan.name)
    follow("objective.md", tmp_path)
    (case,) = json.loads((tmp_path / "OUT" / "routes.json").read_text())["cases"].values()
    assert -1 <= case["objective_start"] < 0  # minus a difference of probabilities
    assert case["decision"] in ("adapted", "start")
