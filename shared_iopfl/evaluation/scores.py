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
"""The scores of a run: read from ``metrics.csv``, grouped by site, compared by case, and printed as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_iopfl.evaluation.intervals import case_interval, resampled_means
from shared_iopfl.utils import reading
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import aligned, read_rows

DASH, MINUS = "\u2013", "\u2212"
ROLES = ("inside", "outside")
MODELS = ("global", "personalised", "soup", "routed")  # the first columns, in this order
SiteScores = Mapping[str, Mapping[str, float]]  # {model: {case: value}}, NaN if undefined
# {(role, site): {model: {case: value}}}: inside sites first, models in the order of the columns
Scores = dict[tuple[str, str], dict[str, dict[str, float]]]


def number(text: Any, path: Path) -> float:
    """Return the number in a cell of a CSV file, NaN if it is empty.

    Args:
        text: Text of the cell.
        path: Path of the file, for the message.

    Raises:
        InputError: If the text is not a number.
    """
    try:
        return float(text) if text not in (None, "", "None") else math.nan
    except ValueError:
        raise InputError(f"{path}: {text!r} is not a number: correct or delete this row") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the contents of a JSON file, or an empty dictionary if it does not exist."""
    content = reading.read_json(path) if path.exists() else {}
    return content if isinstance(content, dict) else {}


def in_order(models: Iterable[str]) -> list[str]:
    """Return each model once: the models of the method first, then the others in the given order."""
    found = dict.fromkeys(models)
    return [model for model in MODELS if model in found] + [model for model in found if model not in MODELS]


def read_scores(output_dir: Path) -> dict[str, Scores]:
    """Return the contents of ``metrics.csv`` by metric; if a case was scored repeatedly, its last value counts.

    Raises:
        InputError: If a row has an unknown role or a value that is not a number.
    """
    path = output_dir / "metrics.csv"
    found: dict[str, Scores] = {}
    rows = read_rows(path, "site role case model metric value")
    for row in rows:
        if row["role"] not in ROLES:
            raise InputError(
                f"{path}: role {row['role']!r} is neither 'inside' nor 'outside': correct or delete this row"
            )
    models = in_order(row["model"] for row in rows)
    for row in sorted(rows, key=lambda row: (ROLES.index(row["role"]), models.index(row["model"]))):
        by_model = found.setdefault(row["metric"], {}).setdefault((row["role"], row["site"]), {})
        by_model.setdefault(row["model"], {})[row["case"]] = number(row["value"], path)
    return found


def heading(metric: str) -> str:
    """Return the heading of a metric: "dice cup (%)" for ``dice_cup``, "hd95 (mm)" for ``hd95_mm``."""
    unit = " (%)" if metric.startswith("dice") else " (mm)" if metric.endswith("_mm") else ""
    return metric.removesuffix("_mm").replace("_", " ") + unit


def best_of(metric: str) -> Callable[[Iterable[float]], float] | None:
    """Return the function that selects the best of several means: max for Dice, min for distances and errors.

    It is None for other metrics.
    """
    return max if metric.startswith("dice") else min if metric.endswith(("_mm", "_error")) else None


def finite(values: Iterable[float]) -> list[float]:
    """Return the finite values."""
    return [value for value in values if math.isfinite(value)]


def finite_mean(values: Iterable[float]) -> float:
    """Return the mean of the finite values; NaN without any."""
    defined = finite(values)
    return float(np.mean(defined)) if defined else math.nan


def show(metric: str, value: float, sign: str = "") -> str:
    """Return a value as text: Dice in percent, other metrics in their own unit, undefined values as a dash."""
    if not math.isfinite(value):
        return DASH
    percent = metric.startswith("dice")
    digits = 1 if percent else 2 if metric.endswith("_mm") else 3
    return f"{100 * value if percent else value:{sign}.{digits}f}".replace("-", MINUS)


def table_rows(scores: Scores) -> list[tuple[str, str, list[dict[str, dict[str, float]]], dict[str, float]]]:
    """Return a row for each site and, after the sites of a role, their mean as site "".

    A row is ``(role, site, scores, {model: mean})``, with a list of the scores of its sites. The mean row gives all
    sites the same weight and contains only models that all its sites have, as others are not comparable.
    """
    table = []
    for role in ROLES:
        sites = {site: by_model for (its_role, site), by_model in scores.items() if its_role == role}
        means = {site: {model: finite_mean(v.values()) for model, v in s.items()} for site, s in sites.items()}
        table += [(role, site, [sites[site]], means[site]) for site in sites]
        shared = [m for m in in_order(m for s in means.values() for m in s) if all(m in s for s in means.values())]
        if sites:
            mean = {model: float(np.mean([s[model] for s in means.values()])) for model in shared}
            table.append((role, "", list(sites.values()), mean))
    return table


def count_cases(sites: Sequence[SiteScores]) -> int:
    """Return the number of cases on which any model was scored."""
    return sum(len({case for values in by_model.values() for case in values}) for by_model in sites)


def difference(sites: Sequence[SiteScores], model: str, other: str) -> tuple[float, ...]:
    """Return the mean over sites of the paired difference, its 95% bootstrap interval and the number of cases.

    The interval is NaN with too few cases, in all or at a site; all values are NaN if a site has no common case.

    Args:
        sites: Scores of the sites.
        model: Model of interest.
        other: Model that is subtracted.
    """
    paired = [[s.get(model, {}).get(case, math.nan) - v for case, v in s.get(other, {}).items()] for s in sites]
    gains = [np.array(finite(differences)) for differences in paired]
    if not gains or not all(map(len, gains)):
        return math.nan, math.nan, math.nan, 0
    mean = np.mean([of_site.mean() for of_site in gains])  # all sites have the same weight
    return float(mean), *case_interval(gains, resampled_means(gains)), sum(map(len, gains))


def print_table(output_dir: str | Path, metric: str = "dice") -> str:
    """Print a table of sites by models: the mean over a site's test cases, Dice in percent.

    Args:
        output_dir: Folder of a run, with its ``metrics.csv``.
        metric: Metric of that file, such as ``dice`` or ``hd95_mm``.

    Returns:
        The printed text: inside sites and their mean, then outside sites and theirs. The mean gives all sites the same
        weight. ``n`` is the number of a site's cases, and a dash stands for a value that is undefined or missing. It is
        empty for a federation without test cases.

    Raises:
        InputError: If ``metrics.csv`` does not exist, or does not contain the metric.
    """
    found = read_scores(Path(output_dir))
    if not found and (Path(output_dir) / "history.csv").exists():
        return ""
    if metric not in found:
        advice = f"metric {metric!r}: choose one of {', '.join(found)}" if found else "scores: evaluate the run first"
        raise InputError(f"{Path(output_dir) / 'metrics.csv'} has no {advice}")
    models = in_order(model for by_model in found[metric].values() for model in by_model)
    lines = [[heading(metric), "role", *models, "n"]]
    for role, site, sites, means in table_rows(found[metric]):
        cells = [show(metric, means.get(model, math.nan)) for model in models]
        lines.append([site or "mean of sites", role, *cells, str(count_cases(sites))])
    text = "\n".join(aligned(lines, left=(0, 1)))
    print(text)
    return text
