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
"""The report of a comparison: ``comparison.md``, ``report.html`` and a short table.

It reads files only, no scans or networks. Every file except ``comparison.csv`` may be missing; the part of the report
that needs it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shared_iopfl.comparison.cases import Shifts, cases_section, read_shifts
from shared_iopfl.comparison.scores import BEST_EXPERT, read_comparison
from shared_iopfl.comparison.tables import LABELLED, POOLED, Contest, choices_table, facts, interval, reading_notes
from shared_iopfl.evaluation.scores import DASH, read_json, show
from shared_iopfl.report import charts
from shared_iopfl.report.documents import Block, Bullets, Heading, OnPage, Text, markdown
from shared_iopfl.report.pages import page, picture
from shared_iopfl.report.run import run_section
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import write_text
from shared_iopfl.utils.tables import aligned

REFERENCE = {"inside": "FedAvg", "outside": "global", "virtual": "FedAvg"}
OWN = {"inside": "personalised", "outside": "default"}
BOUNDS = (LABELLED, POOLED)
_USE = "Figures are foreground Dice of held-out patients. For research use only, not for diagnosis."

_SHIFT = (
    "The shift is the scan's distance from the global model, measured without labels. Ideally, routing gains where "
    "the shift is large and changes nothing where there is none."
)


def write_comparison(output_dir: str | Path, bounds: Sequence[str] = BOUNDS, title: str = "Comparison") -> Path:
    """Write ``comparison.md`` and ``report.html`` of a comparison into its folder.

    Args:
        output_dir: Folder with ``comparison.csv`` and, optionally, ``choices.json``, ``run.json`` and the folders of
            the runs, ``seed<k>/<role>_<fold>/``, whose ``cases.csv`` and ``masks/`` supply the pictures.
        bounds: Methods that used labels or hindsight: shown in italics and never named the best.
        title: Heading of both files.

    Returns:
        Path of ``report.html``.

    Raises:
        InputError: If ``comparison.csv`` is missing or malformed, a method lacks a case that others have, or the
            reference is not among the methods.
    """
    output_dir = Path(output_dir)
    contests = _contests(output_dir, bounds)
    shifts = [read_shifts(output_dir, contest) for contest in contests]
    items = [item for c, s in zip(contests, shifts) for item in [*c.in_short(), *(s.in_short() if s else [])]]
    blocks: list[Block] = [Text(facts(contests), "facts"), Text(_USE, "use")]
    blocks += [Heading("In short"), Bullets(items)] if items else []
    for contest, measured in zip(contests, shifts):
        blocks += _role_blocks(output_dir, contest, measured)
    choices, trainings = choices_table(output_dir), choices_table(output_dir, "federations.json")
    if trainings:
        why = "Mean Dice of each training's global model at the other sites, each left out in turn. Bold: highest."
        blocks += [Heading("Training that the other sites would choose"), trainings, Text(why, "caption")]
    if choices:
        why = "Mean Dice of each candidate when each of the other sites is left out in turn. Bold: highest."
        blocks += [Heading("Settings chosen without the site left out"), choices, Text(why, "caption")]
    notes = Text(reading_notes(any(contest.bounds & {*contest.dice.methods} for contest in contests)), "caption")
    blocks += [Heading("How to read this"), notes, *run_section(read_json(output_dir / "run.json"))]
    write_text(output_dir / "comparison.md", markdown(title, blocks))
    write_text(output_dir / "report.html", page(title, blocks))
    return output_dir / "report.html"


def _contests(output_dir: Path, bounds: Sequence[str]) -> list[Contest]:
    contests = []
    for role, metrics in read_comparison(output_dir).items():
        methods = metrics["dice"].methods
        if REFERENCE[role] not in methods:
            raise InputError(
                f"{output_dir / 'comparison.csv'} has no method '{REFERENCE[role]}' {role}, to which the others are "
                f"compared: run it too; there are {', '.join(methods)}"
            )
        ours = OWN.get(role)
        unreachable = frozenset({*bounds, BEST_EXPERT})
        contests.append(Contest(role, metrics, REFERENCE[role], ours if ours in methods else None, unreachable))
    return contests


def _role_blocks(output_dir: Path, contest: Contest, shifts: Shifts | None) -> list[Block]:
    """The tables of a role, and the pictures that only the page shows."""
    blocks: list[Block] = [
        *(Heading(contest.role.capitalize()), Heading("Dice by site", 3), contest.means(), *contest.notes()),
        *(Heading(f"Against {contest.reference}", 3), contest.against_reference(), *_forests(contest)),
    ]
    if table := contest.against_others():
        blocks += [Heading(f"{contest.own} against every other method", 3), table]
    if table := contest.by_site(shifts.means() if shifts else {}):
        blocks += [Heading(f"{contest.own} site by site", 3), table]
        blocks += [Text(_SHIFT, "caption"), shifts.picture()] if shifts else []
    # a measure that is the same for every method, such as one of the reference masks, does not compare them
    more = [m for m, scores in contest.metrics.items() if m != "dice" and np.ptp(scores.site_means, axis=0).any()]
    blocks += [Heading("Other measures", 3), *map(contest.means, more)] if more else []
    if shown := cases_section(output_dir, contest):
        dashed = "global model" if contest.reference == "global" else f"global model, {contest.reference}"
        caption = (
            f"For each site the mask with the lowest Dice of {contest.own}, and those with the largest gain and the "
            f"largest loss against {contest.reference}. Outlines: {contest.own}, the reference drawn by people and "
            f"(dashed) the {dashed}. Volumes: the axial slice with the largest disagreement, in radiological "
            "convention. 2D pictures: every class is outlined."
        )
        blocks.append(OnPage([Heading(f"Cases {contest.role}", 3), Text(caption, "caption"), *shown]))
    return blocks


def _forests(contest: Contest) -> list[Block]:
    """Charts of the differences to the reference with their intervals, for the mean of sites and for each site."""
    dice = contest.dice
    methods = [method for method in dice.ranked(contest.bounds) if method != contest.reference]
    if not methods:
        return []
    label = f"difference to {contest.reference} (points)"

    def panel(site: str | None = None) -> dict[str, tuple[float, float, float]]:
        found = {method: dice.difference(method, contest.reference, site) for method in methods}
        return {method: (100 * d.mean, 100 * d.low, 100 * d.high) for method, d in found.items()}

    caption = (
        f"Difference to {contest.reference} with its 95% interval; to the right of the line is better. Coloured: "
        f"{contest.own or 'none'}. Hollow: bounds, which used labels or hindsight. Arrow: outside the axis range."
    )
    mean = charts.forest_picture({f"{contest.role}, mean of sites": panel()}, label, contest.colour, contest.bounds)
    blocks: list[Block] = [picture(mean, caption)]
    if len(dice.sites) > 1:
        sites = charts.forest_picture({s: panel(s) for s in dice.sites}, label, contest.colour, contest.bounds)
        blocks.append(picture(sites, "The same differences, site by site."))
    return blocks


def print_comparison(output_dir: str | Path) -> str:
    """Print each method's mean Dice over sites and its difference to the reference with its interval, in percent.

    Our own method is marked with ">", bounds are in brackets. Errors are those of `write_comparison`.

    Returns:
        The text that was printed.
    """
    blocks = []
    for contest in _contests(Path(output_dir), BOUNDS):
        lines = [(f"  {contest.role}", "Dice (%)", f"against {contest.reference} [95% interval]")]
        for method in contest.dice.ranked(contest.bounds):
            name = f"({method})" if method in contest.bounds else method
            found = DASH
            if method != contest.reference:
                found = interval(contest.dice.difference(method, contest.reference))
            mark = ">" if method == contest.own else " "
            lines.append((f"{mark} {name}", show("dice", contest.dice.mean(method)), found))
        blocks.append("\n".join(aligned(lines, left=(0, 2))))
    text = "\n\n".join(blocks)
    print(text)
    return text
