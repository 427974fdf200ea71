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
"""The report of a run: an HTML file and a plain table, made from the files in its folder.

It reads ``metrics.csv``, ``history.csv``, ``cross_site.csv``, ``failures.csv``, ``cases.csv``, ``routes.csv`` with
``routes.json``, and ``run.json``; any of them may be missing. Nothing is computed from scans or networks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_iopfl.evaluation.intervals import FEWEST_CASES, RESAMPLES
from shared_iopfl.evaluation.personalised_verdict import personalised_verdict
from shared_iopfl.evaluation.scores import (
    DASH,
    MINUS,
    ROLES,
    Scores,
    best_of,
    count_cases,
    difference,
    finite,
    heading,
    in_order,
    number,
    read_json,
    read_scores,
    show,
    table_rows,
)
from shared_iopfl.evaluation.scores import (
    print_table as print_table,  # named in configs
)
from shared_iopfl.report import charts, pictures
from shared_iopfl.report.documents import Block, Cell, Heading, OnPage, Row, Settings, Table, Text
from shared_iopfl.report.gallery import overlays_section
from shared_iopfl.report.pages import page, picture, without_path
from shared_iopfl.report.routes import decisions_section, routes_section
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import write_text
from shared_iopfl.utils.names import counted
from shared_iopfl.utils.tables import read_rows

DIFFERENCES = (("personalised", "global"), ("routed", "global"), ("soup", "global"), ("routed", "soup"))


def _row(role: str, site: str, cells: Sequence[Cell], bold: Collection[int] = ()) -> Row:
    """A row of a site, or of the mean of a role's sites."""
    name = site or f"mean of sites {role}"
    return Row(name, cells, frozenset(bold), mean=not site, note=role if site else "")


def _gains(dice: Scores) -> list[Block]:
    """Differences between models, in one table for the inside sites and one for the outside sites."""
    tables: list[Block] = []
    for role in ROLES:
        models = [set(by_model) for key, by_model in dice.items() if key[0] == role]
        pairs = [pair for pair in DIFFERENCES if any({*pair} <= of_site for of_site in models)]
        heads = ["difference (points)", *(f"{model} {MINUS} {other}" for model, other in pairs)]
        found = [row for row in table_rows(dice) if row[0] == role]
        rows = [_row(role, site, [_gain(sites, *pair) for pair in pairs]) for _, site, sites, _ in found]
        tables += [Table(heads, rows)] if pairs else []
    return tables


def _gain(sites: Sequence[Mapping[str, Mapping[str, float]]], model: str, other: str) -> Cell:
    mean, low, high, n = difference(sites, model, other)
    bounds = f"[{show('dice', low, '+')}, {show('dice', high, '+')}]" if math.isfinite(low) else "no interval:"
    return show("dice", mean, "+"), f"{bounds} n = {n}" if n else ""


def _results(scores: Scores, metric: str, colour: Mapping[str, str]) -> list[Block]:
    """Sites by models, in one table for the inside and one for the outside sites, whose models differ."""
    best = best_of(metric)
    blocks: list[Block] = []
    for role in dict.fromkeys(role for role, _ in scores):
        models = in_order(model for key, by_model in scores.items() if key[0] == role for model in by_model)
        rows = []
        for _, site, sites, means in (row for row in table_rows(scores) if row[0] == role):
            defined = finite(means.values())
            winner = show(metric, best(defined)) if best and defined else ""
            shown = [show(metric, means.get(model, math.nan)) for model in models]
            bold = [1 + i for i, text in enumerate(shown) if text == winner]
            spreads = [_spread(metric, sites[0].get(model, {}), count_cases(sites)) if site else "" for model in models]
            rows.append(_row(role, site, [str(count_cases(sites)), *zip(shown, spreads)], bold))
        blocks.append(Table([heading(metric), "n", *models], rows, dots=colour))
    undefined = sum(not math.isfinite(v) for s in scores.values() for values in s.values() for v in values.values())
    if undefined:
        text = (
            f"{undefined} values are undefined ({DASH}), such as a distance to an empty mask. They are left out of the "
            "means; brackets show how many of the cases remain."
        )
        blocks.append(Text(text, "caption"))
    return blocks


