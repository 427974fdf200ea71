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
"""Experiment tracking by MONAI's own switch: ``--tracking mlflow`` on a run, and no need of MLflow without it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from monai.fl.utils.exchange_object import ExchangeObject

BUNDLES = Path(__file__).parents[2] / "bundles"
NAMES = sorted(path.parents[1].name for path in BUNDLES.glob("*/configs/metadata.json"))
TINY: dict[str, Any] = {"image_size": 32, "features": 4, "device": "cpu"}
# MLflow reports nothing where it sees a test run or a CI server: a user's machine has neither
OUTSIDE_OF_TESTS = {"PYTEST_CURRENT_TEST", "CI", "GITHUB_ACTIONS", "GITLAB_CI", "JENKINS_URL", "DO_NOT_TRACK"}

pytestmark = pytest.mark.slow


def runs_in(folder: Path) -> list[Any]:
    """The runs in the database that MONAI puts into a run's output folder."""
    client = pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{folder / 'mlruns.db'}")
    return client.search_runs(client.get_experiment_by_name("monai_experiment").experiment_id)


@pytest.mark.parametrize("name", NAMES)
def test_tracked_runs(
    name: str, tmp_path: Path, make_sites: Callable[[str, Path], Path], run_config: Callable[..., Any]
) -> None:
    """Each is one finished run of MLflow with its figures; the config as executed lies beside the database."""
    sites = make_sites(name, tmp_path / "sites")
    common: dict[str, Any] = {"tracking": "mlflow", "ckpt_dir": tmp_path / "models"}
    settings: dict[str, dict[str, Any]] = {
        "train": {"dataset_dir": sites, "site": "A", "epochs": 2, "passes": 1},
        "evaluate": {"dataset_dir": sites, "site": "A"},
        "inference": {"dataset_dir": sites / "E"},
    }
    told = {}
    for config, own in settings.items():
        workflow = run_config(config, name, output_dir=tmp_path / config, **own, **common)
        (run,) = runs_in(tmp_path / config)
        assert run.info.status == "FINISHED"
        assert len(list((tmp_path / config).glob("config_*.json"))) == 1
        told[config] = run.data.metrics
        if config != "inference":
            assert run.data.metrics["val_mean_dice"] == workflow.evaluator.state.metrics["val_mean_dice"]
    assert {"train_loss", "val_mean_dice"} <= set(told["train"])
    assert (tmp_path / "inference" / "routes.csv").is_file()


def test_a_tracked_client(tmp_path: Path, make_sites: Callable[[str, Path], Path]) -> None:
    """A federated client keeps its rounds under its own name."""
    sites = make_sites(NAMES[0], tmp_path / "sites")
    own = {"dataset_dir": str(sites), "passes": 1, "ckpt_dir": str(tmp_path), "output_dir": str(tmp_path), **TINY}
    algo = MonaiAlgo(str(BUNDLES / NAMES[0]), train_kwargs={**own, "tracking": "mlflow"}, eval_kwargs=dict(own))
    algo.initialize({ExtraItems.CLIENT_NAME: "A"})
    algo.train(ExchangeObject(weights={key: w.clone() for key, w in algo.trainer.network.state_dict().items()}))
    algo.finalize()
    (run,) = runs_in(tmp_path)
    assert run.info.run_name.startswith("A_")
    assert {"train_loss", "val_mean_dice"} <= set(run.data.metrics)


@pytest.mark.parametrize("name", NAMES)
def test_without_mlflow(
    name: str, tmp_path: Path, make_sites: Callable[[str, Path], Path], random_models: Callable[..., Path]
) -> None:
    """A run needs it only where it is asked for, and then names what is missing."""
    root = BUNDLES / name
    code = "import runpy, sys; sys.modules['mlflow'] = None; runpy.run_module('monai.bundle', run_name='__main__')"
    command = [
        *(sys.executable, "-c", code, "run", "--config_file", str(root / "configs" / "inference.json")),
        *("--bundle_root", str(root), "--dataset_dir", str(make_sites(name, tmp_path / "sites") / "E")),
        *("--ckpt_dir", str(random_models(tmp_path / "models", name)), "--output_dir", str(tmp_path / "masks")),
        *("--image_size", "32", "--features", "4", "--device", "cpu", "--mode", "off"),
        *("--empty_masks", "allow"),
    ]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert plain.returncode == 0, plain.stderr[-2000:]
    assert not list((tmp_path / "masks").glob("mlruns*"))
    again = [*command, "--overwrite", "True", "--tracking", "mlflow"]
    asked = subprocess.run(again, capture_output=True, text=True, timeout=300)
    assert asked.returncode != 0
    assert "install mlflow" in asked.stderr


@pytest.mark.parametrize("first", ["", "import mlflow; "])
def test_a_tracked_run_is_reported_to_nobody(first: str) -> None:
    """MLflow by itself tells its makers that it was used; in a bundle's run it does not, unless told to."""
    pytest.importorskip("mlflow")
    ours = f"{first}from shared_iopfl.evaluation.run.provenance import report_to_nobody as ours; "
    for called, kept in (("", False), ("ours(); ", True)):
        code = f"{ours}{called}from mlflow.telemetry import get_telemetry_client; print(get_telemetry_client() is None)"
        environment = {key: value for key, value in os.environ.items() if key not in OUTSIDE_OF_TESTS}
        environment.pop("MLFLOW_DISABLE_TELEMETRY", None)
        told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert told.stdout.strip() == str(kept)
