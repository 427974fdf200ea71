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
"""The report of a run: one HTML file, and a table as plain text, from the files that the run left in its folder.

It reads ``metrics.csv``, ``history.csv``, ``cases.csv``, ``routes.csv`` with ``routes.json``, and ``run.json``; any of
them may be missing. Nothing is computed from scans or networks.
"""

from __future__ import annotations

import base64
import csv
import json
import logging
import math
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from shared_iopfl import pictures
from shared_iopfl.errors import InputError

__all__ = ["print_table", "write_report"]

logger = logging.getLogger(__name__)

DASH, MINUS = "\u2013", "\u2212"
ROLES = ("inside", "outside")
MODELS = ("global", "personalised", "routed")  # the columns that come first, in this order
DIFFERENCES = (("personalised", "global"), ("routed", "global"))
FEWEST_CASES, RESAMPLES = 5, 2000  # with fewer cases no interval is given
# {(role, site): {model: {case: value}}}: sites inside first, models in the order of the columns, NaN where undefined
Scores = dict[tuple[str, str], dict[str, dict[str, float]]]


def _number(text: Any, path: Path) -> float:
    try:
        return float(text) if text not in (None, "", "None") else math.nan
    except ValueError:
        raise InputError(f"{path}: {text!r} is not a number: mend or delete this row") from None


def _rows(path: Path, columns: str) -> list[dict[str, str]]:
    """The rows of a CSV file, or none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        lacking = [name for name in columns.split() if name not in (reader.fieldnames or ())]
        if lacking:
            raise InputError(f"{path} lacks the column {lacking[0]!r}: it must have {', '.join(columns.split())}")
        return [{name: row[name] or "" for name in columns.split()} for row in reader]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): mend or delete it") from None
    return content if isinstance(content, dict) else {}


def _in_order(models: Iterable[str]) -> list[str]:
    found = dict.fromkeys(models)
    return [model for model in MODELS if model in found] + [model for model in found if model not in MODELS]


def _scores(output_dir: Path) -> dict[str, Scores]:
    """``metrics.csv`` by metric. A case that was scored again counts once, with its last value."""
    path = output_dir / "metrics.csv"
    found: dict[str, Scores] = {}
    rows = _rows(path, "site role case model metric value")
    for row in rows:
        if row["role"] not in ROLES:
            raise InputError(f"{path}: role {row['role']!r} is neither 'inside' nor 'outside': mend or delete this row")
    models = _in_order(row["model"] for row in rows)
    for row in sorted(rows, key=lambda row: (ROLES.index(row["role"]), models.index(row["model"]))):
        by_model = found.setdefault(row["metric"], {}).setdefault((row["role"], row["site"]), {})
        by_model.setdefault(row["model"], {})[row["case"]] = _number(row["value"], path)
    return found


def _name(metric: str) -> str:
    """A metric's heading: ``dice_cup`` as "dice cup (%)", ``hd95_mm`` as "hd95 (mm)"."""
    unit = " (%)" if metric.startswith("dice") else " (mm)" if metric.endswith("_mm") else ""
    return metric.removesuffix("_mm").replace("_", " ") + unit


