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
"""The report shows what the files of a run say: the right numbers, and nothing it should not."""

from __future__ import annotations

import base64
import os
import pickle
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image
from runs import CASES, DASH, METRICS, make_run, small_run, write_csv

from shared_iopfl.report import charts
from shared_iopfl.report import run as report
from shared_iopfl.report.gallery import best_median_worst
from shared_iopfl.report.pages import without_path
from shared_iopfl.utils.errors import InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run"))
    report.write_report(folder, title="Trial & <error>")
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def text_rows(page: str) -> dict[str, list[str]]:
    """The first row of each name in a page's tables, as plain text."""
    rows: dict[str, list[str]] = {}
    for row in re.findall(r"<tr.*?</tr>", page, re.S):
        cells = [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)]
        rows.setdefault(cells[0], cells[1:])
    return rows


def test_report_stands_alone(html, run):
    """No scripts, links or files from elsewhere; every picture is a PNG inside the page."""
    assert not re.search(r"<script|<link|@import|url\(|https?:", html)
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 1 + 3 + 1 + 3  # cases as dots, learning curves and rate, routes, overlays of three sites
    for source in sources:
        head, data = source.split(",", 1)
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert [path.name for path in run.iterdir() if path.suffix in (".tmp", ".html")] == ["report.html"]


def test_report_has_every_section_in_order(html):
    assert re.findall(r"<h2>(.*?)</h2>", html) == [
        "Dice by site and model",
        "Every case",
        "Other measures",
        "Learning curves",
        "Routes",
        "Cases: best, median, worst",
        "Decisions of the guard",
        "What was run",
    ]
    assert "not for diagnosis" in html
    assert "2 sites inside · 1 site outside · 14 test cases · 3 rounds" in html
    assert "Not shown, as the files" not in html


def test_text_is_escaped_and_paths_stay_out(html, run):
    assert "Trial &amp; &lt;error&gt;" in html
    assert "Site &lt;A&gt;" in html
    assert "strays &lt;far&gt;" in html
    assert not re.search(r"<A>|<error>|<far>", html)
    for private in (str(run), "private", "hospital", "doe", ".nii"):
        assert private not in re.sub(r"base64,[^\"]*", "", html)
    assert "<dt>dataset_dir</dt><dd>(path not shown)</dd>" in html
    assert "<dt>versions.monai</dt><dd>1.6.1</dd>" in html


@pytest.mark.parametrize("text", ["/data/a b.nii", "see ~/x", "at C:\\scans\\x", "in ../x y", "sites/john/x", '["/a"]'])
def test_a_path_within_text_is_cut(text):
    assert without_path(text) in (
        "(path not shown)",
        "see (path not shown)",
        "at (path not shown)",
        "in (path not shown)",
    )


@pytest.mark.parametrize("text", ["objective improved", "1/2 of 3 / 4", "Dice 0.871 < 0.9", "lr 1e-3, alpha = 0.1"])
def test_text_without_a_path_stays(text):
    assert without_path(text) == text


def test_undefined_values_are_dashes_and_counted(html, tmp_path):
    distances = html.split("Other measures")[1].split("Learning curves")[0]
    assert text_rows(distances)["Site &lt;A&gt; inside"][1] == "4.00 ± 0.00 (2 of 3)"
    assert f"3 values are undefined ({DASH})" in distances
    page = report.write_report(small_run(tmp_path, {"global": ["nan", ""]})).read_text(encoding="utf-8")
    assert text_rows(page)["S inside"] == ["2", f"{DASH} (0 of 2)"]


def test_best_mean_of_each_row_is_bold(html):
    dice, distances = html.split("Other measures")
    row = next(line for line in re.findall(r"<tr.*?</tr>", dice) if "Out <small>" in line)
    assert re.findall(r"<b>(.*?)</b>", row) == ["79.0"]
    row = next(line for line in re.findall(r"<tr.*?</tr>", distances) if "Out <small>" in line)
    assert re.findall(r"<b>(.*?)</b>", row) == ["4.00"]  # of a distance the smallest


def test_interval_is_of_paired_cases(tmp_path):
    """A gain that is the same for every case has an interval of no width, however much the cases differ."""
    folder = small_run(
        tmp_path, {"global": [0.1, 0.5, 0.9, 0.3, 0.7], "routed": [0.15, 0.55, 0.95, 0.35, 0.75]}, "outside"
    )
    page = report.write_report(folder).read_text(encoding="utf-8")
    gains = text_rows(page.split("difference (points)")[1])
    assert gains["S outside"] == ["+5.0 [+5.0, +5.0] n = 5"]


def test_no_claim_with_fewer_than_five_cases(tmp_path):
    """Cases without a partner or a value do not count towards the five."""
    folder = small_run(tmp_path, {"global": [0.5, 0.5, 0.5, 0.5, "", 0.5], "personalised": [0.6, 0.6, 0.6, 0.6, 0.6]})
    page = report.write_report(folder).read_text(encoding="utf-8")
    assert text_rows(page.split("difference (points)")[1])["S inside"] == ["+10.0 no interval: n = 4"]


