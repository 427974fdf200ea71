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
"""The prostate bundle end to end on synthetic sites: train, evaluate, infer, federate, resume, serve, refuse."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from shared_iopfl.errors import root_input_error
from shared_iopfl.federation import Federation, SiteClient
from shared_iopfl.sites import site_cases

BUNDLE = Path(__file__).parents[2] / "bundles" / "prostate_iopfl"
FEDERATE: dict[str, Any] = {
    "sites": ["A", "B"],
    "own_rounds": 1,
    "shares": [],  # untrained, all would keep the global model
    "passes": 1,
    "batch_size": 2,
    "val_interval": 1,
    "rounds": 2,
}
Run = Callable[..., ConfigWorkflow]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def weights(path: Path) -> dict[str, torch.Tensor]:
    """A file's content, which has to be a plain state_dict."""
    state = torch.load(path, weights_only=True)
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    return state


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def load(path: str | Path) -> Any:
    return nib.load(path)


def mask_of(path: Path) -> np.ndarray:
    return np.asarray(load(path).dataobj)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def test_train_evaluate_infer(sites_dir: Path, tmp_path: Path, run_config: Run) -> None:
    """A site alone: training leaves plain models and curves, which evaluation scores and inference serves."""
    models, output = tmp_path / "models", tmp_path / "eval"
    common = {"ckpt_dir": models, "output_dir": output}
    run_config("train", dataset_dir=sites_dir, site="A", epochs=2, passes=1, val_interval=1, **common)
    assert weights(models / "model.pt").keys() == weights(models / "model_A.pt").keys()
    assert list(output.glob("events.out.tfevents.*"))

    run_config("evaluate", dataset_dir=sites_dir, site="A", split="test", **common)
    test_cases = {case["case"] for case in site_cases(sites_dir, "A", "test")}
    assert {row["case"] for row in rows(output / "metrics.csv")} == test_cases

    run_config("inference", dataset_dir=sites_dir / "E", ckpt_dir=models, output_dir=tmp_path / "masks")
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


@dataclass
class FederatedRun:
    folder: Path
    read_in_rounds: set[str]
    read_after: set[str]


@pytest.fixture(scope="module")
def federated(
    sites_dir: Path, tmp_path_factory: pytest.TempPathFactory, run_config: Run, opened_files: Any
) -> FederatedRun:
    """A run over A and B with E outside, and which files were opened in its rounds and which in its scoring."""
    folder, recorded = tmp_path_factory.mktemp("run"), {}
    rounds = Federation.run

    def recorded_rounds(self: Federation) -> dict[str, torch.Tensor]:
        with opened_files.record() as recorded["in rounds"]:
            result = rounds(self)
        opened_files.paths, opened_files.recording = set(), True
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "run", recorded_rounds)
        run_config("federate", dataset_dir=sites_dir, output_dir=folder, outside_sites=["E"], **FEDERATE)
    opened_files.recording = False
    return FederatedRun(folder, recorded["in rounds"], opened_files.paths)


def test_federation_leaves_its_files(federated: FederatedRun) -> None:
    """The global model, one personalised model a site, what a resumption needs, tables and a report; no half files."""
    folder = federated.folder
    shared = weights(folder / "models" / "model.pt")
    for site in "AB":
        personalised = weights(folder / "models" / f"model_{site}.pt")
        assert personalised.keys() == shared.keys()
        assert not equal(personalised, shared)
    assert not (folder / "models" / "model_E.pt").exists()
    assert (folder / "federation.pt").is_file()
    assert "</html>" in (folder / "report.html").read_text(encoding="utf-8")
    hidden = [path for path in folder.rglob(".*") if path.is_file()]
    assert hidden == []


def test_federation_history(federated: FederatedRun) -> None:
    """Each round tells each site's training loss and rate, and both models' scores on the site's validation cases."""
    history = rows(federated.folder / "history.csv")
    assert list(history[0]) == ["round", "site", "model", "metric", "value"]
    told = {(row["round"], row["site"], row["model"], row["metric"]) for row in history}
    for number in "12":
        for site in "AB":
            assert {(number, site, "local", "train_loss"), (number, site, "local", "learning_rate")} <= told
            assert {(number, site, model, "val_mean_dice") for model in ("global", "personalised")} <= told
    assert all(float(row["value"]) > 0 for row in history if row["metric"] == "train_loss")


