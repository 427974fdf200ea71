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
"""The report of a comparison says what its figures say, in words that change with them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from comparisons import dice, make_comparison, score_rows, write_scores

from shared_iopfl.comparison.cases import _remarkable
from shared_iopfl.comparison.report import print_comparison, write_comparison
from shared_iopfl.comparison.scores import RoleScores, Site
from shared_iopfl.comparison.tables import Contest
from shared_iopfl.evaluation.scores import DASH, MINUS
from shared_iopfl.report import charts, pictures
from shared_iopfl.utils.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_comparison(tmp_path_factory.mktemp("comparison"))
    write_comparison(folder, title="Trial & <error>")
    return folder


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no picture to its end."""
    monkeypatch.setattr(pictures, "png", lambda figure: b"")


def inside(folder: Path, **methods: np.ndarray) -> str:
    """The Markdown of one site inside, whose methods are FedAvg and these."""
    rows = score_rows("inside", {"A": {"FedAvg": dice(0), **methods}})
    write_comparison(write_scores(folder, rows), bounds=["labelled"])
    return (folder / "comparison.md").read_text(encoding="utf-8")


def rows_of(text: str, heading: str) -> dict[str, list[str]]:
    """The rows of the first table below a heading of the Markdown."""
    table = re.search(r"\n((?:\|.*\n)+)", text.split(f"# {heading}\n", 1)[1])
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[1].splitlines()]
    return {line[0]: line[1:] for line in lines}


def test_a_gain_of_two_points_everywhere_reads_so(quick, tmp_path):
    text = inside(tmp_path, personalised=dice(0) + 0.02)
    assert rows_of(text, "Against FedAvg")["**personalised**"][:4] == ["+2.0 [+2.0, +2.0]", "better", "6 : 0", "none"]
    assert rows_of(text, "personalised against every other method")["FedAvg"][0] == "+2.0 [+2.0, +2.0]"
    assert "personalised is 2.00 points above FedAvg (69.60 against 67.60, 95% interval 2.00 to 2.00)" in text
    assert "at least 1.0 with the interval above 0: met." in text
    assert "inside: 1 site, 6 cases, 2 seeds, 2 folds, 2 methods · 10,000 resamples" in text


def test_identical_methods_tie(quick, tmp_path):
    text = inside(tmp_path, personalised=dice(0))
    assert rows_of(text, "Against FedAvg")["**personalised**"][:4] == ["+0.0 [+0.0, +0.0]", "tie", "0 : 0", "none"]
    assert "personalised is level with FedAvg" in text
    assert "interval above 0: missed." in text


@pytest.mark.parametrize(
    "gain, outcome",
    [
        (np.full(6, 0.01), "met"),
        (np.full(6, 0.0096), "missed"),
        (np.array([0.1, -0.06, 0.1, -0.06, 0.1, -0.06]), "missed"),  # 2 points, but the interval reaches below 0
    ],
)
def test_the_target_is_met_by_a_point_with_the_interval_above_zero(quick, tmp_path, gain, outcome):
    assert f"interval above 0: {outcome}." in inside(tmp_path, personalised=dice(0) + gain)


@pytest.mark.parametrize("loss, harmed", [(0.003, False), (0.004, True)])
def test_each_site_that_loses_more_than_it_may_has_its_line(quick, tmp_path, loss, harmed):
    sites = {
        "A": {"FedAvg": dice(0), "personalised": dice(0) + 0.1},
        "B": {"FedAvg": dice(1), "personalised": dice(1) - loss},
    }
    write_comparison(write_scores(tmp_path, score_rows("inside", sites)))
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert (
        f"**Harm at B (inside)**: personalised is {MINUS}0.4 [{MINUS}0.4, {MINUS}0.4] points from FedAvg." in text
    ) == harmed
    assert ("**No harm inside**: no site is more than 0.3 points below FedAvg." in text) != harmed
    assert "Harm at A" not in text


def test_a_bound_is_in_italics_and_never_wins(quick, tmp_path):
    text = inside(tmp_path, personalised=dice(0) + 0.02, Ditto=dice(0) + 0.01, labelled=dice(0) + 0.1)
    table = rows_of(text, "Dice by site")
    assert table["*labelled*"] == ["*77.6*", "*77.6*", "*± 0.1*"]
    assert table["**personalised**"][:2] == ["**69.6**", "**69.6**"]
    assert list(table)[2:] == ["**personalised**", "Ditto", "FedAvg", "*labelled*"]  # though it is the highest
    assert rows_of(text, "Against FedAvg")["**personalised**"][-1] == "**62.1**"
    assert not re.search(r"\*\*labelled|\*\*77", text)
    assert f"**Best other method inside**: Ditto; personalised {MINUS} Ditto is +1.0 [+1.0, +1.0]: better." in text
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<em>labelled</em>" in page and "<b>labelled" not in page and "<b>77.6" not in page
    assert "Best other" not in inside(tmp_path, personalised=dice(0) + 0.02, labelled=dice(0) + 0.1)


