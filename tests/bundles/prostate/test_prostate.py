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
"""The prostate bundle on synthetic sites: train, evaluate, infer, and serve scans of any depth."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from prostate_runs import BUNDLE, Run, dice, load, mask_of, rows, weights

from shared_iopfl.data.splits import site_cases


def test_train_evaluate_infer(
    sites_dir: Path, tmp_path: Path, run_config: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """A site alone: training leaves plain models and curves, which evaluation scores and inference serves."""
    models, output = tmp_path / "models", tmp_path / "eval"
    common = {"ckpt_dir": models, "output_dir": output}
    run_config("train", dataset_dir=sites_dir, site="A", epochs=2, passes=1, val_interval=1, **common)
    assert weights(models / "model.pt").keys() == weights(models / "model_A.pt").keys()
    assert list(output.glob("events.out.tfevents.*"))

    run_config("evaluate", dataset_dir=sites_dir, site="A", split="test", **common)
    test_cases = {case["case"] for case in site_cases(sites_dir, "A", "test")}
    assert {row["case"] for row in rows(output / "metrics.csv")} == test_cases
    assert "dice (%)" in capsys.readouterr().out

    untrained = {"empty_masks": "allow"}
    run_config("inference", dataset_dir=sites_dir / "E", ckpt_dir=models, output_dir=tmp_path / "masks", **untrained)
    scans = {path.name for path in (sites_dir / "E").iterdir() if "_segmentation" not in path.name}
    assert {path.name for path in (tmp_path / "masks").glob("*.nii.gz")} == scans
    assert (tmp_path / "masks" / "routes.csv").is_file()


def test_training_keeps_its_loss_and_its_best_epoch(sites_dir: Path, tmp_path: Path, run_config: Run) -> None:
    """The trainer's own metric is the mean loss, and less of it is better."""
    workflow = run_config(
        "train", dataset_dir=sites_dir, site="A", epochs=2, passes=1, val_interval=0, save_checkpoints=False,
        ckpt_dir=tmp_path / "models", output_dir=tmp_path,
    )  # fmt: skip
    state = workflow.parser.get_parsed_content("train#trainer").state
    assert state.metrics["train_loss"] > 0
    assert state.best_metric <= state.metrics["train_loss"]


def test_a_score_is_that_of_the_written_mask(
    sites_dir: Path, tmp_path: Path, run_config: Run, random_models: Callable[[Path], Path]
) -> None:
    """The Dice in the table is the foreground Dice of the two files; scoring again replaces rows, and adds none."""
    models = random_models(tmp_path / "models")
    for _ in range(2):
        run_config(
            "evaluate", dataset_dir=sites_dir, site="E", role="outside", model="routed", split="all",
            ckpt_dir=models, output_dir=tmp_path, overwrite=True,
        )  # fmt: skip
    scores = {row["case"]: float(row["value"]) for row in rows(tmp_path / "metrics.csv") if row["metric"] == "dice"}
    cases = rows(tmp_path / "cases.csv")
    assert len(cases) == len(scores) == len(site_cases(sites_dir, "E", "all"))
    for case in cases:
        recomputed = dice(mask_of(tmp_path / case["mask"]), mask_of(Path(case["label"])))
        assert scores[case["case"]] == pytest.approx(recomputed, abs=1e-6)
    assert all(0 < score < 1 for score in scores.values())