def _spread(metric: str, values: Mapping[str, float], cases: int) -> str:
    """The standard deviation over a site's cases, and the number of defined values if not all are."""
    known = finite(values.values())
    parts = [f"± {show(metric, float(np.std(known, ddof=1)))}"] if len(known) > 1 else []
    parts += [f"({len(known)} of {cases})"] if values and len(known) < cases else []
    return " ".join(parts)


def _scores_section(found: dict[str, Scores], colour: Mapping[str, str]) -> list[Block]:
    blocks: list[Block] = []
    if "dice" in found:
        text = (
            "Foreground Dice in percent: mean ± standard deviation over a site's test cases. Bold: the highest mean of "
            "the row. The mean of sites gives every site the same weight. Differences are paired by case, in "
            f"percentage points; brackets give their 95% interval, from {RESAMPLES:,} bootstrap resamples of the cases "
            "within each site. It covers other patients of these sites, but neither other sites nor another training. "
            "With fewer than "
            f"{FEWEST_CASES} cases, or one case at a site, no interval is given and no conclusion should be drawn."
        )
        blocks += [Heading("Dice by site and model"), *_results(found["dice"], "dice", colour), *_gains(found["dice"])]
        blocks.append(Text(text, "caption"))
        sites = {f"{site} ({role})": by_model for (role, site), by_model in found["dice"].items()}
        caption = (
            "Each dot is one case, each bar a model's mean. Grey lines join the results of the same case: "
            "if a line rises from one model to the next, the second model is better for this patient."
        )
        blocks += [Heading("Every case"), picture(charts.dice_picture(sites, colour), caption)]
    others = [b for metric, s in found.items() if metric != "dice" for b in _results(s, metric, colour)]
    if others:
        caption = "Mean ± standard deviation over cases. Bold: the best mean of the row."
        blocks += [Heading("Other measures"), *others, Text(caption, "caption")]
    return blocks


def _curves_section(history: Sequence[Mapping[str, str]], path: Path, colour: Mapping[str, str]) -> list[Block]:
    blocks: list[Block] = []
    for metric, label, scale, caption in (
        ("val_mean_dice", "validation Dice (%)", 100, "Dice on each site's own validation cases over the rounds."),
        ("train_loss", "training loss", 1, "Mean training loss of each site's local training in every round."),
    ):
        sites: dict[str, dict[str, dict[float, float]]] = {}
        for row in (row for row in history if row["metric"] == metric):
            points = sites.setdefault(row["site"], {}).setdefault(row["model"], {})
            points[number(row["round"], path)] = scale * number(row["value"], path)
        if sites:
            curves = {s: {m: sorted(by_model[m].items()) for m in in_order(by_model)} for s, by_model in sites.items()}
            blocks.append(picture(charts.curves_picture(curves, colour, label), caption))
    blocks += _rates(history, path, colour)
    seconds = finite(number(row["value"], path) for row in history if row["metric"] == "seconds")
    if seconds:
        blocks.append(Text(f"Median time of a site's round: {np.median(seconds):.3g} seconds.", "caption"))
    return blocks and [Heading("Learning curves"), *blocks]


def _rates(history: Sequence[Mapping[str, str]], path: Path, colour: Mapping[str, str]) -> list[Block]:
    """The learning rate, in a single panel if all sites had the same."""
    by_site: dict[str, dict[float, float]] = {}
    for row in (row for row in history if row["metric"] == "learning_rate"):
        by_site.setdefault(row["site"], {})[number(row["round"], path)] = number(row["value"], path)
    alike: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for site, points in by_site.items():
        alike.setdefault(tuple(sorted(points.items())), []).append(site)
    panels = {", ".join(sites): {"local": points} for points, sites in alike.items()}
    caption = "Learning rate of the local training, at the end of each round."
    return [picture(charts.curves_picture(panels, colour, "learning rate"), caption)] if panels else []


def _cross_site_section(path: Path) -> list[Block]:
    """Scores of each model at the other sites: a row per model, a column per site."""
    dice = {(row["model"], row["site"]): number(row["dice"], path) for row in read_rows(path, "model site dice")}
    models, sites = (list(dict.fromkeys(names)) for names in zip(*dice)) if dice else ([], [])
    if len(sites) < 2:
        return []
    rows = [Row(m, [show("dice", dice.get((m, site), math.nan)) for site in sites]) for m in models]
    text = (
        "Dice in percent of each site's model, named after its site, on the validation cases of all sites. A "
        "personalised model is not scored at its own site, because it was selected with these validation cases."
    )
    table = Table(["model", *(f"at {site}" for site in sites)], rows)
    return [Heading("Models at other sites"), table, Text(text, "caption")]


