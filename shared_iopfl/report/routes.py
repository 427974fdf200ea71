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
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from shared_iopfl.evaluation.scores import DASH, number, read_json
from shared_iopfl.report import charts
from shared_iopfl.report.documents import Block, Heading, Row, Table, Text
from shared_iopfl.report.pages import picture, without_path
from shared_iopfl.utils.tables import read_rows


def routes_section(output_dir: Path) -> list[Block]:
    """The weights of the experts by layer and by case, from every ``routes.csv`` below the folder."""
    groups: dict[tuple[str, tuple[str, ...]], list[dict[str, str]]] = {}
    for path in sorted(output_dir.glob("**/routes.csv")):
        rows = read_rows(path, "case layer expert weight")
        experts = tuple(dict.fromkeys(row["expert"] for row in rows))
        key = _group(path, (row["case"] for row in rows), output_dir), experts
        groups.setdefault(key, []).extend({**row, "weight": str(number(row["weight"], path))} for row in rows)
    blocks: list[Block] = []
    for (name, experts), rows in groups.items():
        if not rows:
            continue
        cases, layers = (list(dict.fromkeys(row[column] for row in rows)) for column in ("case", "layer"))
        weights = np.full((len(cases), len(layers), len(experts)), math.nan)
        for row in rows:
            at = cases.index(row["case"]), layers.index(row["layer"]), experts.index(row["expert"])
            weights[at] = float(row["weight"])
        blocks += [Heading(name, 3)] if name else []
        if np.ptp(np.nan_to_num(weights)) < 1e-6:  # the uniform mixture needs no picture
            blocks.append(Text(f"All experts have the same weight in every layer: {weights.flat[0]:.2f}.", "caption"))
            continue
        caption = (
            "Weights of the experts in the routed network: above by layer (darker: larger), below by case. "
            f"With {len(experts)} experts, an even mixture gives each {1 / len(experts):.2f}."
        )
        blocks.append(picture(charts.routes_picture(weights, experts, cases, layers), caption))
    return blocks and [Heading("Routes"), *blocks]


def decisions_section(output_dir: Path) -> list[Block]:
    """The guard's decision for each case, from every ``routes.json`` below the folder."""
    columns = ("decision", "reason", "objective_start", "objective_end", "agreement", "seconds")
    rows = []
    for path in sorted(output_dir.glob("**/routes.json")):
        cases = read_json(path).get("cases", {})
        where = _group(path, cases, output_dir)
        rows += [Row(case, [_fact(facts.get(c)) for c in columns], note=where) for case, facts in cases.items()]
    decisions = Counter(row.cells[0] for row in rows)
    counts = ", ".join(f"{decision} {count}" for decision, count in decisions.items())
    caption = (
        "For each case the guard decides, without labels, whether the adapted routes are kept or the initial ones are "
        f"used: {counts}. Objective: what adaptation minimises; agreement: Dice between the masks before and after it."
    )
    table = Table([column.replace("_", ", ") for column in ("case", *columns)], rows, text=True)
    return [Heading("Decisions of the guard"), table, Text(caption, "caption")] if rows else []


def _fact(value: Any) -> str:
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    return f"{value:.4g}" if isinstance(value, float) else without_path(str(value))


def _group(path: Path, cases: Iterable[str], output_dir: Path) -> str:
    """What the routes of a file belong to: the name of its folder, or of the one above if that is a case's own."""
    folder = path.parent.parent if {*cases} == {path.parent.name} else path.parent
    return "" if folder == output_dir else folder.name
