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
"""A run whose personalised models are worse than its global model reports this with its scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import METRICS, write_csv

from shared_iopfl.evaluation.personalised_verdict import personalised_verdict, print_personalised_verdict
from shared_iopfl.report.run import write_report


def run(
    folder: Path, validation: tuple[float, float], test: tuple[float, float] | None = None, **shares: float
) -> Path:
    """Write a run of two sites, with the scores of the global and the personalised models."""
    rows = [
        [r, site, model, "val_mean_dice", value if r == 3 else 0.1]
        for r in (1, 3)
        for site in "AB"
        for model, value in zip(("global", "personalised"), validation)
    ]
    write_csv(folder / "history.csv", "round,site,model,metric,value", rows)
    if test:
        rows = [
            [site, "inside", f"{site}{case}", model, "dice", value]
            for site, cases in (("A", 1), ("B", 3))
            for case in range(cases)
            for model, value in zip(("global", "personalised"), test)
        ]
        write_csv(folder / "metrics.csv", METRICS, rows)
    if shares:
        (folder / "models").mkdir(parents=True)
        (folder / "models" / "shares.json").write_text(json.dumps(shares))
    (folder / "run.json").write_text(json.dumps({"settings": {"rounds": 3, "own_rounds": 8}}))
    return folder


@pytest.mark.parametrize(
    ("validation", "test", "shares", "said"),
    [
        ((0.689, 0.644), None, {}, "Dice 64.4 against 68.9 of the global model (validation cases of the last round"),
        ((0.6, 0.7), (0.689, 0.644), {"A": 0.5, "B": 0.0}, "Dice 64.4 against 68.9 of the global model (test cases"),
        ((0.6, 0.7), (0.6, 0.6), {"A": 0.0, "B": 0.0}, "validation cases of all sites prefer the global model"),
    ],
)
def test_worse_personalised_models_are_reported_with_their_scores(tmp_path, capsys, validation, test, shares, said):
    line = print_personalised_verdict(run(tmp_path, validation, test, **shares))
    assert said in line
    assert "not worth using after 3 rounds and 8 more at each site alone" in line
    assert capsys.readouterr().out == line + "\n"
    assert said in write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("validation", "test", "shares"),
    [
        ((0.6, 0.7), None, {}),
        ((0.6, 0.5), (0.6, 0.7), {}),
        ((0.6, 0.5), (0.6, 0.7), {"A": 1.0, "B": 0.0}),
        # what was trained after the last round, and chosen by validation cases, is not judged by an earlier figure
        ((0.6, 0.5), None, {"A": 1.0, "B": 1.0}),
    ],
)
def test_better_personalised_models_are_not_reported(tmp_path, validation, test, shares):
    assert personalised_verdict(run(tmp_path, validation, test, **shares)) == ""
    assert "not worth using" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_folder_without_scores_is_not_reported(tmp_path):
    assert personalised_verdict(tmp_path) == ""
