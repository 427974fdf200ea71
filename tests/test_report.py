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
"""The report shows what the files of a run say: the right numbers, the right way up, and nothing it should not."""

from __future__ import annotations

import base64
import csv
import json
import os
import pickle
import re
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from shared_iopfl import pictures, report
from shared_iopfl.errors import InputError

METRICS = "site,role,case,model,metric,value"
CASES = "site,role,case,model,image,label,mask"
DASH = "\u2013"
INSIDE, OUTSIDE = ("global", "personalised"), ("soup", "routed", "global")


def write_csv(path: Path, header: str, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])


def write_volume(path: Path, array: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([-0.6, -0.6, 3.0, 1.0])), path)
    return str(path)


def shown_dice(site: int, case: int, model: str) -> float:
    return 0.70 + 0.02 * site + 0.01 * case + {"global": 0, "personalised": 0.05, "routed": 0.03, "soup": 0.01}[model]


def make_run(folder: Path) -> Path:
    """Two sites inside (with 3 and 6 cases) and one outside, small volumes with an ellipsoid as organ."""
    rng = np.random.RandomState(0)
    x, y, z = np.mgrid[:24, :24, :6]
    metrics, cases, history = [], [], []
    for s, (site, role, n, models) in enumerate(
        (("Site <A>", "inside", 3, INSIDE), ("B$1$", "inside", 6, INSIDE), ("Out", "outside", 5, OUTSIDE))
    ):
        for c in range(n):
            organ = ((x - 12) / 6) ** 2 + ((y - 11) / 5) ** 2 + ((z - 3) / 2.5) ** 2 <= 1
            scan = (100 * organ + 20 * rng.rand(*organ.shape)).astype(np.float32)
            image = write_volume(folder / "private" / f"{s}_{c}.nii.gz", scan)
            label = write_volume(folder / "private" / f"{s}_{c}_label.nii.gz", organ.astype(np.uint8))
            for m, model in enumerate(models):
                value = shown_dice(s, c, model)
                metrics.append([site, role, f"case{s}{c}", model, "dice", value])
                metrics.append([site, role, f"case{s}{c}", model, "hd95_mm", "nan" if c == 1 and m == 0 else 4 + m])
                mask = write_volume(folder / "masks" / f"{s}_{c}_{model}.nii.gz", np.roll(organ, m + 1, 0).astype("u1"))
                cases.append([site, role, f"case{s}{c}", model, image, label, os.path.relpath(mask, folder)])
        history += [[r, site, m, "val_mean_dice", 0.5 + 0.1 * r] for r in range(3) for m in INSIDE if role == "inside"]
        history += [[r, site, "local", "train_loss", 1 / (r + 1)] for r in range(3) if role == "inside"]
    write_csv(folder / "metrics.csv", METRICS, metrics[::-1])
    write_csv(folder / "cases.csv", CASES, cases)
    write_csv(folder / "history.csv", "round,site,model,metric,value", history)
    routes = [
        [f"case2{c}", layer, e, w] for c in range(2) for layer in range(3) for e, w in (("B$1$", 0.3), ("global", 0.7))
    ]
    write_csv(folder / "Out" / "routes.csv", "case,layer,expert,weight", routes)
    facts = {"decision": "start", "reason": "strays <far>", "objective_start": 0.25, "objective_end": float("nan")}
    (folder / "Out" / "routes.json").write_text(json.dumps({"experts": ["B$1$", "global"], "cases": {"case20": facts}}))
    settings = {"seed": 7, "dataset_dir": "/hospital/john doe", "versions": {"monai": "1.6.1"}}
    (folder / "run.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("run"))
    report.write_report(folder, title="Trial & <error>")
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def small_run(folder: Path, values: dict[str, list[float | str]], role: str = "inside") -> Path:
    """Only a ``metrics.csv``, of one site: Dice of each model by case."""
    rows = [
        ["S", role, f"c{i}", model, "dice", v] for model, of_cases in values.items() for i, v in enumerate(of_cases)
    ]
    write_csv(folder / "metrics.csv", METRICS, rows)
    return folder


def text_rows(page: str) -> dict[str, list[str]]:
    """The first row of each name in a page's tables, as plain text."""
    rows: dict[str, list[str]] = {}
    for row in re.findall(r"<tr.*?</tr>", page, re.S):
        cells = [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)]
        rows.setdefault(cells[0], cells[1:])
    return rows