def test_same_files_give_the_same_report_and_nothing_global_changes(tmp_path):
    import matplotlib.pyplot as plt

    folders = [small_run(tmp_path / name, {"global": [0.5] * 5, "personalised": [0.6] * 5}) for name in "abc"]
    state = pickle.dumps(np.random.get_state())  # noqa: NPY002
    first = report.write_report(folders[0]).read_bytes()
    threads = [threading.Thread(target=report.write_report, args=(folder,)) for folder in folders[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(folder / "report.html").read_bytes() for folder in folders] == [first] * 3
    assert pickle.dumps(np.random.get_state()) == state  # noqa: NPY002
    assert plt.get_fignums() == []


def test_what_is_missing_is_said_and_the_rest_is_shown(tmp_path):
    write_csv(tmp_path / "history.csv", "round,site,model,metric,value", [[0, "S", "global", "val_mean_dice", 0.5]])
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Learning curves"]
    note = page.split("Not shown, as the files")[1].split("</p>")[0]
    assert [name for name in report._FILES if name.removeprefix("**/") in note] == [
        n for n in report._FILES if "history" not in n
    ]


def test_rounds_that_went_on_without_a_site_are_told_with_the_reason_and_no_path(tmp_path):
    write_csv(tmp_path / "history.csv", "round,site,model,metric,value", [[1, "S", "global", "val_mean_dice", 0.5]])
    assert "Rounds without a site" not in report.write_report(tmp_path).read_text()
    rows = [[2, "Ä&B", "InputError: no scan in /data/Smith^John"], [3, "C", "NaN or infinite values in 'w'"]]
    write_csv(tmp_path / "failures.csv", "round,site,reason", rows)
    html = report.write_report(tmp_path).read_text()
    assert "Rounds without a site" in html and "Smith" not in html
    assert "<tr><th>2</th><td>Ä&amp;B</td><td>InputError: no scan (path not shown)</td></tr>" in html
    assert "<td>C</td><td>NaN or infinite values in &#39;w&#39;</td>" in html


def test_the_models_at_other_sites_are_a_matrix_with_a_dash_where_none_was_scored(tmp_path):
    small_run(tmp_path, {"global": [0.8, 0.9]})
    rows = [["global", "A", 0.8], ["global", "<B>", 0.7], ["A", "<B>", 0.6], ["<B>", "A", 0.5]]
    write_csv(tmp_path / "cross_site.csv", "model,site,dice", rows)
    html = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "<tr><th>model</th><th>at A</th><th>at &lt;B&gt;</th></tr>" in html
    assert "<tr><th>global</th><td>80.0</td><td>70.0</td></tr>" in html
    assert f"<tr><th>A</th><td>{DASH}</td><td>60.0</td></tr>" in html
    write_csv(tmp_path / "cross_site.csv", "model,site,dice", rows[:1])
    assert "Models at other sites" not in report.write_report(tmp_path).read_text(encoding="utf-8")


def test_nothing_to_report_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(InputError, match=r"neither metrics\.csv nor history\.csv: run") as caught:
        report.write_report(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "header, row, message",
    [
        ("site,role,case,model,value", ["S", "inside", "1", "global", 1], "lacks the column 'metric'"),
        (METRICS, ["S", "inside", "1", "global", "dice", "good"], "'good' is not a number"),
        (METRICS, ["S", "beside", "1", "global", "dice", 1], "'beside' is neither"),
    ],
)
def test_wrong_content_is_an_error_of_one_line_that_names_the_file(tmp_path, header, row, message):
    write_csv(tmp_path / "metrics.csv", header, [row])
    with pytest.raises(InputError, match=message) as caught:
        report.write_report(tmp_path)
    assert str(tmp_path / "metrics.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_write_that_fails_leaves_the_old_report(tmp_path, monkeypatch):
    folder = small_run(tmp_path, {"global": [0.5]})
    (folder / "report.html").write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(InputError, match=r"cannot write to .*disk full"):
        report.write_report(folder)
    assert (folder / "report.html").read_text() == "old"
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.csv", "report.html"]


def test_best_median_and_worst_are_different_cases():
    dice = {"a": 0.5, "b": 0.9, "c": 0.7, "d": float("nan"), "e": 0.8}
    assert best_median_worst(dice, "abcd") == [("best", "b"), ("median", "c"), ("worst", "a")]
    assert best_median_worst(dice, "abd") == [("best", "b"), ("worst", "a")]
    assert best_median_worst(dice, "ad") == [("", "a")]
    assert best_median_worst({}, "wxyz") == [("", "w"), ("", "x"), ("", "y")]


def test_cases_that_cannot_be_drawn_are_named_without_their_paths(tmp_path, caplog):
    """A missing file, a mask of another shape and a mask that is none leave out their case, not the report."""
    folder = small_run(tmp_path, {"personalised": [0.5, 0.6, 0.7]})
    mask = np.zeros((8, 8), np.uint8)
    for name, array in (("image", mask), ("other", mask[:4]), ("coded", np.arange(64, dtype=np.uint8).reshape(8, 8))):
        Image.fromarray(array).save(folder / f"{name}.png")
    files = [
        ("gone.png", "", "image.png"),
        ("image.png", "other.png", "image.png"),
        ("image.png", "coded.png", "image.png"),
    ]
    write_csv(folder / "cases.csv", CASES, [["S", "inside", f"c{i}", "personalised", *f] for i, f in enumerate(files)])
    page = report.write_report(folder).read_text(encoding="utf-8")
    assert "missing or do not match: c2, c1, c0." in page
    assert not re.search(r"(gone|other|coded)\.png", page)
    for reason in ("gone.png cannot be read", "other.png has shape (4, 8, 1)", "coded.png holds 64 different values"):
        assert reason in caplog.text.replace("has shape (8, 4, 1)", "has shape (4, 8, 1)")


def test_overlays_show_the_sites_own_kind_of_model(html):
    assert re.findall(r"<h3>([^<]*) <small>(.*?)</small></h3>", html) == [
        ("Site &lt;A&gt;", "inside, personalised model"),
        ("B$1$", "inside, personalised model"),
        ("Out", "outside, routed model"),
    ]


def test_routes_are_means_over_cases_by_layer_and_over_layers_by_case():
    weights = np.random.RandomState(0).dirichlet([1, 1, 1], size=(2, 4))
    above, below, _ = charts.routes_picture(weights, ["A", "B$", "global"], ["c1", "c2"], ["0", "1", "2", "3"]).axes
    np.testing.assert_allclose(np.asarray(above.get_images()[0].get_array()), weights.mean(0).T)
    heights = np.reshape([bar.get_height() for bar in below.patches if isinstance(bar, Rectangle)], (3, 2))
    np.testing.assert_allclose(heights, weights.mean(1).T)


def test_routes_of_a_folder_a_case_come_together_and_other_sites_stay_apart(tmp_path):
    small_run(tmp_path, {"global": [0.5]})
    header = "case,layer,expert,weight"
    for case in ("p1", "p2"):
        write_csv(tmp_path / "East" / case / "routes.csv", header, [[case, 0, "global", 1]])
    write_csv(tmp_path / "West" / "routes.csv", header, [[case, 0, "global", 1] for case in ("q1", "q2")])
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["East", "West"]


def test_decisions_are_a_table_with_what_is_not_known_as_a_dash(html):
    assert text_rows(html)["case20 Out"] == ["start", "strays &lt;far&gt;", "0.25", DASH, DASH, DASH]
    assert "start 1." in html


def test_differences_of_an_outside_site_are_routed_and_soup_from_global_and_from_each_other(html):
    """And a site inside has its own table, without columns of dashes."""
    inside, outside = html.split("difference (points)")[1:]
    assert re.findall(r"<th>([a-z]+ \u2212 [a-z]+)</th>", inside) == ["personalised \u2212 global"]
    pairs = ["routed \u2212 global", "soup \u2212 global", "routed \u2212 soup"]
    assert re.findall(r"<th>([a-z]+ \u2212 [a-z]+)</th>", outside) == pairs
    gains = [cell.split(" [")[0] for cell in text_rows(outside)["Out outside"]]
    assert gains == ["+3.0", "+1.0", "+2.0"]


def test_learning_rates_are_one_panel_for_sites_that_had_the_same(tmp_path, monkeypatch):
    shown = {}
    drawn = charts.curves_picture
    monkeypatch.setattr(charts, "curves_picture", lambda sites, *rest: (shown.update(sites), drawn(sites, *rest))[1])
    rates = {"A": (0.1, 0.01), "B": (0.1, 0.01), "C": (0.2, 0.01)}
    rows = [[r, s, "local", "learning_rate", rate] for s, of in rates.items() for r, rate in enumerate(of)]
    write_csv(tmp_path / "history.csv", "round,site,model,metric,value", rows)
    report.write_report(tmp_path)
    expected = {"A, B": [(0, 0.1), (1, 0.01)], "C": [(0, 0.2), (1, 0.01)]}
    assert {panel: list(of["local"]) for panel, of in shown.items()} == expected


def test_a_uniform_mixture_is_said_and_not_drawn(tmp_path):
    small_run(tmp_path, {"global": [0.5]})
    rows = [["c0", layer, expert, 0.5] for layer in range(3) for expert in ("A", "global")]
    write_csv(tmp_path / "soup" / "routes.csv", "case,layer,expert,weight", rows)
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    section = page.split("<h2>Routes</h2>")[1]
    assert "the same weight in every layer: 0.50" in section
    assert "<img" not in section
