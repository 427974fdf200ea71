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
"""The routes of each scan, or of a site, whose network is made from its scans before the first one is processed."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from shared_iopfl.data.scan_names import case_name
from shared_iopfl.evaluation.records.growing_tables import GrowingFile, ServedRecorder, served_scans
from shared_iopfl.inferers.members import load_members
from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.models.files import load_weights, save_atomically
from shared_iopfl.utils.tables import csv_text, json_text, write_json, write_rows

SITE_SCANS = 128  # enough scans to represent a site
ROUTES = ("case", "layer", "expert", "weight")


class RoutesRecorder(ServedRecorder):
    """Write ``routes.json`` and ``routes.csv`` as scans are processed: the experts and the decision on adaptation.

    The complete report of a scan is added to the engine's output as "report", for the handlers that follow.

    Args:
        inferer: Inferer whose reports are written.
        output_dir: Folder of the files.
    """

    def __init__(self, inferer: TestTimeRoutingInferer, output_dir: str) -> None:
        self.inferer = inferer
        self.output_dir = Path(output_dir)
        self.cases: dict[str, dict[str, Any]] = {}
        self.files: list[GrowingFile] = []

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        super().attach(engine)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def start(self, engine: Engine) -> None:
        """Discard the routes of an earlier run of the engine."""
        self.cases, self.files = {}, []
        self.inferer.reports.clear()

    def record(self, engine: Engine) -> None:
        """Record the inferer's reports on the scans of this iteration."""
        routed = {}
        for batch, output in served_scans(engine):
            if self.inferer.reports:
                report = output["report"] = self.inferer.reports.popleft()
                if "routes" in report:
                    routed[reported_case(batch)] = report
        if routed:
            self._grow(routed)
            self.cases.update(routed)
            self.newest = list(routed)

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
        for file in self.files:
            file.take_back()

    def write(self, engine: Engine) -> None:
        """Write ``routes.json`` and ``routes.csv``."""
        write_routes(self.cases, self.output_dir)


def reported_case(batch: Mapping[str, Any]) -> str:
    """Return the name of a scan of an evaluator's batch in the tables."""
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


@dataclass(eq=False)
class SiteFitter:
    """In mode "site", make a network from the site's scans before the first scan is processed.

    Of many scans, 128 are used, evenly spaced. If none can be loaded, no network is made, and each scan fails later.

    Args:
        inferer: Inferer, whose mode "site" activates this handler.
        network: The global model.
        site_model: File of the site's network, its state_dict. If it exists, that network is used; otherwise it is made
            and written. With "", a new network is made from the current scans and written as ``site.pt`` in
            `output_dir`.
        output_dir: Folder of ``routes.json`` and ``routes.csv`` of the site.
        device: Device of the scans.
        image_key: Key of the scans in the evaluator's batches.
    """

    inferer: TestTimeRoutingInferer
    network: nn.Module
    site_model: str
    output_dir: str
    device: torch.device | str = "cpu"
    image_key: str = "image"

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
        """Yield the scans that can be loaded, (1, C, *spatial)."""
        count = len(loader.dataset)
        for index in range(0, count, math.ceil(count / SITE_SCANS)):
            images = loader.collate_fn([loader.dataset[index]])[self.image_key]
            if len(images):
                yield images.to(self.device)
