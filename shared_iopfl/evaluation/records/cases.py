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
"""The scores of each case of an evaluation, its files, and their summary."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data.meta_tensor import MetaTensor
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance
from torch import Tensor

from shared_iopfl.data.volumes.measures import spacing_mm
from shared_iopfl.evaluation.records.growing_tables import served_scans
from shared_iopfl.utils.tables import replace_rows

METRICS = ("site", "role", "case", "model", "metric", "value")
CASES = ("site", "role", "case", "model", "image", "label", "mask")
SUMMARY = ("site", "role", "model", "metric", "mean", "sd", "min", "max", "cases")


def case_scores(pred: Tensor, reference: Tensor, targets: Sequence[str]) -> dict[str, float]:
    """Compute the foreground Dice of one case, and HD95 and ASD in mm if the scan's voxel size is known.

    Args:
        pred: Binary mask (T, *spatial), one channel per target.
        reference: Reference mask of the same shape; its affine gives the voxel size.
        targets: Names of the T targets. With one, scores have plain names ("dice"); with more, there is one score for
            each target ("dice_disc") and their mean.

    Returns:
        Metric -> value; distances are NaN if a mask is empty.
    """
    one, other = (mask.as_tensor() if isinstance(mask, MetaTensor) else mask for mask in (pred, reference))
    one, other = one[None].float(), other[None].float()
    columns = {"dice": compute_dice(one, other)[0]}
    spacing = spacing_mm(reference) if reference.ndim > 3 else None  # a picture has no voxel size
    if spacing is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of empty masks, which give NaN, and of MONAI's own calls
            columns["hd95_mm"] = compute_hausdorff_distance(one, other, True, percentile=95, spacing=spacing)[0]
            columns["asd_mm"] = compute_average_surface_distance(one, other, True, symmetric=True, spacing=spacing)[0]
    scores = {}
    for metric, values in columns.items():
        finite = torch.where(torch.isfinite(values), values, torch.nan)
        if len(targets) > 1:
            scores.update({f"{metric}_{target}": float(value) for target, value in zip(targets, finite)})
        scores[metric] = float(finite.mean())
    return scores


class CaseRecorder:
    """Write the scores of an evaluator's cases to ``metrics.csv``, their files to ``cases.csv``, and a summary.

    ``summary.csv`` has a row for each site, model and metric: mean, standard deviation, minimum, maximum and number of
    cases.

    Args:
        output_dir: Folder of the files.
        site, role, model: Labels of the rows: role "inside" or "outside"; model "global", "personalised" or "routed".
        targets: Names of the targets, in the order of the channels of the binary masks (T, *spatial).
        extras: Further measures, name -> function of (pred, reference).
    """

    def __init__(
        self,
        output_dir: str,
        site: str,
        role: str,
        model: str,
        targets: Sequence[str],
        extras: Mapping[str, Callable[[Tensor, Tensor], float]] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.labels = {"site": site, "role": role, "model": model}
        self.targets = tuple(targets)
        self.extras = dict(extras or {})
        self.metrics: list[dict[str, Any]] = []
        self.cases: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.record)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Discard the cases of an earlier run of the engine."""
        self.metrics, self.cases = [], []

    def record(self, engine: Engine) -> None:
        """Score the cases of this iteration."""
        for batch, output in served_scans(engine):
            case = {**self.labels, "case": batch["case"]}
            pred, reference = ({**batch, **output}[key] for key in ("pred", "label"))
            scores = case_scores(pred, reference, self.targets)
            scores.update({name: float(measure(pred, reference)) for name, measure in self.extras.items()})
            self.metrics += [{**case, "metric": metric, "value": f"{value:.6f}"} for metric, value in scores.items()]
            mask = output.get("pred_file", output.get("mask_file", ""))
            self.cases.append(
                {
                    **case,
                    "image": os.path.abspath(batch["image"].meta["filename_or_obj"]),
                    "label": os.path.abspath(reference.meta["filename_or_obj"]),
                    "mask": os.path.relpath(mask, self.output_dir) if mask else "",
                }
            )

    def write(self, engine: Engine) -> None:
        """Write the rows of all cases into ``metrics.csv`` and ``cases.csv``, and the summary into ``summary.csv``."""
        same = ("site", "role", "model")
        replace_rows(self.output_dir / "metrics.csv", METRICS, self.metrics, same)
        replace_rows(self.output_dir / "cases.csv", CASES, self.cases, same)
        replace_rows(self.output_dir / "summary.csv", SUMMARY, self.summary(), same)

    def summary(self) -> list[dict[str, Any]]:
        """Return one row per metric over the cases recorded so far, without NaN (a distance to an empty mask)."""
        rows = []
        for metric in dict.fromkeys(row["metric"] for row in self.metrics):
            values = torch.tensor([float(row["value"]) for row in self.metrics if row["metric"] == metric])
            values = values[torch.isfinite(values)]
            figures = [values.mean(), values.std(correction=0), values.min(), values.max()] if len(values) else []
            named = {name: f"{float(value):.6f}" for name, value in zip(SUMMARY[4:8], figures)}
            rows.append({**self.labels, "metric": metric, **named, "cases": len(values)})
        return rows
