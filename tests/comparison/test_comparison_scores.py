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
"""Means count sites alike, differences are paired by case, and their intervals are as wide as cases are uncertain."""

from __future__ import annotations

import math

import numpy as np
import pytest
from comparisons import COLUMNS, dice, score_rows, write_scores
from runs import write_csv

from shared_iopfl.comparison.scores import BEST_EXPERT, MEAN_EXPERT, RoleScores, Site, read_comparison
from shared_iopfl.evaluation import intervals
from shared_iopfl.evaluation.intervals import case_interval, site_interval
from shared_iopfl.utils.errors import InputError

RNG = np.random.RandomState(0)


def made(**methods: np.ndarray) -> RoleScores:
    """One site, from arrays ``(seed, case)``."""
    values = np.stack([np.atleast_2d(v) for v in methods.values()])
    seeds, cases = ([str(i) for i in range(n)] for n in values.shape[1:])
    return RoleScores(list(methods), seeds, {"S": Site(cases, values)}, 1)


def test_a_gain_that_is_the_same_everywhere_has_an_interval_of_no_width():
    found = made(one=dice(0) + 0.02, two=dice(0)).difference("one", "two")
    assert (found.mean, found.low, found.high, found.cases) == (0.02, 0.02, 0.02, 6)
    assert found.verdict == "better"
    assert made(one=dice(0) - 0.02, two=dice(0)).difference("one", "two").verdict == "worse"


def test_a_wide_interval_around_zero_is_no_tie():
    found = made(one=np.array([[0.5, 0.7] * 5]), two=np.full((1, 10), 0.6)).difference("one", "two")
    assert found.low < -0.005 < 0.005 < found.high
    assert found.verdict == "unclear"


def test_the_seeds_of_a_case_stay_together():
    """What a case gains with one seed and loses with the other is no uncertainty about cases, nor does a second
    seed that says the same make anything surer."""
    gains = RNG.normal(0, 0.05, 20)
    opposed = made(one=0.5 + np.stack([gains, -gains]), two=np.full((2, 20), 0.5)).difference("one", "two")
    assert (opposed.mean, opposed.low, opposed.high) == (0, 0, 0)
    single = made(one=0.5 + gains[None], two=np.full((1, 20), 0.5)).difference("one", "two")
    double = made(one=0.5 + np.stack([gains, gains]), two=np.full((2, 20), 0.5)).difference("one", "two")
    assert double == single
    assert single.high - single.low > 0.02


def test_the_interval_holds_the_truth_as_often_as_it_says(monkeypatch):
    """Sites of different size and spread, 80 times over: about 95 in 100."""
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    rng, truth, held = np.random.RandomState(1), 0.01, 0
    for _ in range(80):
        sites = {}
        for name, n, spread in (("A", 30, 0.02), ("B", 60, 0.08)):
            common = rng.rand(1, n)
            sites[name] = Site([str(i) for i in range(n)], np.stack([common + rng.normal(truth, spread, n), common]))
        found = RoleScores(["one", "two"], ["0"], sites, 1).difference("one", "two")
        held += found.low <= truth <= found.high
    assert 0.88 * 80 <= held <= 79


def null(sites: int, cases: int, draws: int, seed: int = 0, unequal: bool = False) -> RoleScores:
    """So many methods that are as good as "none": each case differs by noise of a heavy tail, at each site its own."""
    rng = np.random.default_rng(seed)
    spreads = np.geomspace(1, 4, sites) if unequal else np.ones(sites)
    names = ["none", *map(str, range(draws))]
    found = {}
    for number, spread in enumerate(spreads):
        values = 0.5 + 0.02 * spread * rng.laplace(size=(draws + 1, 1, cases))
        values[0] = 0.5
        found[str(number)] = Site([str(case) for case in range(cases)], values)
    return RoleScores(names, ["0"], found, 1)