def _known(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _mean(values: Iterable[float]) -> float:
    known = _known(values)
    return float(np.mean(known)) if known else math.nan


def _show(metric: str, value: float, sign: str = "") -> str:
    """A value as people read it: Dice in percent, millimetres and others as they are, a dash for what is undefined."""
    if not math.isfinite(value):
        return DASH
    percent = metric.startswith("dice")
    digits = 1 if percent else 2 if metric.endswith("_mm") else 3
    return f"{100 * value if percent else value:{sign}.{digits}f}".replace("-", MINUS)


def _table(scores: Scores) -> list[tuple[str, str, list[dict[str, dict[str, float]]], dict[str, float]]]:
    """A row a site, ``(role, site, [its scores], {model: mean})``; after a role's sites, as site "", their mean.

    The mean row counts every site alike, and holds only models that all its sites have: others are not comparable.
    """
    table = []
    for role in ROLES:
        sites = {site: by_model for (its_role, site), by_model in scores.items() if its_role == role}
        means = {site: {model: _mean(v.values()) for model, v in s.items()} for site, s in sites.items()}
        table += [(role, site, [sites[site]], means[site]) for site in sites]
        shared = [m for m in _in_order(m for s in means.values() for m in s) if all(m in s for s in means.values())]
        if sites:
            mean = {model: float(np.mean([s[model] for s in means.values()])) for model in shared}
            table.append((role, "", list(sites.values()), mean))
    return table


def _count(sites: Sequence[Mapping[str, Mapping[str, float]]]) -> int:
    return sum(len({case for values in by_model.values() for case in values}) for by_model in sites)


def _difference(sites: Sequence[Mapping[str, Mapping[str, float]]], model: str, other: str) -> tuple[float, ...]:
    """Mean over sites of the paired difference, its 95% bootstrap interval over cases, and the number of cases.

    The interval is NaN with fewer than `FEWEST_CASES` cases; everything is, where a site has no case in common.
    """
    paired = [[s.get(model, {}).get(case, math.nan) - v for case, v in s.get(other, {}).items()] for s in sites]
    paired = [_known(differences) for differences in paired]
    values = np.concatenate(paired) if all(paired) else np.zeros(0)
    if not len(values):
        return math.nan, math.nan, math.nan, 0
    weights = np.concatenate([np.full(len(p), 1 / len(p)) for p in paired])  # every site counts alike
    low = high = math.nan
    if len(values) >= FEWEST_CASES:
        drawn = np.random.RandomState(0).randint(len(values), size=(RESAMPLES, len(values)))
        low, high = np.percentile((weights * values)[drawn].sum(1) / weights[drawn].sum(1), (2.5, 97.5))
    return float(np.average(values, weights=weights)), float(low), float(high), len(values)


def print_table(output_dir: str | Path, metric: str = "dice") -> str:
    """Print a table of sites by models: the mean over a site's test cases, Dice in percent.

    Args:
        output_dir: folder of a run, with its ``metrics.csv``.
        metric: a metric of that file, such as ``dice`` or ``hd95_mm``.

    Returns:
        The text that was printed: sites inside and their mean, then sites outside and theirs. The mean counts every
        site alike. ``n`` is the number of a site's cases, and a dash a value that is undefined or absent.

    Raises:
        InputError: when there is no ``metrics.csv``, or the metric is not in it.
    """
    found = _scores(Path(output_dir))
    if metric not in found:
        what = (
            f"no metric {metric!r}: choose one of {', '.join(found)}" if found else "no scores: evaluate the run first"
        )
        raise InputError(f"{Path(output_dir) / 'metrics.csv'} has {what}")
    models = _in_order(model for by_model in found[metric].values() for model in by_model)
    lines = [[_name(metric), "role", *models, "n"]]
    for role, site, sites, means in _table(found[metric]):
        cells = [_show(metric, means.get(model, math.nan)) for model in models]
        lines.append([site or "mean of sites", role, *cells, str(_count(sites))])
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )
    print(text)
    return text


def _breakable(name: str) -> str:
    return escape(name).replace("_", "_<wbr>")


def _line(role: str, site: str, cells: Sequence[str]) -> str:
    kind, name = ("", f"{escape(site)} <small>{role}</small>") if site else (" class=mean", f"mean of sites {role}")
    return f"<tr{kind}><th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _gains(dice: Scores) -> str:
    """How far the method is from the global model, as an HTML table, or nothing."""
    pairs = [pair for pair in DIFFERENCES if any({*pair} <= {*by_model} for by_model in dice.values())]
    heads = "".join(f"<th>{model} {MINUS} {other}</th>" for model, other in pairs)
    lines = [f"<tr><th>difference (points)</th>{heads}</tr>"]
    for role, site, sites, _ in _table(dice):
        cells = []
        for pair in pairs:
            mean, low, high, n = _difference(sites, *pair)
            bounds = f"[{_show('dice', low, '+')}, {_show('dice', high, '+')}]" if n >= FEWEST_CASES else "no interval:"
            cells.append(_show("dice", mean, "+") + (f" <small>{bounds} n = {n}</small>" if n else ""))
        lines.append(_line(role, site, cells))
    return f'<div class="wide"><table>{"".join(lines)}</table></div>' if pairs else ""