def test_single_experts_are_not_shown_and_the_best_one_is_a_bound(folder):
    text = (folder / "comparison.md").read_text(encoding="utf-8")
    assert "expert X" not in text and "expert Y" not in text
    table = rows_of(text.split("## Outside")[1], "Dice by site")
    assert table["*best expert (hindsight)*"][:3] == ["*69.7*", "*67.7*", "*68.7*"]
    assert table["mean expert"][:3] == ["69.1", "67.1", "68.1"]
    assert "Best expert in hindsight: X (at B_$1$, Site <A>)" in text.replace("\\", "")


def test_other_measures_have_their_means_and_the_best_of_a_distance_is_the_smallest(folder):
    tables = (folder / "comparison.md").read_text(encoding="utf-8").split("### Other measures")[1].split("\n\n")
    cup, distance = (dict(rows_of(f"# x\n\n{table}\n", "x")) for table in tables[1:3])
    assert cup["FedAvg"][2] == "68.6" and cup["**personalised**"][2] == "**70.1**"
    assert distance["FedAvg"][2] == "4.31" and distance["**personalised**"][2] == "**4.30**"


def test_a_measure_of_the_references_alone_is_no_table(quick, tmp_path):
    """It is the same for every method."""
    values = {"FedAvg": dice(0), "Ditto": dice(0) + 0.01}
    rows = score_rows("inside", {"A": values}) + score_rows("inside", {"A": values}, "vcdr")
    rows += score_rows("inside", {"A": dict.fromkeys(values, dice(0))}, "vcdr_reference")
    write_comparison(write_scores(tmp_path, rows))
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (vcdr.*?) \|", text, re.M) == ["vcdr"]


def test_choices_are_shown_with_what_they_were_chosen_from(folder):
    text = (folder / "comparison.md").read_text(encoding="utf-8").replace("\\", "")
    table = rows_of(text, "Settings chosen without the site left out")
    assert table["Site <A>"] == ["0", "wide", "**80.0**", DASH]
    assert table["B_$1$"] == ["0", "wide", "80.0", "**81.0**"]


@pytest.mark.parametrize("content", ["[1]", "{", '[{"seed": 0}]'])
def test_choices_that_are_none_are_an_error_of_one_line(quick, tmp_path, content):
    (tmp_path / "choices.json").write_text(content)
    with pytest.raises(InputError, match=r"choices\.json is not a list of choices") as caught:
        inside(tmp_path, personalised=dice(0))
    assert "\n" not in str(caught.value)


def test_the_report_stands_alone_with_every_section_and_no_path(html, folder):
    assert re.findall(r"<h2>(.*?)</h2>", html) == [
        "In short",
        "Inside",
        "Outside",
        "Settings chosen without the site left out",
        "How to read this",
        "What was run",
    ]
    assert re.findall(r"<h3>(.*?)</h3>", html.split("<h2>Outside</h2>")[1]) == [
        "Dice by site",
        "Against global",
        "default against every other method",
        "default site by site",
        "Other measures",
        "Cases outside",
    ]
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 2 * 2 + 1 + 2 * 2  # differences of all sites and by site, gain by shift, cases of each site
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert not re.search(r"<script|<link|@import|url\(|https?:|<A>|<error>", html)
    for private in (str(folder), "private", "hospital", "doe", "_label"):
        assert private not in re.sub(r"base64,[^\"]*", "", html)


def test_what_is_not_there_is_left_out(quick, tmp_path):
    text = inside(tmp_path, Ditto=dice(0) + 0.01)  # not even our own method
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Inside", "How to read this"]
    assert re.findall(r"^#+ (.*)", text, re.M) == [
        "Comparison",
        "Inside",
        "Dice by site",
        "Against FedAvg",
        "How to read this",
    ]
    assert "italics" not in text


def test_without_the_method_to_compare_with_it_says_what_there_is(tmp_path):
    write_scores(tmp_path, score_rows("inside", {"A": {"Ditto": dice(0), "FedBN": dice(0)}}))
    with pytest.raises(InputError, match=r"no method 'FedAvg' inside, .*; there are Ditto, FedBN"):
        write_comparison(tmp_path)


def test_sites_are_in_the_order_of_their_shift_with_what_they_gained(folder):
    text = (folder / "comparison.md").read_text(encoding="utf-8").replace("\\", "")
    table = rows_of(text, "default site by site")
    assert [(site, cells[0], cells[1].split()[0]) for site, cells in table.items()][2:] == [
        ("Site <A>", "0.125", "+0.5"),
        ("B_$1$", "0.225", "+2.5"),
    ]
    assert f"**Gain and shift outside**: {MINUS}0.1 points in the third of the cases with the smallest shift" in text
    assert "+3.1 in the third with the largest; rank correlation 0.97, n = 12." in text


def contest(own: list[float], reference: list[float]) -> Contest:
    site = Site([f"c{i}" for i in range(len(own))], np.array([[own], [reference]]))
    return Contest(
        "inside", {"dice": RoleScores(["own", "FedAvg"], ["0"], {"S": site}, 1)}, "FedAvg", "own", frozenset()
    )