def verdicts(scores: RoleScores, draws: int) -> float:
    found = [scores.difference(str(draw), "none").verdict for draw in range(draws)]
    return sum(verdict in ("better", "worse") for verdict in found) / draws


@pytest.mark.parametrize("sites, cases", [(3, 2), (4, 3)])
def test_a_comparison_of_equals_seldom_has_a_verdict(monkeypatch, sites, cases):
    """Plain percentiles give one in 28 % of the comparisons with two cases at each of three sites."""
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    assert verdicts(null(sites, cases, 400), 400) <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("sites, cases", [(3, 2), (6, 2), (4, 3), (3, 5), (2, 8), (1, 6), (6, 10)])
def test_at_every_size_at_most_seven_in_a_hundred_comparisons_of_equals_have_a_verdict(
    sites, cases, unequal, monkeypatch
):
    monkeypatch.setattr(intervals, "RESAMPLES", 2000)
    found = [verdicts(null(sites, cases, 200, seed, unequal), 200) for seed in range(10)]  # 2,000 draws
    assert np.mean(found) <= 0.07


@pytest.mark.parametrize("sites, cases", [(5, 1), (2, 2)])
def test_one_case_at_a_site_or_too_few_in_all_have_no_verdict(sites, cases):
    scores = null(sites, cases, 20)
    assert {scores.difference(str(draw), "none").verdict for draw in range(20)} == {"too few cases"}


def test_a_site_of_one_case_among_others_has_no_verdict():
    """Its spread is not known: an interval without it would be that of the others."""
    values = {"A": RNG.rand(2, 1, 8), "B": RNG.rand(2, 1, 1)}
    sites = {name: Site([str(i) for i in range(v.shape[2])], v) for name, v in values.items()}
    assert RoleScores(["one", "two"], ["0"], sites, 1).difference("one", "two").verdict == "too few cases"


def test_the_interval_for_new_sites_covers_them_and_that_for_cases_does_not(monkeypatch):
    """Sites that differ by a point: 400 comparisons of five sites with a true mean of 0 over all sites there are."""
    monkeypatch.setattr(intervals, "RESAMPLES", 500)
    rng, held, narrow = np.random.default_rng(0), 0, 0
    for _ in range(400):
        gains = rng.normal(0, 0.01, (5, 1)) + rng.normal(0, 0.01, (5, 20))
        drawn = np.stack([g[rng.integers(20, size=(500, 20))].mean(1) for g in gains], axis=1)
        low, high = case_interval(list(gains), drawn)
        narrow += low <= 0 <= high
        low, high = site_interval(gains.mean(1))
        held += low <= 0 <= high
    assert 0.91 <= held / 400 <= 0.98
    assert narrow / 400 < 0.8


def test_new_sites_are_judged_from_three_on():
    three, two = (null(sites, 5, 1).difference("0", "none") for sites in (3, 2))
    assert three.new_low < three.mean < three.new_high
    assert math.isnan(two.new_low) and math.isnan(two.new_high)
    alone = null(3, 5, 1).difference("0", "none", "1")
    assert math.isfinite(alone.low) and math.isnan(alone.new_low)


def test_cases_are_drawn_within_their_site():
    """Sites that differ from each other add nothing where the cases of each agree."""
    values = {"A": np.full((1, 4), 0.7), "B": np.full((1, 30), 0.5)}
    sites = {
        s: Site([str(i) for i in range(v.shape[1])], np.stack([v, np.full_like(v, 0.5)])) for s, v in values.items()
    }
    found = RoleScores(["one", "two"], ["0"], sites, 1).difference("one", "two")
    assert (found.mean, found.low, found.high) == (0.1, 0.1, 0.1)  # and each site counts alike


def test_no_interval_with_fewer_than_five_cases():
    found = made(one=dice(0, cases=4) + 0.02, two=dice(0, cases=4)).difference("one", "two")
    assert found.mean == 0.02 and math.isnan(found.low) and math.isnan(found.high)
    assert found.verdict == "too few cases"


