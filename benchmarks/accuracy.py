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
"""Whether speed costs Dice: the default against the naive reference, on real scans, by the bundle's own evaluation."""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine, spread
from shared_iopfl.evaluation.scoring import Scoring
from shared_iopfl.models.files import load_experts
from shared_iopfl.utils.config_values import Expression

__all__ = ["measure"]

BUNDLES = Path(__file__).parents[1] / "bundles"
PATHS = {"fast": "shared_iopfl.inferers.routing.TestTimeRoutingInferer", "naive": "benchmarks.reference.NaiveInferer"}


def _dice(folder: Path) -> dict[str, float]:
    """The mean Dice of each case over its targets."""
    scores: dict[str, list[float]] = {}
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"].endswith("dice"):
                scores.setdefault(row["case"], []).append(float(row["value"]))
    return {case: sum(values) / len(values) for case, values in scores.items()}


def _seconds(folder: Path, site: str) -> dict[str, float]:
    """What routing each case took."""
    report = json.loads((folder / "masks" / site / "routed" / "routes.json").read_text(encoding="utf-8"))
    return {case: float(routed["seconds"]) for case, routed in report["cases"].items()}


def measure(
    dataset_dir: str = "",
    task: str = "prostate",
    device: str = "cpu",
    cases: int = 3,
    ckpt_dir: str = "",
    **overrides: Any,
) -> dict[str, Any]:
    """Segment the first cases of each site that has an expert, that expert left out, by the fast and the naive path.

    Args:
        dataset_dir: the sites' scans and masks.
        task: the bundle: "prostate" or "fundus".
        device: "cpu" or "cuda".
        cases: how many a site.
        ckpt_dir: the models; default: the bundle's own.
        overrides: of the bundle's evaluation, such as --image_size.
    """
    bundle, place = BUNDLES / f"{task}_iopfl", torch.device(device)
    experts = list(load_experts(ckpt_dir or str(bundle / "models")))
    sites = [site for site in experts if dataset_dir and (Path(dataset_dir) / site).is_dir()]
    if not sites:
        sys.exit(f"error: --dataset_dir must hold a folder of one of {', '.join(experts)}, but is '{dataset_dir}'.")
    points: dict[str, dict[str, float]] = {}
    ratios = []
    for site in sites:
        dice, seconds = {}, {}
        for path, inferer in PATHS.items():
            with tempfile.TemporaryDirectory() as folder:
                common = {
                    "dataset_dir": dataset_dir,
                    "device": device,
                    "ckpt_dir": ckpt_dir or str(bundle / "models"),
                    "sites": [name for name in experts if name != site],
                    "validate#inferer#_target_": Expression(inferer),
                    "validate#dataset#data": Expression(f"$splits.site_cases(@dataset_dir, @site, 'all')[:{cases:d}]"),
                }
                Scoring(str(bundle), folder, {**overrides, **common}).score(site, "routed", role="outside")
                dice[path], seconds[path] = _dice(Path(folder)), _seconds(Path(folder), site)
        means = {path: 100 * sum(of.values()) / len(of) for path, of in dice.items()}
        worst = max(100 * abs(dice["fast"][case] - dice["naive"][case]) for case in dice["naive"])
        points[site] = {**{path: round(mean, 4) for path, mean in means.items()}, "largest_difference": round(worst, 6)}
        ratios += [seconds["naive"][case] / seconds["fast"][case] for case in seconds["naive"]]
    return {
        "ratios": {"naive_over_fast_seconds": spread(ratios)},
        "dice_points": points,
        "settings": {"task": task, "cases": cases, "preset": "default", **overrides},
        **machine(place),
    }
