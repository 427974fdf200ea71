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
"""The review list begins with the doubtful masks, needs no label, and changes no mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from monai.engines import SupervisedEvaluator
from torch import Tensor, nn
from torch.utils.data import DataLoader

import shared_iopfl.inferers.views
from shared_iopfl.evaluation.records import RoutesRecorder
from shared_iopfl.evaluation.review import ReviewRecorder, collect_review, review_rows
from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.routing.objectives import mean_prediction, target_areas, view_agreement
from shared_iopfl.routing.settings import preset
from shared_iopfl.utils.tables import read_rows, write_rows

ORGAN = (slice(4, 12), slice(4, 12))


class Sided(nn.Module):
    """Finds what is bright, and sooner on one side than on the other: a weak organ looks different in the mirror."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.conv = nn.Conv2d(1, 2, 1)
        with torch.no_grad():
            self.conv.weight[:] = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
            self.conv.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        FORWARDS.append(len(images))
        side = torch.linspace(-1, 1, images.shape[2])[:, None]
        return self.conv(self.norm(images)) + torch.stack([torch.zeros_like(side), side])


FORWARDS: list[int] = []  # of every copy of the network


def scan(brightness: float) -> Tensor:
    """Return a picture (1, 16, 16) with an organ on a dark background."""
    image = torch.full((1, 16, 16), -5.0)
    image[0][ORGAN] = brightness
    return image


def routing(mode: Any = "episodic", **overrides: Any) -> TestTimeRoutingInferer:
    settings = preset("default", {"statistics": 0.0, **overrides})
    return TestTimeRoutingInferer({"A": Sided().state_dict()}, mode, settings, flips=[0], slices=None)


def serve(folder: Path, scans: dict[str, float], inferer: TestTimeRoutingInferer) -> list[dict[str, str]]:
    """Return the review list of an evaluator without labels; it is empty if none is written."""
    SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader([{"image": scan(b), "case": case} for case, b in scans.items()], batch_size=1),
        network=Sided(),
        inferer=inferer,
        val_handlers=[RoutesRecorder(inferer, str(folder)), ReviewRecorder(inferer, str(folder))],
    ).run()
    return read_rows(folder / "review.csv")


def test_a_scan_whose_views_disagree_comes_first_but_after_an_empty_mask(tmp_path: Path) -> None:
    rows = serve(tmp_path, {"firm": 5.0, "nothing": -5.0, "weak": 0.1, "clear": 5.0}, routing())
    assert [row["case"] for row in rows] == ["nothing", "weak", "clear", "firm"]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    quality = [float(row["quality"]) for row in rows]
    assert quality[0] == 0 and 0.3 < quality[1] < 0.9 and quality[2:] == [1, 1]
    assert [row["reasons"].split("; ")[0] for row in rows[:2]] == ["empty mask", "views disagree"]
    assert all(float(row["shift"]) > 0 and row["decision"] == "start" for row in rows)
    assert "quality" in (tmp_path / "routes.json").read_text(encoding="utf-8")


def test_the_written_mask_decides_whether_it_is_empty(tmp_path: Path) -> None:
    """A small organ may disappear in the grid of the scan; areas are rounded."""
    recorder, engine = ReviewRecorder(routing(), str(tmp_path)), Engine(lambda *_: None)
    masks = {"lost": torch.zeros(1, 4, 4, dtype=torch.uint8), "tiny": torch.zeros(1, 4, 4, dtype=torch.uint8)}
    masks["tiny"][0, 1, 2] = 1
    reports = {"lost": {"areas": [0.01], "quality": 0.95}, "tiny": {"areas": [0.0], "quality": 0.95}}
    state: Any = engine.state
    state.batch = [{"image": scan(5.0), "case": case} for case in masks]
    state.output = [{"pred": masks[case], "report": reports[case]} for case in masks]
    recorder.record(engine)
    assert {row["case"]: row["reasons"] for row in read_rows(tmp_path / "review.csv")} == {
        "lost": "empty mask",
        "tiny": "",
    }