def _failures_section(path: Path) -> list[Block]:
    """The rounds that continued without a site, and the reasons."""
    found = read_rows(path, "round site reason")
    rows = [Row(row["round"], [row["site"], without_path(row["reason"])]) for row in found]
    text = (
        "An update that failed or was refused is not used in that round; if the scoring of a site failed, the site has "
        "no scores for that round. The other sites continued. A site with later results has rejoined."
    )
    table = Table(["round", "site", "reason"], rows, text=True)
    return [Heading("Rounds without a site"), table, Text(text, "caption")] if rows else []


def _settings(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as flat pairs of name and value."""
    if isinstance(value, dict) and value:
        return [
            pair for key, inner in value.items() for pair in _settings(inner, f"{name}.{key}" if name else str(key))
        ]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [(without_path(name), without_path(text))]


def run_section(run: Mapping[str, Any]) -> list[Block]:
    """The settings of a run, from its ``run.json``."""
    pairs = [pair for pair in _settings(run) if pair[0]]
    return [OnPage([Heading("What was run"), Settings(pairs)])] if pairs else []


_FILES = {
    "metrics.csv": "scores",
    "history.csv": "learning curves",
    "**/routes.csv": "routes",
    "cases.csv": "cases on their scans",
    "**/routes.json": "decisions of the guard",
    "run.json": "what was run",
}


def write_report(output_dir: str | Path, title: str = "IOP-FL") -> Path:
    """Write ``report.html`` of a run into its folder: one file that loads nothing from elsewhere.

    Args:
        output_dir: Folder of a run with any of ``metrics.csv``, ``history.csv``, ``failures.csv``, ``cases.csv``,
            ``run.json``, and, at any depth, ``routes.csv`` and ``routes.json``. A part of the report whose file is
            missing is left out.
        title: Heading of the report.

    Returns:
        Path of the report.

    Raises:
        InputError: If there is neither ``metrics.csv`` nor ``history.csv``, or a file is malformed.
    """
    output_dir = Path(output_dir)
    found = read_scores(output_dir)
    history_path = output_dir / "history.csv"
    history = read_rows(history_path, "round site model metric value")
    if not found and not history:
        raise InputError(
            f"{output_dir} has neither metrics.csv nor history.csv: run the bundle's federate.json or evaluate.json "
            "with this folder as output_dir first"
        )
    of_history = (row["model"] for row in history)
    colour = pictures.colours([*(m for scores in found.values() for s in scores.values() for m in s), *of_history])
    dice = found.get("dice", {})
    missing = [
        f"{file.removeprefix('**/')} ({what})" for file, what in _FILES.items() if not any(output_dir.glob(file))
    ]
    use = "Figures are foreground Dice of held-out patients. For research use only, not for diagnosis."
    blocks: list[Block] = [Text(_facts(found, history), "facts"), Text(use, "use")]
    if verdict := personalised_verdict(output_dir):
        blocks.append(Text(f"{verdict[:1].upper()}{verdict[1:]}.", "missing", bold=True))
    if missing:
        blocks.append(Text(f"Not shown, as the files are not in this folder: {', '.join(missing)}.", "missing"))
    blocks += [
        *_scores_section(found, colour),
        *_curves_section(history, history_path, colour),
        *_cross_site_section(output_dir / "cross_site.csv"),
        *_failures_section(output_dir / "failures.csv"),
        *routes_section(output_dir),
        *overlays_section(output_dir, dice, colour),
        *decisions_section(output_dir),
        *run_section(read_json(output_dir / "run.json")),
    ]
    path = output_dir / "report.html"
    write_text(path, page(title, blocks))
    return path


def _facts(found: Mapping[str, Scores], history: Sequence[Mapping[str, str]]) -> str:
    """The numbers of sites, cases and the like behind the scores, in one line."""
    sites = {site for scores in found.values() for site in scores}
    cases = {
        (s, c) for scores in found.values() for (_, s), m in scores.items() for values in m.values() for c in values
    }
    counts = [(sum(r == role for r, _ in sites), "site", f" {role}") for role in ROLES]
    counts += [(len(cases), "test case", ""), (len({row["round"] for row in history}), "round", "")]
    return " · ".join(counted(n, what) + where for n, what, where in counts if n)
