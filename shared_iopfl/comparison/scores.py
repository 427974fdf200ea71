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
"""The scores of a comparison: ``comparison.csv`` read and checked, means by site, and paired differences by case.

Every case counts once: its scores are averaged over seeds, and the bootstrap draws all its seeds together. Every site
has the same weight. The scores are arrays ``(method, seed, case)``, for which pandas would not make the code shorter.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from shared_iopfl.evaluation.intervals import case_interval, resampled_means, site_interval
from shared_iopfl.evaluation.scores import ROLES, number
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import read_rows

WIN = 0.005  # Dice: smaller differences are ties
EXPERT = "expert "
COMPARED = (*ROLES, "virtual")  # virtual: inside test cases, transformed by a virtual scanner
MEAN_EXPERT, BEST_EXPERT = "mean expert", "best expert (hindsight)"
_DIGITS = 9  # rounds off errors of binary fractions

_Values = dict[tuple[str, str], float]  # {(seed, case): value}, of one method on one site


@dataclass(frozen=True)
class Difference:
    """A paired difference between two methods.

    Attributes:
        mean: Mean over sites of the mean over cases.
        low, high: 95% bootstrap interval over cases of these sites; NaN with too few cases (see `case_interval`).
        cases: Number of cases.
        new_low, new_high: 95% bootstrap interval over sites, for statements about new sites; NaN with fewer than three
            sites (see `site_interval`).
    """

    mean: float
    low: float
    high: float
    cases: int
    new_low: float = math.nan
    new_high: float = math.nan

    @property
    def verdict(self) -> str:
        """ "better" or "worse" if the interval excludes 0, "tie" if it is within half a point of 0, else "unclear"."""
        if not math.isfinite(self.low):
            return "too few cases"
        if self.low > 0 or self.high < 0:
            return "better" if self.low > 0 else "worse"
        return "tie" if max(-self.low, self.high) <= WIN else "unclear"


@dataclass(frozen=True)
class Site:
    """Scores of one site; `values` has the shape ``(method, seed, case)``, NaN if a seed did not test a case."""

    cases: list[str]
    values: np.ndarray

    @cached_property
    def by_case(self) -> np.ndarray:
        """Mean over seeds, ``(method, case)``."""
        return np.nanmean(self.values, axis=1)


@dataclass
class RoleScores:
    """One metric of all methods on all sites of a role.

    Attributes:
        methods: Methods, in the order of the first axis of the arrays.
        seeds: Seeds, in the order of the second axis.
        sites: Name of a site -> its scores.
        folds: Number of folds; outside, number of sites left out.
        best_experts: site -> the expert that is best there in hindsight.
        undefined: method -> number of undefined values, such as a distance to an empty mask. A value that is undefined
            for one method is left out for all.
    """

    methods: list[str]
    seeds: list[str]
    sites: dict[str, Site]
    folds: int
    best_experts: dict[str, str] = field(default_factory=dict)
    undefined: dict[str, int] = field(default_factory=dict)

    @property
    def cases(self) -> int:
        """How many cases there are at all sites together."""
        return sum(len(site.cases) for site in self.sites.values())

    @cached_property
    def site_means(self) -> np.ndarray:
        """Mean of each method on each site, ``(method, site)``."""
        return np.round(np.stack([site.by_case.mean(1) for site in self.sites.values()], axis=1), _DIGITS)

    @cached_property
    def seed_means(self) -> np.ndarray:
        """Mean of sites of each method with each seed, ``(method, seed)``."""
        means = np.full((len(self.sites), len(self.methods), len(self.seeds)), math.nan)
        for mean, site in zip(means, self.sites.values()):
            tested = np.isfinite(site.values).any((0, 2))
            mean[:, tested] = np.nanmean(site.values[:, tested], axis=2)
        return np.nanmean(means, axis=0)

    @cached_property
    def resampled(self) -> np.ndarray:
        """Means by site with the cases of each site resampled, ``(resample, method, site)``."""
        return resampled_means([site.by_case for site in self.sites.values()])

    def at(self, method: str) -> int:
        """Index of a method in the arrays."""
        return self.methods.index(method)

    def mean(self, method: str) -> float:
        """Mean of sites."""
        return float(self.site_means[self.at(method)].mean())

    def spread(self, method: str) -> float:
        """Standard deviation over seeds of the mean of sites, NaN with one seed."""
        return float(np.std(self.seed_means[self.at(method)], ddof=1)) if len(self.seeds) > 1 else math.nan

    def difference(self, method: str, other: str, site: str | None = None) -> Difference:
        """How much higher a method scores than another one, on the mean of sites or on one of them."""
        names = list(self.sites)
        chosen = [names.index(site)] if site is not None else list(range(len(names)))
        one, two = self.at(method), self.at(other)
        mean = float((self.site_means[one] - self.site_means[two])[chosen].mean())
        cases = sum(len(self.sites[names[i]].cases) for i in chosen)
        gains = [self.sites[names[i]].by_case[one] - self.sites[names[i]].by_case[two] for i in chosen]
        low, high = case_interval(gains, (self.resampled[:, one] - self.resampled[:, two])[:, chosen])
        new = site_interval(np.array([of_site.mean() for of_site in gains]))
        return Difference(_exact(mean), _exact(low), _exact(high), cases, *map(_exact, new))

    def wins_and_losses(self, method: str, other: str) -> tuple[int, int]:
        """Number of cases on which a method is more than half a point above another one, and below it."""
        gains = np.concatenate([self.gains(method, other, site).ravel() for site in self.sites.values()])
        return int((gains > WIN).sum()), int((gains < -WIN).sum())

    def gains(self, method: str, other: str, site: Site) -> np.ndarray:
        """Difference of each case, ``(case,)``."""
        return np.round(site.by_case[self.at(method)] - site.by_case[self.at(other)], _DIGITS)

    def largest_loss(self, method: str, other: str) -> tuple[float, str, str]:
        """The most negative difference of a single mask (a case with one seed), with its site and case."""
        found = []
        for name, site in self.sites.items():
            differences = np.round(site.values[self.at(method)] - site.values[self.at(other)], _DIGITS)
            at = np.unravel_index(np.nanargmin(differences), differences.shape)
            found.append((_exact(differences[at]), name, site.cases[int(at[1])]))
        return min(found)

    def worst_twentieth(self, method: str) -> float:
        """Mean of the worst 5 % of the cases of all sites (at least one), computed per seed and averaged over seeds."""
        masks = np.concatenate([site.values[self.at(method)] for site in self.sites.values()], axis=1)
        means = []
        for of_seed in masks:
            ranked = np.sort(of_seed[np.isfinite(of_seed)])
            if len(ranked):
                means.append(ranked[: math.ceil(len(ranked) / 20)].mean())
        return float(np.mean(means))

    def ranked(self, bounds: Collection[str] = ()) -> list[str]:
        """Methods sorted by their mean of sites, highest first; the bounds come last."""
        return sorted(self.methods, key=lambda method: (method in bounds, -self.mean(method), method))


def _exact(value: float) -> float:
    if math.isnan(value):
        return math.nan  # this very object: tuples that contain it then compare as equal
    return round(float(value), _DIGITS) + 0.0  # adding 0 turns -0.0 into 0.0


def read_comparison(output_dir: str | Path) -> dict[str, dict[str, RoleScores]]:
    """``comparison.csv`` by role and metric, Dice first; the order of its rows does not matter.

    Outside, methods called ``expert <site>`` become two: the mean of all experts, and for each site the expert with the
    highest mean Dice there, which is known only in hindsight.

    Raises:
        InputError: If the file is missing or malformed, or a method lacks a case that others have.
    """
    path = Path(output_dir) / "comparison.csv"
    rows = read_rows(path, "seed fold site role method case metric value")
    if not rows:
        raise InputError(f"{path} holds no scores: run the bundle's compare.json with this folder as output_dir first")
    found: dict[tuple[str, str], dict[str, dict[str, _Values]]] = {}
    folds: dict[str, set[str]] = {role: set() for role in COMPARED}
    for row in rows:
        role, metric, key = row["role"], row["metric"], (row["seed"], row["case"])
        value = number(row["value"], path)
        where = f"{path}: case '{row['case']}' of site '{row['site']}', method '{row['method']}', seed {row['seed']}"
        if role not in COMPARED:
            raise InputError(f"{where}: role {role!r} is none of {', '.join(COMPARED)}: correct or delete this row")
        if metric.startswith("dice") and not (0 <= value <= 1 or math.isnan(value)):
            raise InputError(f"{where}: {metric} {value:g} is not between 0 and 1: correct or delete this row")
        of_method = found.setdefault((role, metric), {}).setdefault(row["site"], {}).setdefault(row["method"], {})
        if key in of_method:
            raise InputError(f"{where}: {metric} stands there twice: delete one of the rows")
        of_method[key] = value
        folds[role].add(row["fold"])
    scores: dict[str, dict[str, RoleScores]] = {}
    for role in COMPARED:
        experts: dict[str, str] = {}
        # Dice first: it decides which expert is the best, also for the other metrics
        for metric in sorted({m for r, m in found if r == role}, key=lambda metric: (metric != "dice", metric)):
            made = _role_scores(found[role, metric], len(folds[role]), role == "outside", experts, path)
            if made.sites:
                scores.setdefault(role, {})[metric] = made
                experts = experts or made.best_experts
        if role in scores and "dice" not in scores[role]:
            raise InputError(f"{path} has no Dice {role}: run the comparison to its end")
    return scores


def _role_scores(
    found: Mapping[str, Mapping[str, _Values]], folds: int, outside: bool, best: Mapping[str, str], path: Path
) -> RoleScores:
    names = {method for of_site in found.values() for method in of_site}
    experts = {name for name in names if outside and name.startswith(EXPERT)}
    methods, seeds = sorted(names - experts), sorted({key[0] for s in found.values() for v in s.values() for key in v})
    folded = bool(experts) and all(experts & {*of_site} for of_site in found.values())
    made = RoleScores(methods + [MEAN_EXPERT, BEST_EXPERT] * folded, seeds, {}, folds)
    for site in sorted(found):
        there = methods + sorted(experts & {*found[site]})
        cases, values = _aligned(found[site], there, seeds, site, path)
        for method in there:
            if count := sum(math.isnan(value) for value in found[site][method].values()):
                made.undefined[method] = made.undefined.get(method, 0) + count
        values[:, np.isnan(values).any(0)] = np.nan
        known = np.isfinite(values).any((0, 1))
        if not known.any():
            continue
        values = values[:, :, known]
        if folded:
            of_experts = values[len(methods) :]
            at = int(np.nanmean(of_experts, axis=1).mean(1).argmax())
            made.best_experts[site] = best.get(site, there[len(methods) + at].removeprefix(EXPERT))
            hindsight = values[there.index(EXPERT + made.best_experts[site])]
            values = np.concatenate([values[: len(methods)], of_experts.mean(0)[None], hindsight[None]])
        made.sites[site] = Site([case for case, keep in zip(cases, known) if keep], values)
    return made


def _aligned(
    found: Mapping[str, _Values], methods: Sequence[str], seeds: Sequence[str], site: str, path: Path
) -> tuple[list[str], np.ndarray]:
    """The cases of a site and its scores as ``(method, seed, case)``, with the same cases for every method."""
    wanted = sorted({key for values in found.values() for key in values})
    cases = sorted({case for _, case in wanted})
    place = {(seed, case): (seeds.index(seed), cases.index(case)) for seed, case in wanted}
    values = np.full((len(methods), len(seeds), len(cases)), math.nan)
    for index, method in enumerate(methods):
        scored = found.get(method, {})
        for seed, case in wanted:
            if (seed, case) not in scored:
                raise InputError(
                    f"{path}: method '{method}' has no score of case '{case}' of site '{site}' (seed {seed}), but "
                    "others have: run the comparison to its end, or delete this method's rows"
                )
            values[index][place[seed, case]] = scored[seed, case]
    return cases, values