def test_federation_scores(federated: FederatedRun, sites_dir: Path) -> None:
    """Inside sites are scored on their test cases by two models, the outside one on all its cases by three."""
    metrics = rows(federated.folder / "metrics.csv")
    assert list(metrics[0]) == ["site", "role", "case", "model", "metric", "value"]
    scored = {(row["site"], row["role"], row["model"], row["case"]) for row in metrics if row["metric"] == "dice"}
    inside = {
        (site, "inside", model, case["case"])
        for site in "AB"
        for case in site_cases(sites_dir, site, "test")
        for model in ("global", "personalised")
    }
    outside = {
        ("E", "outside", model, case["case"])
        for case in site_cases(sites_dir, "E", "all")
        for model in ("global", "soup", "routed")
    }
    assert scored == inside | outside
    assert {row["metric"] for row in metrics} == {"dice", "hd95_mm", "asd_mm"}


def test_routes_of_an_outside_site(federated: FederatedRun, sites_dir: Path) -> None:
    """Each scan's routes over the global and the inside models are kept, and sum to 1 in every layer."""
    folder = federated.folder / "masks" / "E" / "routed"
    assert (folder / "routes.json").is_file()
    sums: dict[tuple[str, str], float] = {}
    for row in rows(folder / "routes.csv"):
        assert row["expert"] in ("global", "A", "B")
        key = (row["case"], row["layer"])
        sums[key] = sums.get(key, 0) + float(row["weight"])
    assert {case for case, _ in sums} == {case["case"] for case in site_cases(sites_dir, "E", "all")}
    assert list(sums.values()) == pytest.approx([1] * len(sums), abs=1e-5)


def test_masks_lie_on_their_scans(federated: FederatedRun) -> None:
    """Every mask of a run has the shape and the affine of its scan."""
    cases = rows(federated.folder / "cases.csv")
    assert len(cases) > 0
    for case in cases:
        mask, scan = load(federated.folder / case["mask"]), load(case["image"])
        assert mask.shape == scan.shape
        np.testing.assert_array_equal(mask.affine, scan.affine)


def test_rounds_read_no_test_case_and_nothing_outside(federated: FederatedRun, sites_dir: Path) -> None:
    """Training and its validation open their own cases only; test cases and the outside site wait for the scoring."""

    def files(*cases: dict[str, str]) -> set[str]:
        return {os.path.abspath(case[key]) for case in cases for key in ("image", "label")}

    outside = files(*site_cases(sites_dir, "E", "all"))
    for site in "AB":
        learned = files(*site_cases(sites_dir, site, "train"), *site_cases(sites_dir, site, "validation"))
        held_out = files(*site_cases(sites_dir, site, "test"))
        assert learned <= federated.read_in_rounds
        assert not held_out & federated.read_in_rounds
        assert held_out <= federated.read_after
    assert not outside & federated.read_in_rounds
    assert outside <= federated.read_after


def test_a_score_is_that_of_the_written_mask(
    sites_dir: Path, tmp_path: Path, run_config: Run, random_models: Callable[[Path], Path]
) -> None:
    """The Dice in the table is the foreground Dice of the two files; scoring again replaces rows, and adds none."""
    models = random_models(tmp_path / "models")
    for _ in range(2):
        run_config(
            "evaluate", dataset_dir=sites_dir, site="E", role="outside", model="routed", split="all",
            ckpt_dir=models, output_dir=tmp_path,
        )  # fmt: skip
    scores = {row["case"]: float(row["value"]) for row in rows(tmp_path / "metrics.csv") if row["metric"] == "dice"}
    cases = rows(tmp_path / "cases.csv")
    assert len(cases) == len(scores) == len(site_cases(sites_dir, "E", "all"))
    for case in cases:
        recomputed = dice(mask_of(tmp_path / case["mask"]), mask_of(Path(case["label"])))
        assert scores[case["case"]] == pytest.approx(recomputed, abs=1e-6)
    assert all(0 < score < 1 for score in scores.values())


