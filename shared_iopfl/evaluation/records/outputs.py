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
"""Outputs of each scan as it is processed: its mask, its measures, and a step of the progress bar."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from torch import Tensor
from tqdm import tqdm

from shared_iopfl.evaluation.records.growing_tables import GrowingFile, ServedRecorder, served_scans
from shared_iopfl.utils.tables import csv_text


class OutputWriter:
    """Apply transforms that write files, such as `SaveMaskd`, to each output of an evaluator.

    This is a handler, and not a part of the bundle's postprocessing, so that a server that uses the postprocessing
    (MONAI Label) writes no further files.

    Args:
        transforms: Transforms that are applied in order to each case's batch and output; the keys that they add are
            added to the output.
    """

    def __init__(self, transforms: Sequence[Callable[[dict], Mapping]]) -> None:
        self.transforms = [transform for transform in transforms if transform is not None]  # a config may disable one

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        for batch, output in served_scans(engine):
            data = {**batch, **output}
            for transform in self.transforms:
                data = dict(transform(data))
            output.update({key: value for key, value in data.items() if key not in batch})


class MeasureRecorder(ServedRecorder):
    """Write ``measures.csv`` as scans are processed: clinical measures of each mask, which need no reference.

    Args:
        output_dir: Folder of the file.
        measures: Name -> function of the binary mask (T, *spatial) in the scan's own grid.
    """

    def __init__(self, output_dir: str, measures: Mapping[str, Callable[[Tensor], float]]) -> None:
        self.output_dir = Path(output_dir)
        self.measures = dict(measures)
        self.columns = ("case", *self.measures)
        self.file: GrowingFile

    def start(self, engine: Engine) -> None:
        """Discard the rows of an earlier run of the engine."""
        self.file = GrowingFile(self.output_dir / "measures.csv", csv_text(self.columns, []))

    def record(self, engine: Engine) -> None:
        """Measure the masks of this iteration."""
        rows = []
        for batch, output in served_scans(engine):
            values = {name: f"{measure(output['pred']):.4f}" for name, measure in self.measures.items()}
            rows.append({"case": batch["case"], **values})
        self.file.add(csv_text(self.columns, rows, header=False))
        self.newest = [row["case"] for row in rows]

    def take_back(self) -> None:
        """Remove the row of the last scan, whose mask could not be written."""
        self.file.take_back()


class Progress:
    """A progress bar over the scans of an evaluator.

    ignite's `ProgressBar` shows nothing before the first scan is done, and is not closed if a run raises an exception.

    Args:
        description: Text before the bar.
    """

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
            self.bar.close()  # so that the error is printed on a separate line
        raise error