def test_table_has_sites_inside_then_outside_and_the_methods_models_first(run, capsys):
    lines = report.print_table(run).splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    assert lines[0].split() == ["dice", "(%)", "role", "global", "personalised", "routed", "soup", "n"]
    table = {re.split(r"  +", line)[0]: line.split() for line in lines[1:]}
    assert [re.split(r"  +", line)[1] for line in lines[1:]] == ["inside"] * 3 + ["outside"] * 2
    assert {"Site <A>", "B$1$", "Out", "mean of sites"} == set(table)
    assert table["Site <A>"][-5:] == ["71.0", "76.0", DASH, DASH, "3"]
    # each site counts alike: (71.0 + 74.5) / 2, not the mean over the nine cases
    assert lines[3].split()[-5:] == ["72.8", "77.8", DASH, DASH, "9"]
    assert lines[5].split()[-5:] == ["76.0", DASH, "79.0", "77.0", "5"]


def test_table_of_a_distance_is_not_in_percent(run):
    assert "hd95 (mm)" in (text := report.print_table(run, metric="hd95_mm"))
    assert re.search(r"Out +outside +\S+ +\S +5\.00", text)


def test_table_without_scores_or_with_an_unknown_metric_says_what_to_do(run, tmp_path):
    with pytest.raises(InputError, match=r"metrics\.csv.*evaluate"):
        report.print_table(tmp_path)
    with pytest.raises(InputError, match=r"'volume'.*dice, hd95_mm|'volume'.*hd95_mm, dice"):
        report.print_table(run, metric="volume")


def test_mean_of_sites_leaves_out_a_model_that_not_every_site_has(tmp_path):
    rows = [["A", "inside", "1", m, "dice", 0.8] for m in INSIDE] + [["B", "inside", "1", "global", "dice", 0.6]]
    write_csv(tmp_path / "metrics.csv", METRICS, rows)
    assert report.print_table(tmp_path).splitlines()[-1].split()[-3:] == ["70.0", DASH, "2"]


def test_a_case_scored_again_counts_once_with_its_last_value(tmp_path):
    write_csv(tmp_path / "metrics.csv", METRICS, [["A", "inside", "1", "global", "dice", v] for v in (0.1, 0.9)])
    assert report.print_table(tmp_path).splitlines()[1].split()[-2:] == ["90.0", "1"]


def test_report_stands_alone(html, run):
    """No scripts, links or files from elsewhere; every picture is a PNG inside the page."""
    assert not re.search(r"<script|<link|@import|url\(|https?:", html)
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 1 + 2 + 1 + 3  # cases as dots, two learning curves, routes, overlays of three sites
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
    assert "Not in this folder" not in html


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
    assert report._without_path(text) in (
        "(path not shown)",
        "see (path not shown)",
        "at (path not shown)",
        "in (path not shown)",
    )


@pytest.mark.parametrize("text", ["objective improved", "1/2 of 3 / 4", "Dice 0.871 < 0.9", "lr 1e-3, alpha = 0.1"])
def test_text_without_a_path_stays(text):
    assert report._without_path(text) == text


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


def test_interval_is_seeded_and_holds_the_mean():
    values = np.random.RandomState(1).normal(0.02, 0.05, 30)
    site = {
        "global": dict.fromkeys(map(str, range(30)), 0.5),
        "routed": {str(i): 0.5 + v for i, v in enumerate(values)},
    }
    mean, low, high, n = report._difference([site], "routed", "global")
    assert n == 30
    assert mean == pytest.approx(values.mean())
    # as wide as the normal approximation says, within what 2,000 resamples give
    assert (low, high) == pytest.approx(values.mean() + np.array([-1, 1]) * 1.96 * values.std() / 30**0.5, abs=0.002)
    assert report._difference([site], "routed", "global") == (mean, low, high, n)


