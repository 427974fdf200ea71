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
"""The tables and sentences of a comparison, all derived from its scores."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from shared_iopfl.comparison.scores import Difference, RoleScores
from shared_iopfl.evaluation.intervals import FEWEST_CASES, FEWEST_PER_SITE, FEWEST_SITES, RESAMPLES
from shared_iopfl.evaluation.scores import DASH, MINUS, best_of, finite, heading, show
from shared_iopfl.report import pictures
from shared_iopfl.report.documents import Block, Cell, Row, Table, Text
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.names import counted
from shared_iopfl.utils.reading import read_json

LABELLED, POOLED = "labelled routes", "pooled"  # bounds, not methods that a site could use
SMALLEST_GAP = 0.005  # Dice: below it, the fraction of the gap that is closed would be noise
TARGET, HARM = 0.010, 0.003  # Dice: target gain on the mean of sites, largest acceptable loss of a site


def _cell(difference: Difference) -> tuple[str, str]:
    """ "+1.2" and "[+0.8, +1.6]", in points; no interval where there are too few cases."""
    low, high = (show("dice", bound, "+") for bound in (difference.low, difference.high))
    return show("dice", difference.mean, "+"), f"[{low}, {high}]" if math.isfinite(difference.low) else ""


def interval(difference: Difference) -> str:
    """ "+1.2 [+0.8, +1.6]", in points; only the difference where there are too few cases for an interval."""
    return " ".join(_cell(difference)).strip()


def _points(value: float) -> str:
    """Points with two digits, for sentences: a gain of 0.96 is then not rounded to the target of 1.0."""
    return f"{100 * value:.2f}".replace("-", MINUS)


@dataclass(frozen=True)
class Contest:
    """The methods of one role: the reference, our own method and the bounds among them.

    Attributes:
        role: "inside" or "outside".
        metrics: Scores by metric, Dice among them.
        reference: Method to which differences are computed.
        own: Method that is judged against the targets; None if it was not run.
        bounds: Methods that used labels or hindsight: shown, but never named the best.
    """

    role: str
    metrics: Mapping[str, RoleScores]
    reference: str
    own: str | None
    bounds: frozenset[str]

    @property
    def dice(self) -> RoleScores:
        """The Dice scores of this role."""
        return self.metrics["dice"]

    @property
    def colour(self) -> dict[str, str]:
        """The colour of our own method, the same as in the report of a run."""
        kind = "personalised" if self.role == "inside" else "routed"
        return {self.own: pictures.colours(())[kind]} if self.own else {}

    @property
    def rivals(self) -> list[str]:
        """All methods but our own, the best first and the bounds last."""
        return [method for method in self.dice.ranked(self.bounds) if method != self.own]

    def _row(self, method: str, cells: Sequence[Cell], bold: Collection[int] = ()) -> Row:
        bound = method in self.bounds
        return Row(method, cells, frozenset() if bound else frozenset(bold), bound, method == self.own and not bound)

    def means(self, metric: str = "dice") -> Table:
        """Methods by sites: mean of each site, mean of sites, and its standard deviation over seeds."""
        scores = self.metrics[metric]
        best = best_of(metric)
        values = {m: [*scores.site_means[scores.at(m)].tolist(), scores.mean(m)] for m in scores.methods}
        texts = {method: [show(metric, value) for value in row] for method, row in values.items()}
        contenders = [method for method in scores.methods if method not in self.bounds]
        winners = [""] * (len(scores.sites) + 1)
        if best and contenders:
            winners = [show(metric, best(values[m][i] for m in contenders)) for i in range(len(winners))]
        spread = len(scores.seeds) > 1
        rows = []
        for method in self.dice.ranked(self.bounds):
            if method in texts:
                bold = [i for i, text in enumerate(texts[method]) if text == winners[i]]
                seeds = [f"± {show(metric, scores.spread(method))}"] if spread else []
                rows.append(self._row(method, texts[method] + seeds, bold))
        return Table([heading(metric), *scores.sites, "mean of sites", *["sd over seeds"] * spread], rows)

    def against_reference(self) -> Table:
        """Difference of each method to the reference: mean over cases, and worst cases."""
        dice = self.dice
        heads = self._duel_heads
        gap = ["gap to pooled closed"] * (POOLED in dice.methods)
        worst = {m: show("dice", dice.worst_twentieth(m)) for m in dice.methods}
        highest = max((worst[m] for m in dice.methods if m not in self.bounds), key=float, default="")
        rows = []
        for method in dice.ranked(self.bounds):
            cells = [DASH] * (len(heads)) if method == self.reference else self._duel(method, self.reference)
            bold = [len(heads)] if worst[method] == highest else []
            closed = [self._gap_closed(method)] if gap else []
            rows.append(self._row(method, [*cells, worst[method], *closed], bold))
        return Table([f"against {self.reference}", *heads, "worst twentieth", *gap], rows)

    def _gap_closed(self, method: str) -> str:
        """Which fraction of the gap between federated and pooled training a method closes."""
        gap = self.dice.difference(POOLED, self.reference).mean
        if gap < SMALLEST_GAP or method == self.reference:
            return DASH
        return f"{self.dice.difference(method, self.reference).mean / gap:.0%}".replace("-", MINUS)

    def against_others(self) -> Table | None:
        """Difference of our own method to each other one."""
        if self.own is None:
            return None
        rows = [Row(m, self._duel(self.own, m), italic=m in self.bounds) for m in self.rivals]
        return Table([f"{self.own} {MINUS} \u2026", *self._duel_heads], rows)

    def by_site(self, shifts: Mapping[str, float]) -> Table | None:
        """Gain of our own method on each site, sorted by shift if the shifts are known."""
        if self.own is None or self.own == self.reference:
            return None
        heads = ["mean shift"] * bool(shifts)
        rows = []
        for site in sorted(self.dice.sites, key=lambda site: shifts.get(site, math.inf)):
            found = self.dice.difference(self.own, self.reference, site)
            shift = [show("", shifts.get(site, math.nan))] * bool(shifts)
            rows.append(Row(site, [*shift, _cell(found), found.verdict, str(found.cases)]))
        difference = f"{self.own} {MINUS} {self.reference} [95% interval]"
        return Table(["site", *heads, difference, "verdict", "cases"], rows)

    @property
    def _duel_heads(self) -> list[str]:
        """The headings of the cells of `_duel`; the interval over sites needs enough sites."""
        new = ["95% interval for new sites"] * (len(self.dice.sites) >= FEWEST_SITES)
        return ["difference [95% interval]", *new, "verdict", "cases won : lost", "largest loss of a case"]

    def _duel(self, method: str, other: str) -> list[Cell]:
        difference = self.dice.difference(method, other)
        wins, losses = self.dice.wins_and_losses(method, other)
        loss, site, _ = self.dice.largest_loss(method, other)
        at = f"{show('dice', loss, '+')} ({site})" if loss < 0 else "none"
        new = [f"[{show('dice', difference.new_low, '+')}, {show('dice', difference.new_high, '+')}]"]
        new *= len(self.dice.sites) >= FEWEST_SITES
        return [_cell(difference), *new, difference.verdict, f"{wins} : {losses}", at]

    def notes(self) -> list[Block]:
        """Notes below the tables: experts chosen in hindsight, and undefined values."""
        blocks: list[Block] = []
        if self.dice.best_experts:
            sites: dict[str, list[str]] = {}
            for site, expert in self.dice.best_experts.items():
                sites.setdefault(expert, []).append(site)
            chosen = "; ".join(f"{expert} (at {', '.join(at)})" for expert, at in sites.items())
            text = f"Best expert in hindsight: {chosen}. The mean expert is the average over experts picked at random."
            blocks.append(Text(text, "caption"))
        for metric, scores in self.metrics.items():
            if scores.undefined:
                counts = ", ".join(f"{method} {count}" for method, count in scores.undefined.items())
                text = f"{heading(metric)}: values undefined for one method, such as a distance to an empty mask, are"
                blocks.append(Text(f"{text} left out for all methods. Undefined: {counts}.", "caption"))
        return blocks

    def in_short(self) -> list[tuple[str, str]]:
        """What our own method reaches, in sentences: pairs of a topic and its text."""
        if self.own is None or self.own == self.reference:
            return []
        dice, own, reference = self.dice, self.own, self.reference
        gain = dice.difference(own, reference)
        where = f"{_points(abs(gain.mean))} points {'above' if gain.mean > 0 else 'below'}"
        where = where if round(gain.mean, 4) else "level with"
        bounds = f", 95% interval {_points(gain.low)} to {_points(gain.high)}" if math.isfinite(gain.low) else ""
        if math.isfinite(gain.new_low):
            bounds += f", for new sites {_points(gain.new_low)} to {_points(gain.new_high)}"
        met = "met" if gain.mean >= TARGET and gain.low > 0 else "missed"
        target = f"at least {100 * TARGET:.1f} with the interval above 0: {met}"
        if not math.isfinite(gain.low):
            target = f"not judged with fewer than {FEWEST_CASES} cases, or fewer than {FEWEST_PER_SITE} at a site"
        ours, theirs = (f"{100 * dice.mean(method):.2f}" for method in (own, reference))
        found = f"{own} is {where} {reference} ({ours} against {theirs}{bounds})"
        items = [(f"Gain {self.role}", f"{found}. Target, {target}.")]
        rivals = [m for m in self.rivals if m != reference and m not in self.bounds]
        if rivals:
            duel = dice.difference(own, rivals[0])
            text = f"{rivals[0]}; {own} {MINUS} {rivals[0]} is {interval(duel)}: {duel.verdict}"
            items.append((f"Best other method {self.role}", f"{text}."))
        ours, theirs = (show("dice", dice.worst_twentieth(method)) for method in (own, reference))
        items.append((f"Worst twentieth of the cases {self.role}", f"{own} {ours}, {reference} {theirs}."))
        return items + self._harm()

    def _harm(self) -> list[tuple[str, str]]:
        """One line for each site that loses more than acceptable, or one line that says that none does."""
        own = cast(str, self.own)
        harmed = {site: self.dice.difference(own, self.reference, site) for site in self.dice.sites}
        lines = [
            (f"Harm at {site} ({self.role})", f"{self.own} is {interval(found)} points from {self.reference}.")
            for site, found in harmed.items()
            if found.mean < -HARM
        ]
        none = f"no site is more than {100 * HARM:.1f} points below {self.reference}."
        return lines or [(f"No harm {self.role}", none)]


def facts(contests: Sequence[Contest]) -> str:
    """The numbers of sites, cases, seeds and methods behind the scores."""
    parts = []
    for contest in contests:
        dice = contest.dice
        folds = "left out in turn" if contest.role == "outside" else counted(dice.folds, "fold")
        counts = (
            f"{counted(len(dice.sites), 'site')}, {counted(dice.cases, 'case')}, {counted(len(dice.seeds), 'seed')}"
        )
        parts.append(f"{contest.role}: {counts}, {folds}, {counted(len(dice.methods), 'method')}")
    return " \u00b7 ".join(parts) + f" \u00b7 {RESAMPLES:,} resamples"


def reading_notes(bounds: bool) -> str:
    """How to read the tables."""
    text = (
        "Foreground Dice in percent, differences in percentage points. Scores are averaged over the seeds of a case, "
        "then over the cases of a site, then over sites with equal weights. Bold: the highest of its column. "
        f"Differences are paired by case. Their 95% interval comes from {RESAMPLES:,} bootstrap resamples of the cases "
        "within each site, with all seeds of a case together, and is widened for few cases (Student's t). It shows how "
        f"much the value could change with other patients of these sites. It is not given with fewer than "
        f"{FEWEST_CASES} cases, or fewer than {FEWEST_PER_SITE} at a site. "
        "The interval for new sites resamples the sites, each with all its "
        f"cases (given from {FEWEST_SITES} sites on). Neither interval covers the variation between trainings, which "
        "the standard deviation over seeds shows. A Dice is undefined if the reference is empty; it is then left out "
        "for all methods. Verdict, by the first interval: better or worse if it excludes 0; tie if it is within half a "
        "point of 0; otherwise unclear. A case is won or lost by more than half a point. The largest loss "
        "is that of one case with one seed. The worst twentieth is the mean of the worst 5 % of all cases, computed "
        "for each seed. The highlighted method is the one that is judged against the targets."
    )
    bound = " In italics: bounds, which used labels of the outside site, hindsight or the pooled data of the sites."
    return text + bound * bounds


def choices_table(output_dir: Path, name: str = "choices.json") -> Table | None:
    """The choices that were made without the site left out, from ``choices.json`` or a similar file, or None."""
    path = output_dir / name
    if not path.is_file():
        return None
    try:
        choices: list[dict[str, Any]] = read_json(path)
        names = list(dict.fromkeys(name for choice in choices for name in choice["candidates"]))
        rows = []
        for choice in choices:
            means = [choice["candidates"].get(name) for name in names]
            values = [math.nan if mean is None else float(mean) for mean in means]
            best = np.nanmax(values) if finite(values) else math.nan
            bold = frozenset(2 + i for i, value in enumerate(values) if value == best)
            cells = [str(choice["seed"]), str(choice["choice"]), *(show("dice", value) for value in values)]
            rows.append(Row(str(choice["fold"]), cells, bold))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is not a list of choices ({error!r}): correct or delete it") from None
    return Table(["site left out", "seed", "chosen", *names], rows) if rows else None