@pytest.mark.parametrize("shape", [(40, 36, 1), (40, 36, 2), (40, 36), (33, 47, 5)])
def test_scans_of_any_depth(
    shape: tuple[int, ...], tmp_path: Path, run_config: Run, random_models: Callable[[Path], Path]
) -> None:
    """One slice, two slices, a 2D NIfTI, and an oblique scan are segmented in their own grid."""
    image = np.random.RandomState(0).rand(*shape).astype(np.float32)
    affine = np.array([[-0.6, 0.1, 0, 5], [0.1, 0.6, 0.2, -3], [0, -0.1, 3, 8], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "scan.nii.gz")
    models = random_models(tmp_path / "models")
    run_config("inference", dataset_dir=tmp_path / "scan.nii.gz", ckpt_dir=models, output_dir=tmp_path / "masks")
    mask = load(tmp_path / "masks" / "scan.nii.gz")
    assert mask.shape == shape
    np.testing.assert_allclose(mask.affine, affine, atol=1e-6)
    assert set(np.unique(mask.dataobj)) == {0, 1}


def test_serving_an_outside_site_opens_no_label(
    sites_dir: Path, tmp_path: Path, run_config: Run, random_models: Callable[[Path], Path], opened_files: Any
) -> None:
    """The masks of an outside site may lie next to its scans: they are not looked at."""
    models = random_models(tmp_path / "models")
    with opened_files.record() as opened:
        run_config("inference", dataset_dir=sites_dir / "E", ckpt_dir=models, output_dir=tmp_path / "masks")
    read = {Path(path).name for path in opened if str(sites_dir) in path}
    assert len(read) == len(site_cases(sites_dir, "E", "all"))
    assert not any("_segmentation" in name for name in read)


def test_the_model_of_a_site_serves_without_routing(
    sites_dir: Path, tmp_path: Path, run_config: Run, random_models: Callable[[Path], Path]
) -> None:
    """Mode "site" writes a plain network; served like any other, it gives the same masks, and not the global ones."""
    models, site_model = random_models(tmp_path / "models"), tmp_path / "model_of_E.pt"
    common = {"dataset_dir": sites_dir / "E", "ckpt_dir": models, "routing": {"views": "none"}}
    run_config("inference", mode="site", site_model=site_model, output_dir=tmp_path / "made", **common)
    assert weights(site_model).keys() == weights(models / "model.pt").keys()
    assert (tmp_path / "made" / "routes.json").is_file()

    run_config("inference", mode="off", ckpt=site_model, output_dir=tmp_path / "plain", **common)
    run_config("inference", mode="off", output_dir=tmp_path / "global", **common)
    run_config("inference", mode="site", site_model=site_model, output_dir=tmp_path / "again", **common)
    names = sorted(path.name for path in (tmp_path / "made").glob("*.nii.gz"))
    assert len(names) == len(site_cases(sites_dir, "E", "all"))
    differ = False
    for name in names:
        made, plain, again = (mask_of(tmp_path / folder / name) for folder in ("made", "plain", "again"))
        np.testing.assert_array_equal(made, plain)
        np.testing.assert_array_equal(made, again)
        differ |= not np.array_equal(made, mask_of(tmp_path / "global" / name))
    assert differ


@pytest.mark.slow
def test_training_on_two_processes(sites_dir: Path, tmp_path: Path) -> None:
    """Under torchrun each process trains on its part, one of them writes: plain models, one curve each, no deadlock."""
    configs = [str(BUNDLE / "configs" / f"{name}.json") for name in ("train", "multi_gpu_train")]
    options = {
        "bundle_root": BUNDLE, "dataset_dir": sites_dir, "site": "A", "image_size": 32, "features": 4, "epochs": 2,
        "passes": 2, "val_interval": 1, "output_dir": tmp_path / "eval", "ckpt_dir": tmp_path / "models",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--nproc_per_node=2"]
    command += ["-m", "monai.bundle", "run", "--config_file", str(configs)]
    process = subprocess.run(
        [*command, *(part for key, value in options.items() for part in (f"--{key}", str(value)))],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    for name in ("model.pt", "model_A.pt"):
        assert not any(key.startswith("module.") for key in weights(tmp_path / "models" / name))
    assert process.stdout.count("Metrics -- train_loss") == 2  # epochs, of one process
    assert len(list((tmp_path / "eval").glob("events.out.tfevents.*"))) == 2  # of the trainer, of the evaluator