def _results(scores: Scores, metric: str, colour: Mapping[str, str]) -> str:
    """Sites by models as HTML, a table for the sites inside and one for those outside: their models are others."""
    best = max if metric.startswith("dice") else min if metric.endswith(("_mm", "_error")) else None
    html = ""
    for role in dict.fromkeys(role for role, _ in scores):
        models = _in_order(model for key, by_model in scores.items() if key[0] == role for model in by_model)
        heads = "".join(f'<th><i style="background:{colour[m]}"></i>{_breakable(m)}</th>' for m in models)
        lines = [f"<tr><th>{escape(_name(metric))}</th><th>n</th>{heads}</tr>"]
        for _, site, sites, means in (row for row in _table(scores) if row[0] == role):
            known = _known(means.values())
            winner = _show(metric, best(known)) if best and known else ""
            cells = [str(_count(sites))]
            for model in models:
                text = _show(metric, means.get(model, math.nan))
                values = list(sites[0].get(model, {}).values()) if site else []
                spread = f"± {_show(metric, float(np.std(_known(values), ddof=1)))}" if len(_known(values)) > 1 else ""
                if values and len(_known(values)) < _count(sites):
                    spread += f" ({len(_known(values))} of {_count(sites)})"
                text = f"<b>{text}</b>" if text == winner else text
                cells.append(text + (spread and f" <small>{spread.strip()}</small>"))
            lines.append(_line(role, site, cells))
        html += f'<div class="wide"><table>{"".join(lines)}</table></div>'
    undefined = sum(not math.isfinite(v) for s in scores.values() for values in s.values() for v in values.values())
    if undefined:
        html += f"""<p class="caption">{undefined} values are undefined ({DASH}), such as a distance to an empty mask,
and left out of the means; in brackets how many of the cases count.</p>"""
    return html


def _picture(figure: Figure, caption: str = "") -> str:
    data = base64.b64encode(pictures.png(figure)).decode()
    width = f"width:{100 * figure.get_figwidth() / pictures.WIDTH:.0f}%"  # text of one size in all pictures
    image = f'<img style="{width}" src="data:image/png;base64,{data}" alt="{caption}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _scores_section(found: dict[str, Scores], colour: Mapping[str, str]) -> str:
    html = ""
    if "dice" in found:
        html += f"""<h2>Dice by site and model</h2>{_results(found["dice"], "dice", colour)}{_gains(found["dice"])}
<p class="caption">Foreground Dice in percent: mean ± standard deviation over a site's test cases. Bold: the highest
mean of the row. The mean of sites counts every site alike. Differences are paired by case, in percentage points; in
brackets their 95% interval from {RESAMPLES:,} bootstrap resamples of the cases. With fewer than {FEWEST_CASES} cases
no interval is given and nothing should be concluded.</p>"""
        sites = {f"{site} ({role})": by_model for (role, site), by_model in found["dice"].items()}
        html += "<h2>Every case</h2>" + _picture(
            pictures.dice_picture(sites, colour),
            "Each dot is one case, each bar a model's mean. Grey lines join the results of one case: "
            "a line that rises from one model to the next is a patient who gains.",
        )
    others = [_results(scores, metric, colour) for metric, scores in found.items() if metric != "dice"]
    if others:
        html += "<h2>Other measures</h2>" + "".join(others)
        html += '<p class="caption">Mean ± standard deviation over cases. Bold: the best mean of the row.</p>'
    return html


