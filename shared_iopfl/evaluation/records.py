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
"""Records of an evaluation: scores of each case, its mask, and its routes."""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Engine, Events
from monai.data.meta_tensor import MetaTensor
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance
from torch import Tensor, nn
from tqdm import tqdm

from shared_iopfl.data.scan_files import case_name
from shared_iopfl.evaluation.run.served import GrowingFile, attach_served
from shared_iopfl.inferers.members import load_members
from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.models.files import load_weights, save_atomically
from shared_iopfl.utils.tables import csv_text, json_text, replace_rows, write_json, write_rows

__all__ = [
    "CaseRecorder",
    "MeasureRecorder",
    "OutputWriter",
    "Progress",
    "RoutesRecorder",
    "SiteFitter",
    "case_scores",
    "reported_case",
    "write_routes",
]

SITE_SCANS = 128  # as many tell what a site is like
METRICS = ("site", "role", "case", "model", "metric", "value")
CASES = ("site", "role", "case", "model", "image", "label", "mask")
ROUTES = ("case", "layer", "expert", "weight")
SUMMARY = ("site", "role", "model", "metric", "mean", "sd", "min", "max", "cases")


def _spacing(scan: Tensor) -> list[float] | None:
    """Voxel size in mm, or None where it is only nominal: pictures, and volumes that say exactly 1 mm each way."""
    if not isinstance(scan, MetaTensor) or scan.ndim < 4:
        return None
    spacing = [float(size) for size in scan.pixdim]
    return None if all(abs(size - 1) < 1e-6 for size in spacing) else spacing