def test_spread_is_that_of_the_mean_of_sites_over_seeds():
    values = np.array([[0.5, 0.7], [0.6, 0.8], [0.7, 0.9]])
    assert made(one=values).spread("one") == pytest.approx(0.1)
    assert math.isnan(made(one=values[:1]).spread("one"))


def test_a_case_is_won_by_more_than_half_a_point_on_the_mean_of_its_seeds():
    gains = np.array([[0.02, 0.005, -0.006, 0.03], [0.02, 0.005, -0.006, -0.03]])
    scores = made(one=0.5 + gains, two=np.full((2, 4), 0.5))
    assert scores.wins_and_losses("one", "two") == (1, 1)
    assert scores.largest_loss("one", "two") == (-0.03, "S", "3")  # of one seed: nobody is given the mean of two masks


def test_worst_twentieth_is_a_share_of_the_cases_and_at_least_one():
    many = np.arange(40)[None] / 100
    assert made(one=np.concatenate([many, many + 0.1])).worst_twentieth("one") == pytest.approx(0.055)
    assert made(one=np.array([[0.5, 0.3, 0.9]])).worst_twentieth("one") == 0.3


def test_the_order_of_the_rows_does_not_matter(tmp_path):
    sites = {"A": {"FedAvg": dice(0), "Ditto": RNG.rand(2, 6)}, "B": {"FedAvg": dice(1), "Ditto": RNG.rand(2, 6)}}
    rows = score_rows("inside", sites)
    one, two = (
        read_comparison(write_scores(tmp_path / str(i), r))["inside"]["dice"] for i, r in enumerate((rows, rows[::-1]))
    )
    assert (one.methods, one.seeds, list(one.sites), one.folds) == (two.methods, two.seeds, list(two.sites), 2)
    assert one.difference("Ditto", "FedAvg") == two.difference("Ditto", "FedAvg")
    rng = np.random.RandomState(3)
    mixed = read_comparison(write_scores(tmp_path / "mixed", [rows[i] for i in rng.permutation(len(rows))]))
    assert mixed["inside"]["dice"].difference("Ditto", "FedAvg") == one.difference("Ditto", "FedAvg")
    np.testing.assert_array_equal(mixed["inside"]["dice"].site_means, one.site_means)


def test_another_method_does_not_change_the_intervals_of_the_others(tmp_path):
    values = {"FedAvg": dice(0), "Ditto": RNG.rand(2, 6)}
    few = read_comparison(write_scores(tmp_path / "few", score_rows("inside", {"A": values})))
    more = read_comparison(write_scores(tmp_path / "more", score_rows("inside", {"A": {"FedProx": dice(1), **values}})))
    assert few["inside"]["dice"].difference("Ditto", "FedAvg") == more["inside"]["dice"].difference("Ditto", "FedAvg")


def test_seeds_that_test_different_cases_are_paired_all_the_same(tmp_path):
    """The published split is drawn anew with each seed."""
    values = np.array([[0.5, 0.6, np.nan], [np.nan, 0.8, 0.7]])
    folder = write_scores(tmp_path, score_rows("inside", {"A": {"FedAvg": values, "Ditto": values + 0.1}}))
    scores = read_comparison(folder)["inside"]["dice"]
    assert scores.mean("FedAvg") == pytest.approx((0.5 + 0.7 + 0.7) / 3)
    assert scores.difference("Ditto", "FedAvg").mean == 0.1
    assert scores.seed_means[scores.at("FedAvg")] == pytest.approx([0.55, 0.75])


