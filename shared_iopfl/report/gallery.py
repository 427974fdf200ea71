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
"""The gallery of the report: the best, the median and the worst case of each site with outlines."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from shared_iopfl.evaluation.scores import Scores, show
from shared_iopfl.report import pictures
from shared_iopfl.report.documents import Block, Heading, Text
from shared_iopfl.report.pages import picture
from shared_iopfl.utils.tables import read_rows

logger = logging.getLogger(__name__)


def overlays_section(output_dir: Path, dice: Scores, colour: Mapping[str, str]) -> list[Block]:
    """A row of pictures per site: of the personalised model at inside sites, of the routed network at outside sites.

    Args:
        output_dir: Folder of a run. Without a ``cases.csv`` the result is empty.
        dice: Dice of the run, from which the cases are chosen.
        colour: Colour of each model.
    """
    cases: dict[tuple[str, str], dict[str, dict[str, dict[str, str]]]] = {}
    for row in read_rows(output_dir / "cases.csv", "site role case model image label mask"):
        if row["image"] and row["mask"]:
            cases.setdefault((row["role"], row["site"]), {}).setdefault(row["model"], {})[row["case"]] = row
    blocks: list[Block] = []
    caption = ""
    for (role, site), by_model in sorted(cases.items(), key=lambda item: item[0][0]):
        wanted = "personalised" if role == "inside" else "routed"
        model = next(name for name in (wanted, "global", *by_model) if name in by_model)
        views, left_out = [], []
        for what, case in best_median_worst(dice.get((role, site), {}).get(model, {}), list(by_model[model])):
            row, common = by_model[model][case], by_model.get("global", {}).get(case)
            masks = {"reference": row["label"], model: row["mask"], "global": common["mask"] if common else ""}
            paths = {name: output_dir / file for name, file in masks.items() if file}
            values = {m: dice.get((role, site), {}).get(m, {}).get(case, math.nan) for m in (model, "global")}
            title = f"{what}: {case}" if what else case
            if math.isfinite(values[model]):
                title += f"\nDice {show('dice', values[model])}"
                title += f" (global {show('dice', values['global'])})" if model != "global" and common else ""
            try:
                images = pictures.load_case(output_dir / row["image"], paths)
                views += pictures.case_views(images, model, title, disagreement=what == "worst")
            except ValueError as error:  # the log says which file; the report shows no paths
                logger.warning("left out of the report: %s", error)
                left_out.append(case)
        blocks.append(Heading(site, 3, note=f"{role}, {model} model"))
        if views:
            blocks.append(picture(pictures.overlay_picture(views, model, colour)))
            caption = caption or _overlay_caption(views[0].case)
        blocks += left_out_note(left_out)
    return blocks and [Heading("Cases: best, median, worst"), Text(caption, "caption"), *blocks]


def left_out_note(cases: Sequence[str]) -> list[Block]:
    """A note that names the cases that could not be drawn; empty if all could."""
    text = f"Left out because files are missing or do not match: {', '.join(cases)}."
    return [Text(text, "caption")] if cases else []


def best_median_worst(dice: Mapping[str, float], cases: Sequence[str]) -> list[tuple[str, str]]:
    """``(what, case)`` for up to three different cases; without scores the first three, with an empty `what`."""
    ranked = sorted((c for c in cases if math.isfinite(dice.get(c, math.nan))), key=lambda c: dice[c], reverse=True)
    if not ranked:
        return [("", case) for case in cases[:3]]
    chosen = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    names = {1: ["best"], 2: ["best", "worst"]}.get(len(ranked), list(chosen))
    return [(name if len(ranked) > 1 else "", chosen[name]) for name in names]


def _overlay_caption(case: pictures.CaseImages) -> str:
    outlines = "Outlines of the site's model, the reference and (dashed) the global model, where available."
    if not case.is_volume:
        return f"{outlines} Every class is outlined, the inner one inside the outer one."
    return (
        f"{outlines} Axial slice with the largest reference area; for the worst case also the one with the largest "
        "disagreement. The patient's right (R) is on the left, anterior is up; slices are counted from the feet."
    )