def test_no_claim_with_fewer_than_five_cases(tmp_path):
    """Cases without a partner or a value do not count towards the five."""
    folder = small_run(tmp_path, {"global": [0.5, 0.5, 0.5, 0.5, "", 0.5], "personalised": [0.6, 0.6, 0.6, 0.6, 0.6]})
    page = report.write_report(folder).read_text(encoding="utf-8")
    assert text_rows(page.split("difference (points)")[1])["S inside"] == ["+10.0 no interval: n = 4"]


def test_same_files_give_the_same_report_and_nothing_global_changes(tmp_path):
    import matplotlib.pyplot as plt

    folder = small_run(tmp_path, {"global": [0.5] * 5, "personalised": [0.6] * 5})
    state = pickle.dumps(np.random.get_state())  # noqa: NPY002
    first = report.write_report(folder).read_bytes()
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(report.write_report(folder))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert (folder / "report.html").read_bytes() == first
    assert pickle.dumps(np.random.get_state()) == state  # noqa: NPY002
    assert plt.get_fignums() == []


def test_what_is_missing_is_said_and_the_rest_is_shown(tmp_path):
    write_csv(tmp_path / "history.csv", "round,site,model,metric,value", [[0, "S", "global", "val_mean_dice", 0.5]])
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Learning curves"]
    note = page.split("Not in this folder")[1].split("</p>")[0]
    assert [name for name in report._FILES if name.removeprefix("**/") in note] == [
        n for n in report._FILES if "history" not in n
    ]


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
    with pytest.raises(OSError, match="disk full"):
        report.write_report(folder)
    assert (folder / "report.html").read_text() == "old"
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.csv", "report.html"]


@pytest.mark.parametrize("order", ["RAS", "LPS", "SAL", "PIR"])
def test_volumes_show_in_radiological_convention_however_they_are_stored(tmp_path, order):
    """The patient's right is on the picture's left, anterior is up, slices start at the feet."""
    scan = np.zeros((20, 16, 4), np.float32)  # indices grow to the patient's right, to the front and to the head
    scan[10:13, 11:13, 2] = 100
    mask = (scan > 0).astype(np.uint8)
    scan[14, 9, 2] = 100  # beside the organ, to its right and behind it
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(order))
    )
    for name, array in (("scan", scan), ("mask", mask)):
        nib.save(nib.Nifti1Image(array, np.diag([0.5, 0.8, 3, 1])).as_reoriented(turn), tmp_path / f"{name}.nii.gz")
    case = pictures.load_case(tmp_path / "scan.nii.gz", {"global": tmp_path / "mask.nii.gz"})
    (view,) = pictures.case_views(case, "global", "title")
    assert (case.is_volume, case.aspect, view.index) == (True, pytest.approx(1.6), 2)
    panel = pictures.overlay_picture([view], "global", pictures.colours(["global"])).axes[0]
    picture = np.asarray(panel.get_images()[0].get_array())
    assert picture.shape == (10, 10)  # zoomed in on the organ
    expected = np.zeros((10, 10), bool)
    expected[3:5, 3:6] = expected[6, 1] = True
    np.testing.assert_array_equal(picture > 0, expected)
    assert [text.get_text() for text in sorted(panel.texts, key=lambda text: text.get_position()[0])] == ["R", "L"]
    outline = panel.collections[0].get_paths()[0].get_extents()  # half a pixel around the mask
    assert (outline.x0, outline.x1, outline.y0, outline.y1) == (2.5, 5.5, 2.5, 4.5)


def test_pictures_in_colour_are_whole_and_upright_with_both_classes_outlined(tmp_path):
    photograph = np.full((12, 18, 3), 40, np.uint8)
    photograph[2, 15] = (255, 128, 0)
    mask = np.zeros((12, 18), np.uint8)
    mask[3:9, 3:9], mask[5:7, 5:7] = 1, 2
    Image.fromarray(photograph).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = {"reference": tmp_path / "mask.png", "routed": tmp_path / "mask.png"}
    case = pictures.load_case(tmp_path / "image.png", files)
    (view,) = pictures.case_views(case, "routed", "title", disagreement=True)
    panel = pictures.overlay_picture([view], "routed", pictures.colours(["routed"])).axes[0]
    picture = np.asarray(panel.get_images()[0].get_array())
    assert np.abs(picture - photograph / 255).max() < 1e-6
    extents = [collection.get_paths()[0].get_extents().intervalx for collection in panel.collections]
    assert np.array_equal(extents, [(2.5, 8.5), (4.5, 6.5)] * 2)
    assert not panel.texts  # a photograph has no patient's right