def _curves_section(history: Sequence[Mapping[str, str]], path: Path, colour: Mapping[str, str]) -> str:
    html = ""
    for metric, label, scale, caption in (
        ("val_mean_dice", "validation Dice (%)", 100, "Dice on each site's own validation cases after every round."),
        ("train_loss", "training loss", 1, "Mean training loss of each site's local training in every round."),
    ):
        sites: dict[str, dict[str, dict[float, float]]] = {}
        for row in (row for row in history if row["metric"] == metric):
            points = sites.setdefault(row["site"], {}).setdefault(row["model"], {})
            points[_number(row["round"], path)] = scale * _number(row["value"], path)
        if sites:
            curves = {s: {m: sorted(by_model[m].items()) for m in _in_order(by_model)} for s, by_model in sites.items()}
            html += _picture(pictures.curves_picture(curves, colour, label), caption)
    seconds = _known(_number(row["value"], path) for row in history if row["metric"] == "seconds")
    if seconds:
        html += f'<p class="caption">Median time of a site\'s round: {np.median(seconds):.3g} seconds.</p>'
    return html and f"<h2>Learning curves</h2>{html}"


def _group(path: Path, cases: Iterable[str], output_dir: Path) -> str:
    """What the routes of a file belong to: the name of its folder, or of the one above if that is a case's own."""
    folder = path.parent.parent if {*cases} == {path.parent.name} else path.parent
    return "" if folder == output_dir else folder.name


def _routes_section(output_dir: Path) -> str:
    groups: dict[tuple[str, tuple[str, ...]], list[dict[str, str]]] = {}
    for path in sorted(output_dir.glob("**/routes.csv")):
        rows = _rows(path, "case layer expert weight")
        experts = tuple(dict.fromkeys(row["expert"] for row in rows))
        key = _group(path, (row["case"] for row in rows), output_dir), experts
        groups.setdefault(key, []).extend({**row, "weight": str(_number(row["weight"], path))} for row in rows)
    html = ""
    for (name, experts), rows in groups.items():
        if not rows:
            continue
        cases, layers = (list(dict.fromkeys(row[column] for row in rows)) for column in ("case", "layer"))
        weights = np.full((len(cases), len(layers), len(experts)), math.nan)
        for row in rows:
            at = cases.index(row["case"]), layers.index(row["layer"]), experts.index(row["expert"])
            weights[at] = float(row["weight"])
        html += f"<h3>{escape(name)}</h3>" if name else ""
        html += _picture(
            pictures.routes_picture(weights, experts, cases, layers),
            "How much of each expert the routed network took: above by layer, the darker the more; below by case. "
            f"With {len(experts)} experts an even mixture gives each {1 / len(experts):.2f}.",
        )
    return html and f"<h2>Routes</h2>{html}"


def _decisions_section(output_dir: Path) -> str:
    columns = ("decision", "reason", "objective_start", "objective_end", "agreement", "seconds")
    lines, decisions = [], []
    for path in sorted(output_dir.glob("**/routes.json")):
        cases = _json(path).get("cases", {})
        where = escape(_group(path, cases, output_dir))
        for case, facts in cases.items():
            cells = "".join(f"<td>{_fact(facts.get(column))}</td>" for column in columns)
            lines.append(f"<tr><th>{escape(case)}{where and f' <small>{where}</small>'}</th>{cells}</tr>")
            decisions.append(_fact(facts.get("decision")))
    heads = "".join(f"<th>{column.replace('_', ', ')}</th>" for column in ("case", *columns))
    counts = ", ".join(f"{decision} {decisions.count(decision)}" for decision in dict.fromkeys(decisions))
    caption = (
        "For each case, without seeing a label, the guard keeps the adapted routes or goes back to the first ones: "
        f"{counts}. Objective: what adaptation minimises; agreement: Dice between the masks before and after it."
    )
    table = f'<div class="wide"><table class="text"><tr>{heads}</tr>{"".join(lines)}</table></div>'
    return f'<h2>Decisions of the guard</h2>{table}<p class="caption">{caption}</p>' if lines else ""


def _fact(value: Any) -> str:
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    return f"{value:.4g}" if isinstance(value, float) else escape(_without_path(str(value)))


