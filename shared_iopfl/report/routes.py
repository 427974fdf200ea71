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
"""The section of the report on routes: which experts each case used, and whether adaptation was accepted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from shared_iopfl.evaluation.scores import DASH, number, read_columns, read_json
from shared_iopfl.report import charts
from shared_iopfl.report.pages import picture, table, without_path

__all__ = ["decisions_section", "routes_section"]


def routes_section(output_dir: Path) -> str:
    """The weights of the experts by layer and by case, as HTML, from every ``routes.csv`` below the folder."""
    groups: dict[tuple[str, tuple[str, ...]], list[dict[str, str]]] = {}
    for path in sorted(output_dir.glob("**/routes.csv")):
        rows = read_columns(path, "case layer expert weight")
        experts = tuple(dict.fromkeys(row["expert"] for row in rows))
        key = _group(path, (row["case"] for row in rows), output_dir), experts
        groups.setdefault(key, []).extend({**row, "weight": str(number(row["weight"], path))} for row in rows)
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
        if np.ptp(np.nan_to_num(weights)) < 1e-6:  # the soup: nothing to see
            html += f'<p class="caption">Every expert counts alike in every layer: {weights.flat[0]:.2f}.</p>'
            continue
        html += picture(
            charts.routes_picture(weights, experts, cases, layers),
            "How much of each expert the routed network took: above by layer, the darker the more; below by case. "
            f"With {len(experts)} experts an even mixture gives each {1 / len(experts):.2f}.",
        )
    return html and f"<h2>Routes</h2>{html}"


def decisions_section(output_dir: Path) -> str:
    """The guard's decision for each case, as HTML, from every ``routes.json`` below the folder."""
    columns = ("decision", "reason", "objective_start", "objective_end", "agreement", "seconds")
    lines, decisions = [], []
    for path in sorted(output_dir.glob("**/routes.json")):
        cases = read_json(path).get("cases", {})
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
    decided = table([f"<tr>{heads}</tr>", *lines], kind="text")
    return f'<h2>Decisions of the guard</h2>{decided}<p class="caption">{caption}</p>' if lines else ""


def _fact(value: Any) -> str:
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    return f"{value:.4g}" if isinstance(value, float) else escape(without_path(str(value)))


def _group(path: Path, cases: Iterable[str], output_dir: Path) -> str:
    """What the routes of a file belong to: the name of its folder, or of the one above if that is a case's own."""
    folder = path.parent.parent if {*cases} == {path.parent.name} else path.parent
    return "" if folder == output_dir else folder.name
