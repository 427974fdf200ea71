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
"""The prostate bundle's federation, from scans to the report: what it leaves, what it reads, and resuming it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prostate_runs import FEDERATE, Run, equal, load, rows, weights

from shared_iopfl.data.splits import site_cases
from shared_iopfl.federation.simulation import Federation, SiteClient


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


def test_without_test_cases_a_run_ends_well_and_reports_validation(
    sites_dir: Path, tmp_path: Path, run_config: Run, capsys: pytest.CaptureFixture
) -> None:
    """A test fraction of 0, as for models to publish: one line says that there is nothing to score."""
    run = {**FEDERATE, "rounds": 1, "own_rounds": 0, "fractions": [0.7, 0.3, 0.0]}
    run_config("federate", dataset_dir=sites_dir, output_dir=tmp_path, **run)
    said = [line for line in capsys.readouterr().out.splitlines() if "test cases" in line]
    assert said == ["no test cases to score at A, B: the test fraction is 0"]
    assert {path.name for path in (tmp_path / "models").glob("*.pt")} == {"model.pt", "model_A.pt", "model_B.pt"}
    assert not (tmp_path / "metrics.csv").exists()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Learning curves" in page and "Dice by site and model" not in page


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