def case_scores(pred: Tensor, reference: Tensor, targets: Sequence[str]) -> dict[str, float]:
    """Foreground Dice of one case, and HD95 and ASD in mm where the scan's voxel size is real.

    Args:
        pred: binary (T, *spatial), one channel a target.
        reference: the same; its affine gives the voxel size.
        targets: T names. With one, scores have plain names ("dice"); with more, one each and their mean ("dice_disc").

    Returns:
        metric -> value; distances are NaN where a mask is empty.
    """
    one, other = (mask.as_tensor() if isinstance(mask, MetaTensor) else mask for mask in (pred, reference))
    one, other = one[None].float(), other[None].float()
    columns = {"dice": compute_dice(one, other)[0]}
    spacing = _spacing(reference)
    if spacing is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of empty masks, whose NaN says it, and of MONAI's own calls
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
    """Adds the scores of an evaluator's cases to ``metrics.csv``, their files to ``cases.csv``, and sums up.

    ``summary.csv`` holds a row a site, model and metric: mean, standard deviation, least, greatest, number of cases.

    Args:
        output_dir: where the files are.
        site, role, model: what to call the rows: role "inside" or "outside"; model "global", "personalised", "routed".
        targets: names of the targets, in the order of the channels.
        pred_key, reference_key: binary masks (T, *spatial) in the scan's own grid.
        extras: further measures, name -> function of (pred, reference).
    """

    def __init__(
        self,
        output_dir: str,
        site: str,
        role: str,
        model: str,
        targets: Sequence[str],
        pred_key: str = "pred",
        reference_key: str = "label",
        extras: Mapping[str, Callable[[Tensor, Tensor], float]] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.labels = {"site": site, "role": role, "model": model}
        self.targets = tuple(targets)
        self.keys = (pred_key, reference_key)
        self.extras = dict(extras or {})
        self.metrics: list[dict[str, Any]] = []
        self.cases: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.record)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Forget the cases of an earlier run of the engine."""
        self.metrics, self.cases = [], []

    def record(self, engine: Engine) -> None:
        """Score the case of this iteration."""
        state: Any = engine.state  # decollated lists by now, which ignite's types do not know
        for batch, output in zip(state.batch, state.output):
            case = {**self.labels, "case": batch["case"]}
            pred, reference = ({**batch, **output}[key] for key in self.keys)
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
        """Write the rows of all cases into ``metrics.csv`` and ``cases.csv``."""
        same = ("site", "role", "model")
        replace_rows(self.output_dir / "metrics.csv", METRICS, self.metrics, same)
        replace_rows(self.output_dir / "cases.csv", CASES, self.cases, same)
        replace_rows(self.output_dir / "summary.csv", SUMMARY, self.summary(), same)

    def summary(self) -> list[dict[str, Any]]:
        """One row a metric over the cases recorded so far, NaN (a distance to an empty mask) left out."""
        rows = []
        for metric in dict.fromkeys(row["metric"] for row in self.metrics):
            values = torch.tensor([float(row["value"]) for row in self.metrics if row["metric"] == metric])
            values = values[torch.isfinite(values)]
            figures = [values.mean(), values.std(correction=0), values.min(), values.max()] if len(values) else []
            named = {name: f"{float(value):.6f}" for name, value in zip(SUMMARY[4:8], figures)}
            rows.append({**self.labels, "metric": metric, **named, "cases": len(values)})
        return rows


class OutputWriter:
    """Applies transforms that write files, such as `SaveMaskd`, to each of an evaluator's outputs.

    As a handler, not as part of the bundle's postprocessing, so that a server that takes the postprocessing for itself
    (MONAI Label) writes no files of ours.

    Args:
        transforms: applied in order to each case's batch and output; what they add goes to the output.
    """

    def __init__(self, transforms: Sequence[Callable[[dict], Mapping]]) -> None:
        self.transforms = [transform for transform in transforms if transform is not None]  # None: disabled in a config

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        state: Any = engine.state
        for batch, output in zip(state.batch, state.output):
            data = {**batch, **output}
            for transform in self.transforms:
                data = dict(transform(data))
            output.update({key: value for key, value in data.items() if key not in batch})


class MeasureRecorder:
    """Writes ``measures.csv``, as scans are served: what a clinic reads off each mask, without any reference.

    Args:
        output_dir: where the file goes.
        measures: name -> function of the binary mask (T, *spatial) in the scan's own grid.
        pred_key: key of the mask.
    """

    def __init__(self, output_dir: str, measures: Mapping[str, Callable[[Tensor], float]], pred_key: str = "pred"):
        self.output_dir = Path(output_dir)
        self.measures = dict(measures)
        self.pred_key = pred_key
        self.columns = ("case", *self.measures)
        self.file: GrowingFile

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        attach_served(engine, self.record, lambda: self.file.take_back())

    def start(self, engine: Engine) -> None:
        """Forget the rows of an earlier run of the engine."""
        self.file = GrowingFile(self.output_dir / "measures.csv", csv_text(self.columns, []))

    def record(self, engine: Engine) -> None:
        """Measure the mask of this iteration."""
        state: Any = engine.state
        rows = []
        for batch, output in zip(state.batch, state.output):
            values = {name: f"{measure(output[self.pred_key]):.4f}" for name, measure in self.measures.items()}
            rows.append({"case": batch["case"], **values})
        self.file.add(csv_text(self.columns, rows, header=False))


class RoutesRecorder:
    """Writes ``routes.json`` and ``routes.csv``, as scans are served: the guard's decision, and the experts.

    The inferer's whole report of a scan is left in the engine's output as "report", for the handlers that come after.
    """

    def __init__(self, inferer: TestTimeRoutingInferer, output_dir: str) -> None:
        self.inferer = inferer
        self.output_dir = Path(output_dir)
        self.cases: dict[str, dict[str, Any]] = {}
        self.newest: list[str] = []  # the cases of this iteration
        self.files: list[GrowingFile] = []

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        attach_served(engine, self.record, self.take_back)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Forget the routes of an earlier run of the engine."""
        self.cases, self.newest, self.files = {}, [], []
        self.inferer.reports.clear()

    def record(self, engine: Engine) -> None:
        """Take the inferer's report on the scan of this iteration."""
        state: Any = engine.state
        self.newest = []
        for batch, output in zip(state.batch, state.output):
            if self.inferer.reports:
                report = output["report"] = self.inferer.reports.popleft()
                if "routes" in report:
                    self.cases[reported_case(batch)] = report
                    self.newest.append(reported_case(batch))
        if self.newest:
            self._grow({case: self.cases[case] for case in self.newest})

    def _grow(self, cases: Mapping[str, Mapping[str, Any]]) -> None:
        if not self.files:
            experts = json_text(list(next(iter(cases.values()))["experts"]))
            head = f'{{"experts": {experts}, "cases": {{\n'
            self.files = [
                GrowingFile(self.output_dir / "routes.csv", csv_text(ROUTES, [])),
                GrowingFile(self.output_dir / "routes.json", head, "\n}}\n", ",\n"),
            ]
        table, summary = self.files
        table.add(csv_text(ROUTES, _route_rows(cases), header=False))
        summary.add(",\n".join(f"{json_text(case)}: {json_text(_summary(report))}" for case, report in cases.items()))

    def take_back(self) -> None:
        """Remove the row of the last scan, whose mask could not be written."""
        for case in self.newest:
            del self.cases[case]
        for file in self.files if self.newest else ():
            file.take_back()
        self.newest = []

    def write(self, engine: Engine) -> None:
        """Write ``routes.json`` and ``routes.csv``."""
        write_routes(self.cases, self.output_dir)


