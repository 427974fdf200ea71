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
"""The files of a run, made up: what the report and its tables are tested on."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np

METRICS = "site,role,case,model,metric,value"
CASES = "site,role,case,model,image,label,mask"
DASH = "\u2013"
INSIDE, OUTSIDE = ("global", "personalised"), ("routed", "soup", "global")


def write_csv(path: Path, header: str, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])


def write_volume(path: Path, array: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([-0.6, -0.6, 3.0, 1.0])), path)
    return str(path)


def shown_dice(site: int, case: int, model: str) -> float:
    return 0.70 + 0.02 * site + 0.01 * case + {"global": 0, "personalised": 0.05, "routed": 0.03, "soup": 0.01}[model]


def make_run(folder: Path) -> Path:
    """Two sites inside (with 3 and 6 cases) and one outside, small volumes with an ellipsoid as organ."""
    rng = np.random.RandomState(0)
    x, y, z = np.mgrid[:24, :24, :6]
    metrics, cases, history = [], [], []
    for s, (site, role, n, models) in enumerate(
        (("Site <A>", "inside", 3, INSIDE), ("B$1$", "inside", 6, INSIDE), ("Out", "outside", 5, OUTSIDE))
    ):
        for c in range(n):
            organ = ((x - 12) / 6) ** 2 + ((y - 11) / 5) ** 2 + ((z - 3) / 2.5) ** 2 <= 1
            scan = (100 * organ + 20 * rng.rand(*organ.shape)).astype(np.float32)
            image = write_volume(folder / "private" / f"{s}_{c}.nii.gz", scan)
            label = write_volume(folder / "private" / f"{s}_{c}_label.nii.gz", organ.astype(np.uint8))
            for m, model in enumerate(models):
                value = shown_dice(s, c, model)
                metrics.append([site, role, f"case{s}{c}", model, "dice", value])
                metrics.append([site, role, f"case{s}{c}", model, "hd95_mm", "nan" if c == 1 and m == 0 else 4 + m])
                mask = write_volume(folder / "masks" / f"{s}_{c}_{model}.nii.gz", np.roll(organ, m + 1, 0).astype("u1"))
                cases.append([site, role, f"case{s}{c}", model, image, label, os.path.relpath(mask, folder)])
        history += [[r, site, m, "val_mean_dice", 0.5 + 0.1 * r] for r in range(3) for m in INSIDE if role == "inside"]
        history += [[r, site, "local", "train_loss", 1 / (r + 1)] for r in range(3) if role == "inside"]
        history += [[r, site, "local", "learning_rate", 0.1 / (r + 1)] for r in range(3) if role == "inside"]
    write_csv(folder / "metrics.csv", METRICS, metrics[::-1])
    write_csv(folder / "cases.csv", CASES, cases)
    write_csv(folder / "history.csv", "round,site,model,metric,value", history)
    routes = [
        [f"case2{c}", layer, e, w] for c in range(2) for layer in range(3) for e, w in (("B$1$", 0.3), ("global", 0.7))
    ]
    write_csv(folder / "Out" / "routes.csv", "case,layer,expert,weight", routes)
    facts = {"decision": "start", "reason": "strays <far>", "objective_start": 0.25, "objective_end": float("nan")}
    (folder / "Out" / "routes.json").write_text(json.dumps({"experts": ["B$1$", "global"], "cases": {"case20": facts}}))
    settings = {"seed": 7, "dataset_dir": "/hospital/john doe", "versions": {"monai": "1.6.1"}}
    (folder / "run.json").write_text(json.dumps(settings))
    return folder


def small_run(folder: Path, values: dict[str, list[float | str]], role: str = "inside") -> Path:
    """Only a ``metrics.csv``, of one site: Dice of each model by case."""
    rows = [
        ["S", role, f"c{i}", model, "dice", v] for model, of_cases in values.items() for i, v in enumerate(of_cases)
    ]
    write_csv(folder / "metrics.csv", METRICS, rows)
    return folder
