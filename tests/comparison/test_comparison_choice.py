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
"""A Dice that is undefined says nothing for or against a candidate: one rule, from a case's score to the choice."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from shared_iopfl.comparison.protocol import Comparison
from shared_iopfl.comparison.runs import COLUMNS, Runs, best_of
from shared_iopfl.evaluation.records import case_scores
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import write_rows


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_dice_is_undefined_where_the_reference_is_empty_whatever_was_found(found):
    """One target without a reference leaves the case without a mean, the other targets with their own."""
    reference = torch.zeros(2, 4, 4)
    reference[0, :2] = 1
    scores = case_scores(torch.full((2, 4, 4), found), reference, ["disc", "cup"])
    assert math.isnan(scores["dice_cup"]) and math.isnan(scores["dice"])
    assert math.isfinite(scores["dice_disc"])


def test_nothing_found_of_what_is_there_is_a_dice_of_zero():
    assert case_scores(torch.zeros(1, 4, 4), torch.ones(1, 4, 4), ["prostate"])["dice"] == 0


def test_an_undefined_site_chooses_for_nobody():
    """Else the first candidate won, as no number is above NaN."""
    nan = math.nan
    assert best_of({"first": [0.5, nan], "second": [0.7, nan]}) == ("second", {"first": 0.5, "second": 0.7})
    assert best_of({"first": [0.5, 0.9], "second": [0.7, nan]})[0] == "second"
    with pytest.raises(InputError, match="nothing to choose by"):
        best_of({"first": [nan], "second": [nan]})


def test_the_other_sites_choose_a_training_by_the_cases_that_have_a_dice(tmp_path: Path):
    rows = [
        {"seed": 0, "fold": site, "site": site, "role": "outside", "method": method, "case": case, "metric": "dice"}
        | {"value": math.nan if case == "empty" else value}
        for method, value in {"global": 0.5, "other": 0.6}.items()
        for site in "ABC"
        for case in ("c", "empty")
    ]
    write_rows(tmp_path / "comparison.csv", COLUMNS, rows)
    Runs("bundle", "data", tmp_path, {}).choose_trainings("ABC", ["global", "other"])
    choices = json.loads((tmp_path / "federations.json").read_text(encoding="utf-8"))
    assert [choice["choice"] for choice in choices] == ["other"] * 3


@pytest.mark.parametrize("name", ["global", "pooled", "views"])
def test_a_training_by_the_name_of_another_method_is_refused(name, tmp_path):
    """Its scores would be taken for those of the other one."""
    with pytest.raises(InputError, match=f"federations: '{name}' is another method's name"):
        Comparison("b", "d", str(tmp_path), ["A", "B"], 1, outside={"views": {}}, federations={name: {}})