def _overlays_section(output_dir: Path, dice: Scores, colour: Mapping[str, str]) -> str:
    cases: dict[tuple[str, str], dict[str, dict[str, dict[str, str]]]] = {}
    for row in _rows(output_dir / "cases.csv", "site role case model image label mask"):
        if row["image"] and row["mask"]:
            cases.setdefault((row["role"], row["site"]), {}).setdefault(row["model"], {})[row["case"]] = row
    html = caption = ""
    for (role, site), by_model in sorted(cases.items(), key=lambda item: item[0][0]):
        wanted = "personalised" if role == "inside" else "routed"
        model = next(name for name in (wanted, "global", *by_model) if name in by_model)
        views, left_out = [], []
        for what, case in _best_median_worst(dice.get((role, site), {}).get(model, {}), list(by_model[model])):
            row, common = by_model[model][case], by_model.get("global", {}).get(case)
            masks = {"reference": row["label"], model: row["mask"], "global": common["mask"] if common else ""}
            paths = {name: output_dir / file for name, file in masks.items() if file}
            values = {m: dice.get((role, site), {}).get(m, {}).get(case, math.nan) for m in (model, "global")}
            title = f"{what}: {case}" if what else case
            if math.isfinite(values[model]):
                title += f"\nDice {_show('dice', values[model])}"
                title += f" (global {_show('dice', values['global'])})" if model != "global" and common else ""
            try:
                images = pictures.load_case(output_dir / row["image"], paths)
                views += pictures.case_views(images, model, title, disagreement=what == "worst")
            except ValueError as error:  # the log says which file; the report shows no paths
                logger.warning("left out of the report: %s", error)
                left_out.append(case)
        html += f"<h3>{escape(site)} <small>{escape(role)}, {escape(model)} model</small></h3>"
        if views:
            html += _picture(pictures.overlay_picture(views, model, colour))
            caption = caption or _overlay_caption(views[0].case)
        if left_out:
            files = f"Left out, as their files are missing or do not fit each other: {', '.join(left_out)}."
            html += f'<p class="caption">{escape(files)}</p>'
    return html and f'<h2>Cases: best, median, worst</h2><p class="caption">{caption}</p>{html}'