def test_cases_shown_are_the_worst_and_those_that_gained_and_lost_most():
    there = {("0", "S", f"c{i}") for i in range(5)}

    def shown(duel: Contest, there: set[tuple[str, str, str]]) -> list[tuple[str, str]]:
        return [(what, case) for what, _, case, _ in _remarkable(duel, "S", duel.dice.sites["S"], there)]

    duel = contest([0.3, 0.9, 0.8, 0.7, 0.6], [0.2, 0.7, 0.9, 0.7, 0.6])
    assert shown(duel, there) == [("worst of own", "c0"), ("most gained", "c1"), ("most lost", "c2")]
    assert shown(duel, there - {("0", "S", "c1")})[1:] == [("most lost", "c2")]  # without its files nothing to show
    assert shown(contest([0.3, 0.9], [0.3, 0.8]), there) == [("worst of own", "c0"), ("most gained", "c1")]


def test_cases_whose_files_are_gone_are_named_and_the_rest_is_shown(quick, tmp_path, caplog):
    folder = make_comparison(tmp_path)
    for mask in (folder / "seed0").glob("outside_B*/masks/*/default/c*.png"):
        mask.unlink()
    for mask in (folder / "seed1").glob("outside_B*/masks/*/default/c*.png"):
        mask.unlink()
    html = write_comparison(folder).read_text(encoding="utf-8")
    section = html.split("<h3>Cases outside</h3>")[1]
    assert "missing or do not match: c0, c5" in section
    assert "cannot be read" in caplog.text and str(folder) not in html
    assert section.count("<img") == 1  # of the other site


def test_differences_are_drawn_with_their_intervals_and_what_is_far_off_as_an_arrow():
    found = {
        "own": (1.0, 0.5, 1.5),
        "bound": (20.0, 10.0, 30.0),
        "far": (-30.0, -32.0, -28.0),
        "no": (0.5, np.nan, np.nan),
    }
    more = {f"m{i}": (0.0, -0.5, 0.5) for i in range(8)}
    figure = charts.forest_picture({"S": found | more}, "points", {"own": "#009E73"}, {"bound"})
    (panel,) = figure.axes
    assert panel.get_xlim()[0] > -6 and panel.get_xlim()[1] > 30
    texts = [text.get_text() for text in panel.texts]
    assert texts[:4] == ["+1.0 [+0.5, +1.5]", "+20.0 [+10.0, +30.0]", f"{MINUS}30.0 [{MINUS}32.0, {MINUS}28.0]", "+0.5"]
    assert [tick.get_fontstyle() for tick in panel.get_yticklabels()][:3] == ["normal", "italic", "normal"]


def test_gains_are_drawn_against_shifts_in_points(folder, quick, monkeypatch):
    drawn = {}
    monkeypatch.setattr(charts, "gains_picture", lambda sites, label: (drawn.update(sites), pictures.Figure())[1])
    write_comparison(folder, title="Trial & <error>")
    np.testing.assert_allclose(drawn["Site <A>"][0], (0.1, -1))
    np.testing.assert_allclose(drawn["B_$1$"][5], (0.25, 4))


def test_the_short_table_marks_our_own_and_puts_bounds_in_brackets(folder, capsys):
    text = print_comparison(folder)
    assert capsys.readouterr().out == text + "\n"
    outside = text.split("\n\n")[1].splitlines()
    assert [re.split(r"  +", line.strip())[0] for line in outside] == [
        "outside",
        "> default",
        "global",
        "mean expert",
        "paper",
        "(labelled routes)",
        "(best expert (hindsight))",
    ]
    assert re.fullmatch(r"> default +70\.1  \+1\.5 \[\+0\.\d, \+2\.\d\]", outside[1])
    assert outside[2].endswith("68.6  " + DASH)


def test_the_gap_to_pooled_training_is_shared_out(tmp_path, quick):
    """Half of what pooled training gains is 50 %; pooled, which no hospital reaches, never wins."""
    sites = {"A": {"FedAvg": dice(0), "half": dice(0) + 0.02, "worse": dice(0) - 0.01, "pooled": dice(0) + 0.04}}
    write_comparison(write_scores(tmp_path, score_rows("inside", sites)))
    rows = rows_of((tmp_path / "comparison.md").read_text(encoding="utf-8"), "Against FedAvg")
    closed = {name.strip("*"): row[-1].strip("*") for name, row in rows.items()}
    expected = {"pooled": "100%", "half": "50%", "FedAvg": DASH, "worse": f"{MINUS}25%"}
    assert {name: closed[name] for name in expected} == expected
    assert not any(cell.startswith("**") for cell in rows["*pooled*"])


def test_virtual_scanners_are_a_role_of_their_own(tmp_path, quick):
    """Scored inside and by virtual scanners: two sections, each against FedAvg."""
    rows = score_rows("inside", {"A": {"FedAvg": dice(0), "other": dice(1)}})
    rows += score_rows("virtual", {"blur": {"FedAvg": dice(0), "other": dice(0) - 0.02}})
    write_comparison(write_scores(tmp_path, rows))
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "# Virtual\n" in text
    assert rows_of(text.split("# Virtual\n", 1)[1], "Against FedAvg")["other"][0].startswith(f"{MINUS}2.0")