def test_experts_become_their_mean_and_the_best_of_each_site(tmp_path):
    sites = {
        "A": {"global": dice(0), "expert B": dice(0) + 0.01, "expert C": dice(0) + 0.05},
        "B": {"global": dice(1), "expert A": dice(1) - 0.01, "expert C": dice(1) - 0.03},
    }
    distances = {site: {m: 1 - v for m, v in of.items()} for site, of in sites.items()}
    distances["A"]["expert C"] = (
        distances["A"]["expert C"] + 3
    )  # the best by Dice is the best expert, whatever else it is
    found = read_comparison(
        write_scores(tmp_path, score_rows("outside", sites) + score_rows("outside", distances, "hd95_mm"))
    )
    scores = found["outside"]["dice"]
    assert scores.methods == ["global", MEAN_EXPERT, BEST_EXPERT]
    assert scores.best_experts == found["outside"]["hd95_mm"].best_experts == {"A": "C", "B": "A"}
    np.testing.assert_allclose(scores.site_means[1] - scores.site_means[0], [0.03, -0.02])
    np.testing.assert_allclose(scores.site_means[2] - scores.site_means[0], [0.05, -0.01])


def test_what_is_undefined_for_one_method_is_left_out_for_all_and_counted(tmp_path):
    rows = score_rows(
        "inside", {"A": {"FedAvg": np.array([[3.0, 4.0, 9.0]]), "Ditto": np.array([[2.0, 3.0, 1.0]])}}, "hd95_mm"
    )
    rows = [[*row[:-1], "nan" if row[-1] == 1.0 else row[-1]] for row in rows]
    rows += score_rows("inside", {"A": {"FedAvg": dice(0, 3, 1), "Ditto": dice(0, 3, 1)}})
    distances = read_comparison(write_scores(tmp_path, rows))["inside"]["hd95_mm"]
    assert (distances.mean("FedAvg"), distances.mean("Ditto"), distances.undefined) == (3.5, 2.5, {"Ditto": 1})


def test_a_case_that_a_method_lacks_is_an_error_that_names_method_site_and_case(tmp_path):
    rows = score_rows("inside", {"A": {"FedAvg": dice(0), "Ditto": dice(0)}})
    rows = [row for row in rows if (row[0], row[4], row[5]) != (1, "Ditto", "c3")]
    with pytest.raises(InputError, match=r"'Ditto' has no score of case 'c3' of site 'A' \(seed 1\)") as caught:
        read_comparison(write_scores(tmp_path, rows))
    assert "\n" not in str(caught.value)


def test_a_method_that_lacks_a_whole_site_is_an_error_too(tmp_path):
    rows = score_rows("inside", {"A": {"FedAvg": dice(0), "Ditto": dice(0)}, "B": {"FedAvg": dice(1)}})
    with pytest.raises(InputError, match=r"'Ditto' has no score of case 'c0' of site 'B'"):
        read_comparison(write_scores(tmp_path, rows))


@pytest.mark.parametrize(
    "header, rows, message",
    [
        (COLUMNS, [], "holds no scores: run"),
        (COLUMNS.replace("fold", "part"), [[0, 0, "A", "inside", "FedAvg", "c", "dice", 1]], "lacks the column 'fold'"),
        (COLUMNS, [[0, 0, "A", "beside", "FedAvg", "c", "dice", 1]], "'beside' is none of"),
        (COLUMNS, [[0, 0, "A", "inside", "FedAvg", "c", "dice", 87.2]], "dice 87.2 is not between 0 and 1"),
        (COLUMNS, [[0, 0, "A", "inside", "FedAvg", "c", "dice", "good"]], "'good' is not a number"),
        (COLUMNS, [[0, f, "A", "inside", "FedAvg", "c", "dice", 1] for f in (0, 1)], "case 'c'.*stands there twice"),
        (COLUMNS, [[0, 0, "A", "inside", "FedAvg", "c", "hd95_mm", 1]], "no Dice inside"),
    ],
)
def test_wrong_content_is_an_error_of_one_line_that_names_the_file(tmp_path, header, rows, message):
    write_csv(tmp_path / "comparison.csv", header, rows)
    with pytest.raises(InputError, match=message) as caught:
        read_comparison(tmp_path)
    assert str(tmp_path / "comparison.csv") in str(caught.value)
    assert "\n" not in str(caught.value)