def test_worst_case_shows_the_slices_of_largest_area_and_of_largest_disagreement():
    reference, predicted = np.zeros((2, 8, 8, 5), np.uint8)
    reference[2:6, 2:6, 3] = predicted[2:6, 2:6, 3] = 1
    predicted[1:3, 1:3, 0] = 1
    case = pictures.CaseImages(np.ones((1, 8, 8, 5)), {"reference": reference, "routed": predicted}, 1.0, True)
    assert [view.index for view in pictures.case_views(case, "routed", "", disagreement=True)] == [3, 0]
    assert [view.index for view in pictures.case_views(case, "routed", "")] == [3]
    right = pictures.CaseImages(case.image, {"reference": reference, "routed": reference}, 1.0, True)
    assert [view.index for view in pictures.case_views(right, "routed", "", disagreement=True)] == [3]
    del case.masks["reference"]  # of unlabelled cases the largest prediction
    assert [view.index for view in pictures.case_views(case, "routed", "", disagreement=True)] == [3]


def test_best_median_and_worst_are_different_cases():
    dice = {"a": 0.5, "b": 0.9, "c": 0.7, "d": float("nan"), "e": 0.8}
    assert report._best_median_worst(dice, "abcd") == [("best", "b"), ("median", "c"), ("worst", "a")]
    assert report._best_median_worst(dice, "abd") == [("best", "b"), ("worst", "a")]
    assert report._best_median_worst(dice, "ad") == [("", "a")]
    assert report._best_median_worst({}, "wxyz") == [("", "w"), ("", "x"), ("", "y")]


def test_cases_that_cannot_be_drawn_are_named_without_their_paths(tmp_path, caplog):
    """A missing file, a mask of another shape and a mask coded otherwise leave out their case, not the report."""
    folder = small_run(tmp_path, {"personalised": [0.5, 0.6, 0.7]})
    mask = np.zeros((8, 8), np.uint8)
    for name, array in (("image", mask), ("other", mask[:4]), ("coded", mask + 255)):
        Image.fromarray(array).save(folder / f"{name}.png")
    files = [
        ("gone.png", "", "image.png"),
        ("image.png", "other.png", "image.png"),
        ("image.png", "coded.png", "image.png"),
    ]
    write_csv(folder / "cases.csv", CASES, [["S", "inside", f"c{i}", "personalised", *f] for i, f in enumerate(files)])
    page = report.write_report(folder).read_text(encoding="utf-8")
    assert "missing or do not fit each other: c2, c1, c0." in page
    assert not re.search(r"(gone|other|coded)\.png", page)
    for reason in ("gone.png cannot be read", "other.png has shape (4, 8, 1)", "coded.png holds values up to 255"):
        assert reason in caplog.text.replace("has shape (8, 4, 1)", "has shape (4, 8, 1)")


def test_overlays_show_the_sites_own_kind_of_model(html):
    assert re.findall(r"<h3>([^<]*) <small>(.*?)</small></h3>", html) == [
        ("Site &lt;A&gt;", "inside, personalised model"),
        ("B$1$", "inside, personalised model"),
        ("Out", "outside, routed model"),
    ]


def test_a_model_has_its_own_colour_whatever_else_is_shown():
    few, many = pictures.colours(["routed"]), pictures.colours(["soup", "global", "tent", "routed", "BIDMC", "local"])
    assert all(many[model] == few[model] for model in few)
    assert len(set(many.values())) == len(many) == 7


def test_routes_are_means_over_cases_by_layer_and_over_layers_by_case():
    weights = np.random.RandomState(0).dirichlet([1, 1, 1], size=(2, 4))
    above, below, _ = pictures.routes_picture(weights, ["A", "B$", "global"], ["c1", "c2"], ["0", "1", "2", "3"]).axes
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