@pytest.mark.parametrize("place", [(0, 2, 2), (2, 3, 2), (2, 2, 4)])
def test_a_mask_at_the_border_of_its_scan_has_that_reason(tmp_path: Path, place: tuple[int, ...]) -> None:
    """The scan may end within the organ, in its last slice or in the plane."""
    recorder, engine = ReviewRecorder(routing(), str(tmp_path)), Engine(lambda *_: None)
    masks = {case: torch.zeros(1, 4, 4, 5, dtype=torch.uint8) for case in ("cut", "whole")}
    masks["cut"][0][place] = 1
    masks["whole"][0, 1:3, 1:3, 1:4] = 1
    masks["slice"] = torch.zeros(1, 4, 4, 1, dtype=torch.uint8)  # of a single slice, all is at the end
    masks["slice"][0, 1, 1] = 1
    state: Any = engine.state
    state.batch = [{"image": scan(5.0), "case": case} for case in masks]
    state.output = [{"pred": mask, "report": {"areas": [1.0], "quality": 0.95}} for mask in masks.values()]
    recorder.record(engine)
    reasons = {row["case"]: row["reasons"] for row in read_rows(tmp_path / "review.csv")}
    assert reasons == {"cut": "mask reaches the border of the scan", "whole": "", "slice": ""}


def test_the_network_of_a_site_gives_a_review_list(tmp_path: Path) -> None:
    inferer = routing("site")
    inferer.fit([scan(5.0)[None]], Sided())
    rows = serve(tmp_path, {"firm": 5.0, "weak": 0.1}, inferer)
    assert [(row["case"], row["decision"]) for row in rows] == [("weak", "site"), ("firm", "site")]
    assert {float(row["shift"]) for row in rows} == {inferer.site_shift}
    assert not (tmp_path / "routes.json").exists()


def test_scans_of_a_site_with_a_large_shift_have_that_reason(tmp_path: Path) -> None:
    """In mode "site", the shift is that of the site; for a network that was fitted before, it is not known."""
    inferer = routing("site")
    inferer.usual_shift = 0.1
    inferer.fit([scan(5.0)[None]], Sided())
    inferer.site_shift = 4 * inferer.usual_shift
    rows = serve(tmp_path, {"firm": 5.0, "weak": 0.1}, inferer)
    assert [row["reasons"] for row in rows] == ["views disagree; large shift", "large shift"]
    inferer.site_shift = None
    assert {row["shift"] for row in serve(tmp_path, {"firm": 5.0}, inferer)} == {""}


def test_plain_inference_gives_no_review_list(tmp_path: Path) -> None:
    serve(tmp_path, {"firm": 5.0, "weak": 0.1}, routing("off"))
    assert not (tmp_path / "review.csv").exists()


@pytest.mark.parametrize("name", ["soup", "paper"])
def test_a_single_view_gives_reasons_but_no_quality(tmp_path: Path, name: str) -> None:
    settings = preset(name, {"steps": 0, "start": "uniform", "statistics": 0.0})
    inferer = TestTimeRoutingInferer({"A": Sided().state_dict()}, "episodic", settings, flips=[0], slices=None)
    rows = serve(tmp_path, {"firm": 5.0, "nothing": -5.0}, inferer)
    assert [(row["case"], row["quality"], row["reasons"]) for row in rows] == [
        ("nothing", "", "empty mask"),
        ("firm", "", ""),
    ]


@torch.no_grad()
def test_quality_changes_no_mask_and_costs_no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = Sided().eval(), torch.stack([scan(0.1), scan(5.0)])
    inferer, plain = routing(), routing()
    FORWARDS.clear()
    found, cost = inferer(images, network), len(FORWARDS)
    monkeypatch.setattr(shared_iopfl.inferers.views, "view_agreement", lambda *_: 0.5)
    FORWARDS.clear()
    assert torch.equal(plain(images, network), found) and len(FORWARDS) == cost
    assert all("quality" in report for report in inferer.reports)
    assert {report["quality"] for report in plain.reports} == {0.5}
    # equal experts: the routed network is the plain one
    seen = [network(images), network(images.flip(2)).flip(2)]
    torch.testing.assert_close(found, mean_prediction(seen, "softmax"), rtol=1e-4, atol=1e-5)