def reported_case(batch: Mapping[str, Any]) -> str:
    """What a scan of an evaluator's batch is called in the tables."""
    return batch.get("case") or case_name(batch["image"].meta["filename_or_obj"])


def write_routes(cases: Mapping[str, Mapping[str, Any]], output_dir: str | os.PathLike) -> None:
    """Write the reports of `TestTimeRoutingInferer`, case -> report, as ``routes.json`` and ``routes.csv``."""
    if not cases:
        return
    experts = list(next(iter(cases.values()))["experts"])
    summary = {case: _summary(report) for case, report in cases.items()}
    write_json(Path(output_dir) / "routes.json", {"experts": experts, "cases": summary})
    write_rows(Path(output_dir) / "routes.csv", ROUTES, _route_rows(cases))


def _route_rows(cases: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"case": case, "layer": layer, "expert": expert, "weight": f"{weight:.6f}"}
        for case, report in cases.items()
        for layer, weights in zip(report["layers"], report["routes"])
        for expert, weight in zip(report["experts"], weights)
    ]


def _summary(report: Mapping[str, Any]) -> dict[str, Any]:
    mean = torch.tensor(report["routes"]).mean(0).tolist()
    kept = {key: value for key, value in report.items() if key not in ("routes", "layers", "experts")}
    return {**kept, "experts": {e: round(w, 6) for e, w in zip(report["experts"], mean)}}


class SiteFitter:
    """Mode "site": before the first scan is served, makes a network from the site's scans.

    Of many scans it reads 128, evenly spaced. Where none can be loaded it makes nothing: each fails in its turn.

    Args:
        inferer: its mode "site" switches this on.
        network: the global model.
        site_model: file of the site's network, its state_dict. Where it is there, it is served; else it is made.
            "": made anew from the scans at hand, and kept as ``site.pt`` in `output_dir`.
        output_dir: for ``routes.json`` and ``routes.csv`` of the site.
        device: to run on.
        image_key: of the scans in the evaluator's batches.
    """

    def __init__(
        self,
        inferer: TestTimeRoutingInferer,
        network: torch.nn.Module,
        site_model: str,
        output_dir: str,
        device: torch.device | str = "cpu",
        image_key: str = "image",
    ) -> None:
        self.inferer = inferer
        self.network = network
        self.site_model = site_model
        self.output_dir = output_dir
        self.device = device
        self.image_key = image_key

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        if self.inferer.mode == "site":
            engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        if self.site_model and os.path.isfile(self.site_model):
            state = load_weights(self.site_model)
            output = self.inferer.output
            self.inferer.site_network = load_members(self.network, state, output, self.site_model)
            return
        scans = self._scans(engine.state.dataloader)
        first = next(scans, None)
        if first is None:
            return
        report = self.inferer.fit(itertools.chain([first], scans), self.network)
        made = cast(nn.Module, self.inferer.site_network)
        weights = {name: tensor.cpu() for name, tensor in made.state_dict().items()}
        save_atomically(weights, self.site_model or str(Path(self.output_dir) / "site.pt"))
        write_routes({"site": report}, self.output_dir)

    def _scans(self, loader: Any) -> Iterator[Tensor]:
        """Those that can be loaded, (1, C, *spatial)."""
        count = len(loader.dataset)
        for index in range(0, count, math.ceil(count / SITE_SCANS)):
            images = loader.collate_fn([loader.dataset[index]])[self.image_key]
            if len(images):
                yield images.to(self.device)


class Progress:
    """A progress bar over the scans of an evaluator."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.bar: Any = None

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: self.bar.update())
        engine.add_event_handler(Events.COMPLETED, lambda _: self.bar.close())
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def start(self, engine: Engine) -> None:
        """Show an empty bar."""
        self.bar = tqdm(total=len(engine.state.dataloader), desc=self.description, unit="scan")  # type: ignore[arg-type]

    def fail(self, engine: Engine, error: BaseException) -> None:
        """Close the bar and raise the error."""
        if self.bar is not None:
            self.bar.close()  # so that the error gets a line of its own
        raise error
