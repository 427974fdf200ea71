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
"""Single cases of a comparison: the gain against the shift, and pictures of the cases with the largest differences."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from scipy.stats import spearmanr

from shared_iopfl.comparison.scores import Site
from shared_iopfl.comparison.tables import Contest
from shared_iopfl.evaluation.intervals import FEWEST_CASES
from shared_iopfl.evaluation.scores import MINUS, finite_mean, read_json, show
from shared_iopfl.report import charts, pictures
from shared_iopfl.report.documents import Block, Heading, Picture
from shared_iopfl.report.gallery import left_out_note
from shared_iopfl.report.pages import picture
from shared_iopfl.utils.tables import read_rows

logger = logging.getLogger(__name__)


def _runs(output_dir: Path, role: str, file: str) -> Iterator[tuple[str, Path]]:
    """``(seed, path)`` of each file of this name in the runs of a role."""
    for path in sorted(output_dir.glob(f"seed*/{role}_*/{file}")):
        yield path.relative_to(output_dir).parts[0].removeprefix("seed"), path


@dataclass(frozen=True)
class Shifts:
    """The shifts of the scans of each site, and the gain of our own method on them.

    Attributes:
        contest: The methods of the role.
        points: site -> ``(shift, gain)`` of each case with a known shift, averaged over seeds.
    """

    contest: Contest
    points: Mapping[str, list[tuple[float, float]]]

    def means(self) -> dict[str, float]:
        """Mean shift of each site."""
        return {site: float(np.mean(points, axis=0)[0]) for site, points in self.points.items()}

    def in_short(self) -> list[tuple[str, str]]:
        """How the gain depends on the shift, in the form of `Contest.in_short`."""
        shift, gain = np.concatenate([np.asarray(points) for points in self.points.values()]).T
        if len(shift) < FEWEST_CASES or np.ptp(shift) == 0 or np.ptp(gain) == 0:
            return []
        thirds = np.array_split(gain[np.argsort(shift, kind="stable")], 3)
        low, high = (show("dice", float(third.mean()), "+") for third in (thirds[0], thirds[-1]))
        correlation = f"{spearmanr(shift, gain).statistic:.2f}".replace("-", MINUS)
        text = f"{low} points in the third of the cases with the smallest shift, {high} in the third with the largest"
        return [(f"Gain and shift {self.contest.role}", f"{text}; rank correlation {correlation}, n = {len(shift)}.")]

    def picture(self) -> Picture:
        """The gain of each case against its shift."""
        points = {site: [(shift, 100 * gain) for shift, gain in of_site] for site, of_site in self.points.items()}
        label = f"{self.contest.own} \u2212 {self.contest.reference} (points)"
        return picture(charts.gains_picture(points, label), "Each dot is one case, each ring a site's mean.")


def read_shifts(output_dir: Path, contest: Contest) -> Shifts | None:
    """Read the shifts from ``masks/<site>/<own method>/routes.json`` of each run; None if there are none."""
    if contest.own is None or contest.own == contest.reference:
        return None
    shifts: dict[str, dict[str, list[float]]] = {}
    for _, path in _runs(output_dir, contest.role, f"masks/*/{contest.own}/routes.json"):
        for case, report in read_json(path).get("cases", {}).items():
            shift = report.get("shift") if isinstance(report, Mapping) else None
            if isinstance(shift, (int, float)) and math.isfinite(shift):
                shifts.setdefault(path.parent.parent.name, {}).setdefault(case, []).append(float(shift))
    points: dict[str, list[tuple[float, float]]] = {}
    for name, site in contest.dice.sites.items():
        of_site = shifts.get(name, {})
        for case, gain in zip(site.cases, contest.dice.gains(contest.own, contest.reference, site).tolist()):
            # if one network serves the whole site, its single shift is stored under the case name "site"
            known = of_site.get(case) or of_site.get("site")
            if known:
                points.setdefault(name, []).append((finite_mean(known), gain))
    return Shifts(contest, points) if points else None


def cases_section(output_dir: Path, contest: Contest) -> list[Block]:
    """Pictures of three cases per site: the worst one of our own method, and those with the largest gain and loss.

    The result is empty if the runs have no ``cases.csv`` with scans and masks.
    """
    if contest.own is None:
        return []
    files: dict[tuple[str, str, str, str], tuple[Path, dict[str, str]]] = {}
    for seed, path in _runs(output_dir, contest.role, "cases.csv"):
        for row in read_rows(path, "site case model image label mask"):
            if row["image"] and row["mask"] and row["model"] in (contest.own, contest.reference):
                files[seed, row["site"], row["case"], row["model"]] = path.parent, row
    colour = {**pictures.colours(()), **contest.colour}
    blocks: list[Block] = []
    for name, site in contest.dice.sites.items():
        views, left_out = [], []
        for what, seed, case, values in _remarkable(contest, name, site, {key[:3] for key in files}):
            title = f"{what}: {case}" + (f" (seed {seed})" if len(contest.dice.seeds) > 1 else "")
            title += f"\nDice {show('dice', values[0])} ({contest.reference} {show('dice', values[1])})"
            masks = {}
            for key, model in (("global", contest.reference), (contest.own, contest.own)):
                if found := files.get((seed, name, case, model)):
                    folder, row = found
                    masks[key] = folder / row["mask"]
            if row["label"]:
                masks["reference"] = folder / row["label"]
            try:
                images = pictures.load_case(folder / row["image"], masks)
                # show the slice that explains the title: where the reference method was wrong if the case gained
                wrong = "global" if what == "most gained" and "global" in masks else contest.own
                views.append(pictures.case_views(images, wrong, title, disagreement=True)[-1])
            except ValueError as error:  # the log says which file; the report shows no paths
                logger.warning("left out of the report: %s", error)
                left_out.append(case)
        if views or left_out:
            blocks.append(Heading(name, 4))
        if views:
            blocks.append(picture(pictures.overlay_picture(views, contest.own, colour)))
        blocks += left_out_note(left_out)
    return blocks


def _remarkable(
    contest: Contest, name: str, site: Site, there: set[tuple[str, str, str]]
) -> list[tuple[str, str, str, tuple[float, float]]]:
    """``(what, seed, case, (own, reference))`` of up to three different masks whose files are in `there`."""
    methods = (cast(str, contest.own), contest.reference)
    own, reference = (site.values[contest.dice.at(method)] for method in methods)
    found = [
        (seed, case, (float(own[s, c]), float(reference[s, c])))
        for s, seed in enumerate(contest.dice.seeds)
        for c, case in enumerate(site.cases)
        if math.isfinite(own[s, c]) and (seed, name, case) in there
    ]
    chosen: list[tuple[str, str, str, tuple[float, float]]] = []
    for what, rank in (
        (f"worst of {contest.own}", lambda values: values[0]),
        ("most gained", lambda values: values[1] - values[0]),
        ("most lost", lambda values: values[0] - values[1]),
    ):
        left = [entry for entry in found if entry[1] not in {case for _, _, case, _ in chosen}]
        if left:
            seed, case, values = min(left, key=lambda entry: rank(entry[2]))
            if what.startswith("worst") or rank(values) < 0:
                chosen.append((what, seed, case, values))
    return chosen
