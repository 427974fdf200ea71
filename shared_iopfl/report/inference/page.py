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
"""The page of an inference, ``report.html``: one file that shows all masks, beginning with those to check first.

It reads ``review.csv``, ``measures.csv``, ``routes.json``, ``failed.csv``, ``not_taken.csv`` and the overlays; any of
them may be missing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shared_iopfl.evaluation.run.results import ServedScan, dice_text, read_failed, read_passed_over, read_served
from shared_iopfl.models.manifest import read_manifest
from shared_iopfl.report.documents import Block, Card, Cards, Heading, Row, Table, Text
from shared_iopfl.report.inference.pictures import distribution_picture, thumbnail
from shared_iopfl.report.pages import page, picture, without_path
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import write_text
from shared_iopfl.utils.names import counted

EVEN = 1.05  # times an equal share: only above it is an expert named as the one with the largest weight
MOST_FILES = 200  # rows of the tables of files
EXPLAINED = (
    "The expected Dice is estimated from the quality; its interval contained nine of ten masks of the inside sites, "
    "each of which was left out of the fit in turn. "
)
TITLES = {"volume_ml": "Volume (ml)", "vertical_cup_to_disc_ratio": "Vertical cup-to-disc ratio"}


def write_inference_report(output_dir: str | os.PathLike, ckpt_dir: str | os.PathLike | None = None) -> Path:
    """Write ``report.html`` of an inference into its folder.

    Args:
        output_dir: Folder of the run.
        ckpt_dir: Folder of the models. If ``metrics`` in their manifest has ``{"measures": {measure: {site: [5 %, 25 %,
            50 %, 75 %, 95 %]}}}``, these quantiles are drawn above the measures of the scans.

    Returns:
        Path of the report.

    Raises:
        InputError: If the folder holds no inference, or one of its tables is malformed.
    """
    out = Path(output_dir)
    served, failed, passed = read_served(out), read_failed(out), read_passed_over(out)
    if not served and not failed:
        raise InputError(f"{out} holds no inference: run the bundle's inference.json with this folder as output_dir.")
    noticed = sum(bool(scan.reasons) for scan in served)
    facts = f"{counted(len(served), 'mask')} · {noticed} flagged · {len(failed)} failed"
    facts += f" · {counted(len(passed), 'file')} skipped" * bool(passed)
    blocks: list[Block] = [Text(facts, "facts"), Text("For research use only, not for diagnosis.", "use")]
    blocks += [
        *_masks(served, out),
        *_measures(served, _published(ckpt_dir)),
        *_experts(served),
        *_files("Scans that failed", failed, "case"),
        *_files("Files that were skipped", passed, "file"),
    ]
    path = out / "report.html"
    write_text(path, page("IOP-FL: segmentation of scans", blocks))
    return path


def _masks(served: Sequence[ServedScan], out: Path) -> list[Block]:
    cards = []
    for scan in served:
        overlay = out / f"{scan.case}_overlay.png"
        figures = [f"{_title(name)} {value:.4g}" for name, value in scan.measures.items()]
        figures += [f"quality {scan.quality:.2f}"] if scan.quality is not None else []
        figures += [f"expected Dice {dice_text(scan.expected_dice)}"] if scan.expected_dice is not None else []
        used = max(scan.routes, key=lambda expert: scan.routes[expert], default="")
        if used and scan.routes[used] > EVEN / len(scan.routes):
            figures.append(f"largest weight: {used}, {scan.routes[used]:.2f}")
        if len(scan.statistics) > 1:
            figures.append(f"shares of own statistics: {', '.join(f'{share:g}' for share in scan.statistics)}")
        cards.append(Card(scan.case, scan.reasons, figures, thumbnail(overlay), quote(overlay.name)))
    caption = (
        "Sorted by the review list: masks to check first come first. Quality is the agreement between the masks of "
        "several views of a scan; it ranks the scans of this run and is not an estimate of Dice. "
        f"{EXPLAINED * any(scan.expected_dice is not None for scan in served)}A picture links to its overlay."
    )
    return [Heading("Masks"), Text(caption, "caption"), Cards(cards)] if cards else []


def _measures(served: Sequence[ServedScan], published: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Block]:
    blocks: list[Block] = []
    for name in dict.fromkeys(name for scan in served for name in scan.measures):
        values = [scan.measures[name] for scan in served if name in scan.measures]
        sites = published.get(name, {})
        behind = (
            "Above them, the published distribution at each inside site: 5 % to 95 % light, 25 % to 75 % dark."
            if sites
            else "The models were published without distributions of the inside sites."
        )
        caption = f"One dot per mask ({len(values)} masks); the black line is their median. {behind}"
        title = _title(name)
        blocks += [Heading(title, 3), picture(distribution_picture(values, sites, title), caption)]
    return blocks and [Heading("Measures"), *blocks]


def _experts(served: Sequence[ServedScan]) -> list[Block]:
    experts = list(dict.fromkeys(expert for scan in served for expert in scan.routes))
    if not experts:
        return []
    rows = []
    for scan in served:
        weights = [scan.routes.get(expert, 0.0) for expert in experts]
        shades = [min(max(weight, 0), 1) * 0.7 for weight in weights]
        rows.append(Row(scan.case, [f"{weight:.2f}" for weight in weights], shades=shades))
    caption = (
        f"Weight of each expert in the routed network, averaged over layers; an even mixture gives each expert "
        f"{1 / len(experts):.2f}. Sites whose personalised model equals the global model are not listed. "
        "The weights by layer are in routes.csv."
    )
    return [Heading("Experts"), Text(caption, "caption"), Table(["case", *experts], rows)]


def _files(title: str, found: Sequence[Mapping[str, str]], column: str) -> list[Block]:
    rows = []
    for row in found[:MOST_FILES]:
        reason = row["reason"]
        if column == "case" and row.get("file"):
            reason = reason.replace(row["file"], row["case"])  # paths can name patients
        rows.append(Row(row[column], [without_path(reason)]))
    more = len(found) - MOST_FILES
    rest = [Text(f"and {more} more", "caption")] if more > 0 else []
    return [Heading(title), Table([column, "reason"], rows, text=True), *rest] if rows else []


def _published(ckpt_dir: str | os.PathLike | None) -> dict[str, dict[str, list[float]]]:
    """Quantiles of measures at the inside sites, measure -> site -> five numbers; malformed entries are left out."""
    manifest: Any = read_manifest(ckpt_dir) if ckpt_dir is not None else None
    metrics = (manifest or {}).get("metrics") or {}
    measures = metrics.get("measures") if isinstance(metrics, dict) else None
    found: dict[str, dict[str, list[float]]] = {}
    for name, sites in measures.items() if isinstance(measures, dict) else ():
        for site, values in sites.items() if isinstance(sites, dict) else ():
            if isinstance(values, list) and len(values) == 5 and all(isinstance(v, (int, float)) for v in values):
                found.setdefault(str(name), {})[str(site)] = sorted(map(float, values))
    return found


def _title(name: str) -> str:
    return TITLES.get(name, name.replace("_", " "))
