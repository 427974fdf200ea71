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
"""The handler that writes the page of an inference after all scans have been segmented."""

from __future__ import annotations

import os

from ignite.engine import Engine, Events

from shared_iopfl.evaluation.run.folder import finish


class ReportWriter:
    """Write ``report.html`` of an inference after the last scan, and mark the run as finished.

    Args:
        output_dir: Folder of the run.
        ckpt_dir: Folder of the models, whose manifest may hold distributions of measures at the inside sites.
    """

    def __init__(self, output_dir: str | os.PathLike, ckpt_dir: str | os.PathLike | None = None) -> None:
        self.output_dir = output_dir
        self.ckpt_dir = ckpt_dir

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        # drawing modules are imported only after all masks have been written
        from shared_iopfl.report.inference.page import write_inference_report

        write_inference_report(self.output_dir, self.ckpt_dir)
        finish(self.output_dir)