def test_resumed_is_as_undisturbed(
    sites_dir: Path, tmp_path: Path, run_config: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the middle of the second of three rounds and resumed: the same models bit by bit."""
    run = {**FEDERATE, "dataset_dir": sites_dir, "rounds": 3}
    undisturbed, interrupted = tmp_path / "undisturbed", tmp_path / "interrupted"
    run_config("federate", output_dir=undisturbed, **run)

    train, calls = SiteClient.train, []

    def train_until_the_power_goes(self: SiteClient, *arguments: Any) -> dict[str, torch.Tensor]:
        calls.append(self.site)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SiteClient, "train", train_until_the_power_goes)
        with pytest.raises((KeyboardInterrupt, RuntimeError)):
            run_config("federate", output_dir=interrupted, **run)
    assert calls == ["A", "B", "A", "B"]
    assert not (interrupted / "report.html").exists()

    run_config("federate", output_dir=interrupted, resume=True, **run)
    for name in ("model.pt", "model_A.pt", "model_B.pt"):
        assert equal(weights(undisturbed / "models" / name), weights(interrupted / "models" / name)), name
    kept = [
        [row for row in rows(folder / "history.csv") if row["metric"] != "seconds"]
        for folder in (undisturbed, interrupted)
    ]
    assert kept[0] == kept[1]


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
    common = {"dataset_dir": sites_dir / "E", "ckpt_dir": models, "routing": {"average_views": False}}
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


def broken(sites_dir: Path, folder: Path, name: str, content: bytes | None) -> Path:
    """A copy of site A by links, with one file replaced, or left out."""
    (folder / "A").mkdir(parents=True)
    for path in (sites_dir / "A").iterdir():
        if path.name != name:
            (folder / "A" / path.name).symlink_to(path)
    if content is not None:
        (folder / "A" / name).write_bytes(content)
    return folder


def training_file(sites_dir: Path, key: str) -> Path:
    return Path(site_cases(sites_dir, "A", "train")[0][key])


@pytest.mark.parametrize("key", ["image", "label"])
@pytest.mark.parametrize("damage", ["empty", "cut short"])
def test_a_bad_file_is_named_in_one_line(
    key: str, damage: str, sites_dir: Path, tmp_path: Path, run_config: Run
) -> None:
    """A federation over a site with a broken scan or mask stops before its first round."""
    path = training_file(sites_dir, key)
    content = b"" if damage == "empty" else path.read_bytes()[: path.stat().st_size // 2]
    data = broken(sites_dir, tmp_path / "data", path.name, content)
    with pytest.raises(Exception) as caught:
        run_config("federate", dataset_dir=data, output_dir=tmp_path / "run", **{**FEDERATE, "sites": ["A"]})
    cause = root_input_error(caught.value)
    assert cause is not None
    assert str(data / "A" / path.name) in str(cause)
    assert "\n" not in str(cause)
    assert not (tmp_path / "run" / "federation.pt").exists()


@pytest.mark.parametrize(
    ("config", "overrides", "words"),
    [
        ("federate", {"sites": ["A", "Atlantis"]}, "Atlantis"),
        ("federate", {"sites": "A"}, "list"),
        ("federate", {"rounds": 0}, "rounds"),
        ("evaluate", {"site": "A"}, "model.pt"),
        ("evaluate", {"site": "A", "model": "personalised"}, "model_A.pt"),
        ("evaluate", {"site": "A", "split": "tset"}, "tset"),
        ("inference", {"preset": "fastest"}, "fastest"),
        ("inference", {"mode": "sometimes"}, "sometimes"),
        ("inference", {"dataset_dir": "nowhere"}, "nowhere"),
    ],
)
def test_a_wrong_word_is_named_in_one_line(
    config: str, overrides: dict[str, Any], words: str, sites_dir: Path, tmp_path: Path, run_config: Run
) -> None:
    """What a user may misspell or leave out on the command line ends in one line that repeats it."""
    given = {"dataset_dir": sites_dir / "E" if config == "inference" else sites_dir, "output_dir": tmp_path / "run"}
    with pytest.raises(Exception) as caught:
        run_config(config, **{**given, "ckpt_dir": tmp_path / "models", **overrides})
    cause = root_input_error(caught.value)
    assert cause is not None
    assert words in str(cause)
    assert "\n" not in str(cause)


def command_line(config: str, **overrides: Any) -> subprocess.CompletedProcess:
    options = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(BUNDLE / "configs" / f"{config}.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--bundle_root", str(BUNDLE), *options],
        capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip


def errors_of(process: subprocess.CompletedProcess) -> list[str]:
    """The lines that speak of errors, of both streams; the traceback of an unmended one would be among them."""
    lines = (process.stdout + process.stderr).replace("\r", "\n").splitlines()
    return [line for line in lines if "error" in line.lower() or "Traceback" in line or line.startswith("  File")]


def test_command_line_ends_an_unknown_site_in_one_line(sites_dir: Path, tmp_path: Path) -> None:
    process = command_line("federate", dataset_dir=sites_dir, sites="['A','Atlantis']", output_dir=tmp_path)
    assert process.returncode == 1
    (line,) = errors_of(process)
    assert line.startswith("error: ")
    assert "Atlantis" in line


def test_command_line_ends_a_bad_scan_in_one_line(
    sites_dir: Path, tmp_path: Path, random_models: Callable[[Path], Path]
) -> None:
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes(training_file(sites_dir, "image").read_bytes()[:500])
    process = command_line(
        "inference", dataset_dir=scan, ckpt_dir=random_models(tmp_path / "models"), image_size=32, features=4,
        output_dir=tmp_path / "masks",
    )  # fmt: skip
    assert process.returncode == 1
    (line,) = errors_of(process)
    assert line.startswith("error: ")
    assert str(scan) in line
    assert "INFO - Engine run" not in process.stdout
    assert not list((tmp_path / "masks").glob("*.nii.gz"))


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


def test_summary_agrees_with_the_cases(federated: FederatedRun) -> None:
    """``summary.csv`` holds the mean and the number of each site's, model's and metric's rows of ``metrics.csv``."""
    cases: dict[tuple[str, ...], list[float]] = {}
    for row in rows(federated.folder / "metrics.csv"):
        key = (row["site"], row["role"], row["model"], row["metric"])
        cases.setdefault(key, []).append(float(row["value"]))
    summary = rows(federated.folder / "summary.csv")
    assert {(row["site"], row["role"], row["model"], row["metric"]) for row in summary} == set(cases)
    for row in summary:
        values = [x for x in cases[row["site"], row["role"], row["model"], row["metric"]] if x == x]
        assert int(row["cases"]) == len(values)
        if values:
            assert float(row["mean"]) == pytest.approx(sum(values) / len(values), abs=1e-5)


def test_resuming_with_other_settings_is_refused(sites_dir: Path, tmp_path: Path, run_config: Run) -> None:
    """A run begun with one alpha does not go on with another in silence."""
    run = {**FEDERATE, "dataset_dir": sites_dir, "output_dir": tmp_path, "rounds": 1}
    run_config("federate", **run)
    with pytest.raises((RuntimeError, ValueError)) as raised:
        run_config("federate", **{**run, "alpha": 0.9, "resume": True})
    assert "alpha" in str(root_input_error(raised.value))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_whole_chain_on_cuda(sites_dir: Path, tmp_path: Path, run_config: Run) -> None:
    """Federate, personalise, score and route on CUDA with mixed precision: the same files, with finite Dice."""
    run_config(
        "federate", dataset_dir=sites_dir, output_dir=tmp_path, outside_sites=["E"], **{**FEDERATE, "device": "cuda"}
    )
    scores = [row for row in rows(tmp_path / "metrics.csv") if row["metric"] == "dice"]
    assert {row["model"] for row in scores} == {"global", "personalised", "soup", "routed"}
    assert all(0 <= float(row["value"]) <= 1 for row in scores)
    assert (tmp_path / "report.html").is_file()
