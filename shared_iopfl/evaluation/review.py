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
"""The review list: the masks to check first, without labels; and its comparison with the Dice if there are labels.

The quality of a mask is the agreement of the views of its scan (`shared_iopfl.routing.objectives.view_agreement`). It
ranks the scans of one list, but it does not estimate their Dice and cannot be compared between models or tasks. With a
calibration of the models (`shared_iopfl.evaluation.calibration`), the list also has the expected Dice.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Engine
from monai.engines import SupervisedEvaluator

from shared_iopfl.evaluation.calibration.estimate import Calibration, read_calibration
from shared_iopfl.evaluation.records.growing_tables import ServedRecorder, served_scans
from shared_iopfl.evaluation.records.routes import reported_case
from shared_iopfl.evaluation.run.results import EXPECTED
from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.models.files import GLOBAL
from shared_iopfl.routing.settings import LARGE_SHIFT
from shared_iopfl.utils.tables import read_rows, write_rows

logger = logging.getLogger(__name__)

COLUMNS = ("rank", "case", "quality", *EXPECTED, "shift", "decision", "reasons")
COLLECTED = ("seed", "fold", "site", "case", "quality", "dice")
AGAIN = "run iopfl calibrate with the present ones."
DISAGREEMENT = 0.9  # quality below which views disagree
EMPTY = "empty mask"
CUT = "mask reaches the border of the scan"


class ReviewRecorder(ServedRecorder):
    """Write ``review.csv`` as scans are segmented: the worst masks first, with the reasons to check them.

    Without quality, which predictions from a single view lack (presets soup and paper), the list begins with the masks
    that have a reason. No file is written for plain inference.

    Args:
        inferer: Inferer; `RoutesRecorder`, which is attached before, adds its reports to the engine's output as
            "report".
        output_dir: Folder of the file.
        calibration: File of a calibration (see `shared_iopfl.evaluation.calibration`), which gives the expected Dice of
            each mask. Nothing is estimated if the file does not exist, or was made with other routing settings or, of
            which a warning is given, with other models.
    """

    def __init__(self, inferer: TestTimeRoutingInferer, output_dir: str, calibration: str = "") -> None:
        self.inferer = inferer
        found = read_calibration(calibration)
        self.calibration = found if found is not None and found.applies_to(inferer) else None
        self.output_dir = Path(output_dir)
        self.reports: dict[str, Mapping[str, Any]] = {}

    def start(self, engine: Engine) -> None:
        """Discard the reports of an earlier run of the engine, and check that the calibration is of its models."""
        self.reports.clear()
        if self.calibration is None:
            return
        network = cast(SupervisedEvaluator, engine).network
        if not self.calibration.made_with({GLOBAL: network.state_dict(), **self.inferer.experts}):
            logger.warning("the calibration was made with other models, so that no Dice is estimated: %s", AGAIN)
            self.calibration = None

    def record(self, engine: Engine) -> None:
        """Record the quality of the masks of this iteration."""
        reports = {}
        for batch, output in served_scans(engine):
            if "report" in output:
                remarks = getattr(batch.get("image"), "meta", {}).get("remarks", "")
                reports[reported_case(batch)] = {**output["report"], "remarks": remarks, **_written(output)}
        if reports:
            self.reports.update(reports)
            self.newest = list(reports)
            self.write()

    def take_back(self) -> None:
        """Remove the row of the last scan, whose mask could not be written."""
        for case in self.newest:
            del self.reports[case]
        (self.output_dir / "review.csv").unlink(missing_ok=True)
        self.write()

    def write(self) -> None:
        """Write ``review.csv``, with the masks to check first at the top."""
        usual = getattr(self.inferer, "usual_shift", 0)  # inferers of other methods do not measure a shift
        rows = review_rows(self.reports, LARGE_SHIFT * usual or math.inf, self.calibration)
        if rows:
            write_rows(self.output_dir / "review.csv", COLUMNS, rows)


def _written(output: Mapping[str, Any]) -> dict[str, bool]:
    """Return whether the mask is empty or reaches the border of the scan; nothing if the output consists of logits."""
    mask = output.get("pred")
    if not isinstance(mask, torch.Tensor) or mask.is_floating_point():
        return {}
    mask = mask.squeeze().cpu()  # one transfer for all that follows; a single slice has no border across it
    borders = [mask.select(axis, end).any() for axis in range(mask.ndim) for end in (0, -1)]
    return {"empty": not mask.any(), "cut": bool(torch.stack(borders).any()) if borders else False}


def review_rows(
    reports: Mapping[str, Mapping[str, Any]], large_shift: float = math.inf, calibration: Calibration | None = None
) -> list[dict[str, Any]]:
    """Return the rows of the list: the worst masks first, masks of equal quality by name.

    Args:
        reports: Case -> report of `TestTimeRoutingInferer`; those with neither ``quality`` nor ``areas`` are left out.
        large_shift: Shift above which a mask should be checked.
        calibration: Calibration that estimates the Dice, except for empty masks, on which all views agree.
    """
    reasons = {case: "; ".join(_reasons(report, large_shift)) for case, report in reports.items()}
    listed = [case for case, report in reports.items() if "quality" in report or "areas" in report]
    known = sorted(listed, key=lambda case: (reports[case].get("quality", 0.0 if reasons[case] else 1.0), case))
    return [
        {
            "rank": rank,
            "case": case,
            "quality": f"{reports[case]['quality']:.4f}" if "quality" in reports[case] else "",
            **_expected(reports[case], reasons[case], calibration),
            "shift": reports[case].get("shift", ""),
            "decision": reports[case].get("decision", ""),
            "reasons": reasons[case],
        }
        for rank, case in enumerate(known, 1)
    ]


def _expected(report: Mapping[str, Any], reasons: str, calibration: Calibration | None) -> dict[str, str]:
    if calibration is None or "quality" not in report or EMPTY in reasons:
        return dict.fromkeys(EXPECTED, "")
    return {name: f"{value:.3f}" for name, value in zip(EXPECTED, calibration.estimate(report["quality"]))}


def _reasons(report: Mapping[str, Any], large_shift: float) -> Iterable[str]:
    if report.get("remarks"):
        yield str(report["remarks"])  # made while the picture was read and cropped
    areas = report.get("areas", ())  # in the network's grid; a small target may disappear in the scan's own grid
    if report.get("empty", bool(areas) and not any(areas)):
        yield EMPTY
    elif any(areas) and not all(areas):
        yield from (f"target {number} is missing" for number, area in enumerate(areas, 1) if not area)
    elif report.get("quality", 1.0) < DISAGREEMENT:
        yield "views disagree"
    if report.get("cut"):
        yield CUT  # the scan may end within the organ
    if report.get("shift", 0) > large_shift:
        yield "large shift"
    if report.get("decision") == "start" and "objective_start" in report:
        yield str(report["reason"])  # why adaptation was rejected


def collect_review(output_dir: str | os.PathLike, method: str = "default") -> None:
    """Write the quality and the true Dice of a comparison's outside cases as its ``review.csv``.

    No file is written if no run has a quality.

    Args:
        output_dir: Folder of the comparison.
        method: Method whose masks are compared.
    """
    rows = []
    for path in sorted(Path(output_dir).glob(f"seed*/outside_*/masks/*/{method}/review.csv")):
        site, run = path.parts[-3], path.parents[3]
        seed, fold = run.parent.name.removeprefix("seed"), run.name.removeprefix("outside_")
        qualities = {row["case"]: row["quality"] for row in read_rows(path)}
        for row in read_rows(run / "metrics.csv"):
            quality = qualities.get(row["case"])
            if (row["site"], row["model"], row["metric"]) == (site, method, "dice") and quality:
                place = {"seed": seed, "fold": fold, "site": site, "case": row["case"]}
                rows.append({**place, "quality": quality, "dice": row["value"]})
    if rows:
        write_rows(Path(output_dir) / "review.csv", COLLECTED, rows)