def test_agreement_is_the_mean_over_views_and_targets() -> None:
    """Two targets of four pixels are computed by hand; a missing one counts as 0, whatever a view shows of it."""
    both = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]])[None]
    half = torch.tensor([[1.0, 1, -1, -1], [1, -1, -1, -1]])[None]
    found = view_agreement([both, half], both, "sigmoid")
    assert found == pytest.approx((1 + 2 * 2 / 6 + 0 + 0) / 4, abs=1e-4)
    assert target_areas(both, "sigmoid") == [1, 0]
    classes = torch.tensor([[0.0, 0, 9, 9], [1, 1, 0, 0], [0, 0, 1, 1]])[None]
    assert view_agreement([classes], classes, "softmax") == 0.5
    assert target_areas(classes, "softmax") == [0.5, 0]


def test_equal_quality_is_ordered_by_name() -> None:
    names = ["c10", "b", "a", "c2"]
    for order in (names, names[::-1]):
        assert [row["case"] for row in review_rows({n: {"quality": 0.5, "areas": [1]} for n in order})] == sorted(names)
    reports = {"b": {"quality": 0.2}, "a": {"quality": 0.3}, "unknown": {"decision": "start"}}
    assert [row["case"] for row in review_rows(reports)] == ["b", "a"]


@pytest.mark.parametrize(
    ("report", "reasons"),
    [
        ({"quality": 1.0, "areas": [0.1, 0.1], "shift": 0.2}, ""),
        ({"quality": 1.0, "areas": [0.1, 0.1], "shift": 0.21}, "large shift"),
        ({"quality": 0.5, "areas": [0.1, 0.0], "shift": 0.3}, "target 2 is missing; large shift"),
        ({"quality": 0.0, "areas": [0.0, 0.0]}, "empty mask"),
        ({"quality": 0.8, "decision": "start", "reason": "no adaptation was requested"}, "views disagree"),
        ({"quality": 1.0, "decision": "start", "reason": "it strays", "objective_start": 0.1}, "it strays"),
        ({"quality": 1.0, "decision": "adapted", "reason": "improved", "objective_start": 0.1}, ""),
    ],
)
def test_reasons_follow_from_the_report(report: dict[str, Any], reasons: str) -> None:
    assert review_rows({"case": report}, large_shift=0.2)[0]["reasons"] == reasons


def test_comparison_puts_quality_beside_dice(tmp_path: Path) -> None:
    """Only outside cases of the selected method with a known quality are listed."""
    collect_review(tmp_path)
    assert not (tmp_path / "review.csv").exists()
    for seed, turn in ((0, 1), (1, -1)):
        run = tmp_path / f"seed{seed}" / "outside_S 1"
        dice = {f"c{n}": 0.5 + n / 10 for n in range(4)}
        rows = [(model, "dice", case, value) for model in ("default", "global") for case, value in dice.items()]
        rows.append(("default", "asd_mm", "c0", 3.0))
        columns = ("site", "role", "case", "model", "metric", "value")
        table = [dict(zip(columns, ("S 1", "outside", case, m, metric, value))) for m, metric, case, value in rows]
        write_rows(run / "metrics.csv", columns, table)
        known = [{"case": case, "quality": 0.5 + turn * value / 4} for case, value in dice.items() if case != "c3"]
        listed = run / "masks" / "S 1" / "default" / "review.csv"
        write_rows(listed, ("case", "quality"), [*known, {"case": "c3", "quality": ""}])
    collect_review(tmp_path)
    rows = read_rows(tmp_path / "review.csv")
    assert list(rows[0]) == ["seed", "fold", "site", "case", "quality", "dice"]
    assert {(row["seed"], row["fold"], row["site"], row["case"]) for row in rows} == {
        (seed, "S 1", "S 1", f"c{n}") for seed in "01" for n in range(3)
    }
    assert float(rows[0]["quality"]) == 0.625 and float(rows[0]["dice"]) == 0.5


def test_remarks_on_a_picture_are_the_first_reason() -> None:
    reports = {
        "a": {"quality": 0.5, "areas": [3], "remarks": "optic disc uncertain"},
        "b": {"quality": 0.95, "remarks": ""},
    }
    assert [row["reasons"] for row in review_rows(reports)] == ["optic disc uncertain; views disagree", ""]
