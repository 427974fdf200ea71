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
"""The table of a run shows the contents of ``metrics.csv``, and intervals reflect the numbers of cases."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from runs import DASH, INSIDE, METRICS, make_run, write_csv

from shared_iopfl.evaluation.scores import difference, print_table
from shared_iopfl.report import run as report
from shared_iopfl.utils.errors import InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def test_report_re_exports_the_table():
    """The bundles' configs call the function there."""
    assert report.print_table is print_table


def test_table_begins_with_inside_sites_and_the_models_of_the_method(run, capsys):
    lines = print_table(run).splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    assert lines[0].split() == ["dice", "(%)", "role", "global", "personalised", "soup", "routed", "n"]
    table = {re.split(r"  +", line)[0]: line.split() for line in lines[1:]}
    assert [re.split(r"  +", line)[1] for line in lines[1:]] == ["inside"] * 3 + ["outside"] * 2
    assert {"Site <A>", "B$1$", "Out", "mean of sites"} == set(table)
    assert table["Site <A>"][-5:] == ["71.0", "76.0", DASH, DASH, "3"]
    # each site counts alike: (71.0 + 74.5) / 2, not the mean over the nine cases
    assert lines[3].split()[-5:] == ["72.8", "77.8", DASH, DASH, "9"]
    assert lines[5].split()[-5:] == ["76.0", DASH, "77.0", "79.0", "5"]


def test_table_of_a_distance_is_not_in_percent(run):
    assert "hd95 (mm)" in (text := print_table(run, metric="hd95_mm"))
    assert re.search(r"Out +outside +\S+ +\S +5\.00", text)


def test_table_without_scores_or_with_an_unknown_metric_says_what_to_do(run, tmp_path):
    with pytest.raises(InputError, match=r"metrics\.csv.*evaluate"):
        print_table(tmp_path)
    with pytest.raises(InputError, match=r"'volume'.*dice, hd95_mm|'volume'.*hd95_mm, dice"):
        print_table(run, metric="volume")


def test_mean_of_sites_leaves_out_a_model_that_not_every_site_has(tmp_path):
    rows = [["A", "inside", "1", m, "dice", 0.8] for m in INSIDE] + [["B", "inside", "1", "global", "dice", 0.6]]
    write_csv(tmp_path / "metrics.csv", METRICS, rows)
    assert print_table(tmp_path).splitlines()[-1].split()[-3:] == ["70.0", DASH, "2"]


def test_a_case_scored_again_counts_once_with_its_last_value(tmp_path):
    write_csv(tmp_path / "metrics.csv", METRICS, [["A", "inside", "1", "global", "dice", v] for v in (0.1, 0.9)])
    assert print_table(tmp_path).splitlines()[1].split()[-2:] == ["90.0", "1"]


def test_interval_is_seeded_and_holds_the_mean():
    values = np.random.RandomState(1).normal(0.02, 0.05, 30)
    site = {
        "global": dict.fromkeys(map(str, range(30)), 0.5),
        "routed": {str(i): 0.5 + v for i, v in enumerate(values)},
    }
    mean, low, high, n = difference([site], "routed", "global")
    assert n == 30
    assert mean == pytest.approx(values.mean())
    # as wide as the normal approximation says, within what the resamples give
    assert (low, high) == pytest.approx(values.mean() + np.array([-1, 1]) * 1.96 * values.std() / 30**0.5, abs=0.002)
    assert difference([site], "routed", "global") == (mean, low, high, n)
