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
"""The files of a comparison, made up: what its figures and its report are tested on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
from runs import CASES, write_csv

COLUMNS = "seed,fold,site,role,method,case,metric,value"
Scores = dict[str, np.ndarray]  # {method: (seed, case)}


def score_rows(role: str, sites: dict[str, Scores], metric: str = "dice") -> list[list]:
    """Rows of ``comparison.csv``: inside each case is in the fold of its number modulo 2; NaN leaves a row out."""
    return [
        [seed, site if role == "outside" else case % 2, site, role, method, f"c{case}", metric, value]
        for site, of_site in sites.items()
        for method, values in of_site.items()
        for seed, of_seed in enumerate(np.atleast_2d(values))
        for case, value in enumerate(of_seed)
        if not np.isnan(value)
    ]


def write_scores(folder: Path, rows: list[list]) -> Path:
    write_csv(folder / "comparison.csv", COLUMNS, rows)
    return folder


def dice(site: int, cases: int = 6, seeds: int = 2) -> np.ndarray:
    """Some Dice, ``(seed, case)``, no two alike."""
    return 0.6 + 0.02 * site + 0.03 * np.arange(cases) + 0.002 * np.arange(seeds)[:, None]


def make_comparison(folder: Path) -> Path:
    """Two sites inside and outside, two seeds; pictures with a square as organ, masks the worse the further aside."""
    rows: list[list] = []
    names = ("Site <A>", "B_$1$")
    for role, reference, own, more in (
        ("inside", "FedAvg", "personalised", {"local only": -0.05}),
        (
            "outside",
            "global",
            "default",
            {"paper": -0.3, "labelled routes": 0.05, "expert X": 0.001, "expert Y": -0.011},
        ),
    ):
        gains = {reference: 0.0, own: 0.02, **more}
        sites: dict[str, Scores] = {}
        for s, site in enumerate(names):
            # what our own method gains differs from case to case, and is large at the second site
            dial = np.linspace(-1, 2, 6) / 2 + s
            sites[site] = {m: dice(s) + (gain * dial if m == own else gain) for m, gain in gains.items()}
        rows += score_rows(role, sites) + score_rows(role, sites, "dice_cup")
        rows += score_rows(role, {site: {m: 5 - v for m, v in of.items()} for site, of in sites.items()}, "hd95_mm")
        for seed in range(2):
            for s, site in enumerate(names):
                for fold in (site,) if role == "outside" else (0, 1):
                    run = folder / f"seed{seed}" / f"{role}_{fold}"
                    cases = [c for c in range(6) if role == "outside" or c % 2 == fold]
                    _write_masks(run, folder / "private", role, site, cases, (reference, own))
                if role == "outside":
                    shifts = {f"c{c}": {"shift": 0.1 * (s + 1) + 0.01 * c} for c in range(6)}
                    routes = run / "masks" / site / own / "routes.json"
                    routes.write_text(json.dumps({"experts": ["X"], "cases": shifts}))
    write_scores(folder, rows)
    means = [{"wide": 0.8, "narrow": None}, {"wide": 0.8, "narrow": 0.81}]
    choices = [{"seed": 0, "fold": s, "choice": "wide", "candidates": m} for s, m in zip(names, means)]
    (folder / "choices.json").write_text(json.dumps(choices))
    (folder / "run.json").write_text(json.dumps({"rounds": 3, "dataset_dir": "/hospital/john doe"}))
    return folder


def _write_masks(run: Path, private: Path, role: str, site: str, cases: list[int], methods: tuple[str, ...]) -> None:
    private.mkdir(parents=True, exist_ok=True)
    organ = np.zeros((24, 24), np.uint8)
    organ[8:16, 8:16] = 1
    rows = []
    for case in cases:
        files = [private / f"{case}.png", private / f"{case}_label.png"]
        Image.fromarray(60 + 100 * organ).save(files[0])
        Image.fromarray(organ).save(files[1])
        for aside, method in enumerate(methods):
            mask = run / "masks" / site / method / f"c{case}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(organ, aside + 1, 1)).save(mask)
            rows.append([site, role, f"c{case}", method, *files, os.path.relpath(mask, run)])
    old = (run / "cases.csv").read_text().splitlines()[1:] if (run / "cases.csv").is_file() else []
    write_csv(run / "cases.csv", CASES, [*(line.split(",") for line in old), *rows])