def _best_median_worst(dice: Mapping[str, float], cases: Sequence[str]) -> list[tuple[str, str]]:
    """``(what, case)`` of up to three different cases; without scores the first three, with nothing to call them."""
    ranked = sorted((c for c in cases if math.isfinite(dice.get(c, math.nan))), key=lambda c: dice[c], reverse=True)
    if not ranked:
        return [("", case) for case in cases[:3]]
    chosen = {"best": ranked[0], "median": ranked[len(ranked) // 2], "worst": ranked[-1]}
    names = {1: ["best"], 2: ["best", "worst"]}.get(len(ranked), list(chosen))
    return [(name if len(ranked) > 1 else "", chosen[name]) for name in names]


def _overlay_caption(case: pictures.CaseImages) -> str:
    outlines = "Outlines of the site's model, of the reference and, dashed, of the global model, where there are any."
    if not case.is_volume:
        return f"{outlines} Each class is outlined, the inner one inside the outer."
    return (
        f"{outlines} Axial slice with the largest reference area; for the worst case the one with the largest "
        "disagreement too. The patient's right (R) is on the left, anterior is up; slices are counted from the feet."
    )


def _without_path(text: str) -> str:
    """Text up to its first file path: paths can name patients and machines, and are nobody's business in a report."""
    path = re.search(r"\S*(?:(?:^|[\s\"'(=\[,:~.])[/\\]\S|\w\w[/\\]\w\w)", text)
    return f"{text[: path.start()]}(path not shown)" if path else text


def _settings(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings as flat pairs of name and value."""
    if isinstance(value, dict) and value:
        return [
            pair for key, inner in value.items() for pair in _settings(inner, f"{name}.{key}" if name else str(key))
        ]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [(_without_path(name), _without_path(text))]


def _run_section(run: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _settings(run) if name)
    return f"<h2>What was run</h2><dl>{items}</dl>" if items else ""


_CSS = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #1f2328;
  max-width: 62rem; margin: 2.5rem auto 4rem; padding: 0 1.25rem; background: #fff }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .8rem; padding-bottom: .25rem; border-bottom: 1px solid #d5d9de }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem } h3 small, th small { font-weight: 400; color: #59636e }
p { max-width: 46rem } .facts { color: #59636e } .use { font-weight: 600; max-width: none }
.missing { background: #f6f8fa; border-left: 3px solid #8c959f; padding: .5rem .9rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th, td { padding: .32rem .55rem; text-align: right; font-weight: 400 }
th, td small { white-space: nowrap } td small { display: inline-block } .wide + .wide { margin-top: 1.2rem }
th, td { border-bottom: 1px solid #e6e9ec } th:first-child { text-align: left }
tr:first-child th { font-weight: 600; border-bottom: 1px solid #59636e }
td small { color: #59636e } tr.mean th, tr.mean td { background: #f6f8fa; border-bottom: 1px solid #8c959f }
table.text th, table.text td { text-align: left; vertical-align: top }
tr:first-child th { white-space: normal }
th i { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .35em }
figure { margin: 1rem 0 1.6rem } img { max-width: 100%; height: auto; display: block }
.caption, figcaption { font-size: .88rem; color: #59636e; max-width: 46rem; margin: .5rem 0 1rem }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .15rem 1.5rem; font-size: .9rem }
dt { color: #59636e } dd { margin: 0; overflow-wrap: anywhere }
@media print { body { font-size: 10pt; margin: 0; max-width: none; padding: 0 } h2, h3 { break-after: avoid }
  figure, tr, .missing { break-inside: avoid } .wide { overflow: visible } table { font-size: 8.5pt }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact } @page { size: A4; margin: 16mm 14mm } }
"""

_FILES = {
    "metrics.csv": "scores",
    "history.csv": "learning curves",
    "**/routes.csv": "routes",
    "cases.csv": "cases on their scans",
    "**/routes.json": "decisions of the guard",
    "run.json": "what was run",
}


def write_report(output_dir: str | Path, title: str = "IOP-FL") -> Path:
    """Write ``report.html`` of a run into its folder: one file, with nothing to fetch from elsewhere.

    Args:
        output_dir: folder of a run with any of ``metrics.csv``, ``history.csv``, ``cases.csv``, ``run.json``, and, at
            any depth, ``routes.csv`` and ``routes.json``. A part of the report whose file is missing is left out.
        title: heading of the report.

    Returns:
        Path of the report.

    Raises:
        InputError: when there is neither ``metrics.csv`` nor ``history.csv``, or a file's content is not as it must be.
    """
    output_dir = Path(output_dir)
    found = _scores(output_dir)
    history_path = output_dir / "history.csv"
    history = _rows(history_path, "round site model metric value")
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
    sections = (
        _scores_section(found, colour),
        _curves_section(history, history_path, colour),
        _routes_section(output_dir),
        _overlays_section(output_dir, dice, colour),
        _decisions_section(output_dir),
        _run_section(_json(output_dir / "run.json")),
    )
    left_out = (
        f'<p class="missing">Not in this folder, so not shown: {escape(", ".join(missing))}.</p>' if missing else ""
    )
    html = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_CSS}</style></head><body>
<h1>{escape(title)}</h1>
<p class="facts">{_facts(found, history)}</p>
<p class="use">Figures are foreground Dice of held-out patients. For research use only, not for diagnosis.</p>
{left_out}{"".join(sections)}
</body></html>
"""
    path = output_dir / "report.html"
    unfinished = output_dir / f".report.{uuid.uuid4().hex}.tmp"
    try:
        unfinished.write_text(html, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _facts(found: Mapping[str, Scores], history: Sequence[Mapping[str, str]]) -> str:
    """How much stands behind the figures, in one line."""
    sites = {site for scores in found.values() for site in scores}
    counts = [(sum(r == role for r, _ in sites), f"site{{s}} {role}") for role in ROLES]
    cases = {
        (s, c) for scores in found.values() for (_, s), m in scores.items() for values in m.values() for c in values
    }
    counts += [(len(cases), "test case{s}"), (len({row["round"] for row in history}), "round{s}")]
    return " · ".join(f"{n} {what.format(s='' if n == 1 else 's')}" for n, what in counts if n)
