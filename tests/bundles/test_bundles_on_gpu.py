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
"""Both bundles on an accelerator: what the CPU gives, within tolerances, and mixed precision that stays finite.

On CUDA, or on the pretended device (``tests/conftest.py``). Where results are compared, both sides compute in float32.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from fl_bundles import BUNDLES, exchange, weights_of
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from PIL import Image
from torch import Tensor

from shared_iopfl.evaluation import second_look

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:executing the bundle config")]

SHORT: dict[str, Any] = {"passes": 1, "batch_size": 2, "rounds": 2, "val_interval": 2}
UPDATE = 0.1  # of the way that training went from its start: how far its end may be from the CPU's
HALF_UPDATE = 0.75  # the same of half precision: Adam's first steps go by the signs of gradients, small ones too
STEP_WAITS = 1.5  # of the host for the device in one step of training
METHODS: dict[str, dict[str, Any]] = {
    "personalised average": {},
    "FedProx and FedBN": {"proximal": 0.1, "local_norms": True},
    "Ditto": {"ditto": 0.1},
}
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def models(name: str, tmp_path_factory: pytest.TempPathFactory, random_models: Callable[..., Path]) -> Path:
    return random_models(tmp_path_factory.mktemp("models"), name)


def whole(path: Path) -> np.ndarray:
    """A mask, as its file stores it."""
    return np.asarray(nib.load(path).dataobj if path.name.endswith(".nii.gz") else Image.open(path))  # type: ignore[attr-defined]


def trained(run: Run, name: str, data: Path, folder: Path, device: torch.device, **options: Any) -> dict[str, Tensor]:
    """The models that a site's training leaves, by "file name key"."""
    settings = {**SHORT, "dataset_dir": data, "site": "A", "output_dir": folder, "ckpt_dir": folder, "amp": False}
    run("train", name, **{**settings, "verbose": False, "tensorboard": False, "device": str(device), **options})
    files = ("model.pt", "model_A.pt")
    states = {name: torch.load(folder / name, map_location="cpu", weights_only=True) for name in files}
    return {f"{name} {key}": tensor for name, state in states.items() for key, tensor in state.items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    keys = [key for key in one if one[key].is_floating_point() and "running" not in key]
    return float(torch.stack([(one[key] - other[key]).square().sum() for key in keys]).sum().sqrt())


@pytest.mark.parametrize("method", METHODS)
def test_training_ends_where_the_cpus_does(
    gpu: torch.device, name: str, data: Path, tmp_path: Path, run_config: Run, method: str
) -> None:
    options = METHODS[method]
    start = trained(run_config, name, data, tmp_path / "start", torch.device("cpu"), learning_rate=1e-9)
    expected = trained(run_config, name, data, tmp_path / "cpu", torch.device("cpu"), **options)
    found = trained(run_config, name, data, tmp_path / "gpu", gpu, **options)
    assert distance(start, expected) > 0
    assert distance(found, expected) <= UPDATE * distance(start, expected)


@pytest.mark.parametrize("half", [{"amp": True}, {"bf16": True}], ids=["float16", "bfloat16"])
def test_training_in_half_precision_stays_finite_and_moves_as_in_full(
    gpu: torch.device, name: str, data: Path, tmp_path: Path, run_config: Run, half: dict[str, Any]
) -> None:
    start = trained(run_config, name, data, tmp_path / "start", gpu, learning_rate=1e-9)
    full = trained(run_config, name, data, tmp_path / "full", gpu, ditto=0.1)
    found = trained(run_config, name, data, tmp_path / "half", gpu, ditto=0.1, **half)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert distance(found, full) <= HALF_UPDATE * distance(start, full)


def test_a_step_of_training_waits_seldom_for_the_device(
    gpu: torch.device,
    name: str,
    data: Path,
    tmp_path: Path,
    run_config: Run,
    waits: Callable[[Callable[[], object]], int],
) -> None:
    """Of two runs that differ in the number of steps alone, each step has the same share of the difference."""
    counted = [
        waits(lambda: trained(run_config, name, data, tmp_path / str(passes), gpu, passes=passes))  # noqa: B023
        for passes in (2, 6)
    ]
    per_step = (counted[1] - counted[0]) / 8  # a site has two training cases: one step a pass, in two rounds
    assert per_step <= STEP_WAITS, f"{per_step} waits a step"


@pytest.mark.parametrize("mode", ["episodic", "site", "off", "second look"])
def test_inference_gives_the_masks_of_the_cpu(
    gpu: torch.device,
    name: str,
    data: Path,
    models: Path,
    tmp_path: Path,
    run_config: Run,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders = []
    look = {"second_look": 0.0}
    if mode == "second look":
        mode, look = "episodic", {"second_look": 1.0, "target_size": 1.0}
        monkeypatch.setattr(second_look, "target_size", lambda mask: 0.1)  # masks of these models are large
        monkeypatch.setattr(
            second_look, "part_around", lambda mask, scale: second_look.Part((0.25, 0.25), (0.75, 0.75))
        )
    for device in (torch.device("cpu"), gpu):
        folders.append(tmp_path / device.type)
        options = {"dataset_dir": data / "E", "ckpt_dir": models, "output_dir": folders[-1], "mode": mode}
        options |= {"overlays": False, "one_component": False, "amp": False, "device": str(device), **look}
        run_config("inference", name, **options)
    masks = [sorted(path for path in folder.rglob("*") if path.suffix in (".gz", ".png")) for folder in folders]
    assert masks[0] and [path.name for path in masks[0]] == [path.name for path in masks[1]]
    for one, other in zip(*masks):
        differing = float((whole(one) != whole(other)).mean())
        assert differing <= 0.005, f"{one.name}: {differing:.4f} of the pixels differ"


def test_a_whole_federation(gpu: torch.device, name: str, data: Path, tmp_path: Path, run_config: Run) -> None:
    """Federate, personalise, score and route: the files of a run, with finite Dice."""
    options = {
        **SHORT,
        "rounds": 1,
        "val_interval": 1,
        "own_rounds": 1,
        "shares": [],
        "sites": ["A", "B"],
        "outside_sites": ["E"],
    }
    run_config("federate", name, dataset_dir=data, output_dir=tmp_path, device=str(gpu), **options)
    with open(tmp_path / "metrics.csv", encoding="utf-8", newline="") as file:
        scores = [row for row in csv.DictReader(file) if row["metric"].endswith("dice")]
    assert {row["model"] for row in scores} == {"global", "personalised", "soup", "routed"}
    assert all(0 <= float(row["value"]) <= 1 for row in scores)
    assert (tmp_path / "report.html").is_file()


def test_a_client_of_monais_federated_learning(
    gpu: torch.device, name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round and one evaluation, from a copy of the bundle without published models."""
    monkeypatch.chdir(tmp_path)
    root = shutil.copytree(BUNDLES / name, tmp_path / name, ignore=shutil.ignore_patterns("models", "eval"))
    own = {"dataset_dir": str(data), "image_size": 32, "features": 4, "device": str(gpu), "passes": 1, "batch_size": 2}
    algo = MonaiAlgo(str(root), train_kwargs=dict(own), eval_kwargs=dict(own))
    algo.initialize({ExtraItems.CLIENT_NAME: "A"})
    received = {key: tensor.cpu() for key, tensor in weights_of(algo.train_workflow).items()}
    algo.train(exchange(received))
    update = algo.get_weights()
    assert update.weights is not None
    assert all(torch.isfinite(torch.as_tensor(change)).all() for change in update.weights.values())
    metrics = algo.evaluate(exchange(received)).metrics
    algo.finalize()
    assert 0 <= metrics["val_mean_dice"] <= 1
