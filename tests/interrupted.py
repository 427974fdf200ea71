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
"""A tiny federation of two real clients, in this process or in one that is killed or has a limit on file sizes."""

from __future__ import annotations

import inspect
import json
import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typed import typed

from shared_iopfl.data.phantoms.sites import make_prostate_sites
from shared_iopfl.federation.simulation import Federation
from shared_iopfl.utils.errors import one_line_errors

BUNDLE = Path(__file__).parents[1] / "bundles" / "prostate_iopfl"
OVERRIDES: dict[str, Any] = {
    "image_size": 32,
    "features": 4,
    "device": "cpu",
    "fractions": [0.5, 0.25, 0.25],
    "passes": 4,  # over its one training case
    "batch_size": 2,
    "verbose": False,
    "save_checkpoints": False,
    "tensorboard": False,
}


@dataclass(frozen=True)
class TinyRun:
    """Sites A and B, each with two steps in a round."""

    dataset_dir: Path

    @classmethod
    def make(cls, folder: Path) -> TinyRun:
        make_prostate_sites(folder, sites=("A", "B"), cases=4, size=(32, 32, 8))
        return cls(folder)

    def federation(self, output_dir: Path, **options: Any) -> Federation:
        """Options are arguments of `Federation` or, if it has none of that name, overrides of the training config."""
        own = {name: options.pop(name) for name in list(options) if name in inspect.signature(Federation).parameters}
        overrides = {**OVERRIDES, "dataset_dir": str(self.dataset_dir), **options}
        settings: dict[str, Any] = {"rounds": 4, "val_interval": 0, **own}
        return Federation(str(BUNDLE), ["A", "B"], output_dir=str(output_dir), overrides=overrides, **settings)


@dataclass(frozen=True)
class Ended:
    code: int
    stderr: str


class OneProcess:
    """Runs or resumes a tiny federation in a process of its own."""

    def run(
        self,
        tiny: TinyRun,
        folder: Path,
        stop_after: int | None = None,
        file_size: int | None = None,
        kill_after: float | None = None,
    ) -> Ended:
        """Run to the end, unless it is killed.

        Args:
            tiny: the sites.
            folder: where the run's files go.
            stop_after: it kills itself once this round is over.
            file_size: it may write no file of more bytes; stands for a disk that is full.
            kill_after: it is killed so many seconds after its first round began.
        """
        options = {"stop_after": stop_after, "file_size": file_size, "kill_after": kill_after}
        ended = typed(__file__, tiny.dataset_dir, folder, json.dumps(options))
        return Ended(ended.returncode, ended.stderr)


def _main(dataset_dir: str, folder: str, options: str) -> None:
    limits = json.loads(options)
    one_line_errors(in_any_process=True)
    run = TinyRun(Path(dataset_dir)).federation(Path(folder), resume=True)
    start, run_round = run.start, run.run_round

    def started() -> None:
        start()
        if limits["kill_after"] is not None:
            # a timer whose signal is not handled kills the process at any instruction, as SIGKILL does
            signal.setitimer(signal.ITIMER_REAL, limits["kill_after"])
        if limits["file_size"] is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead of the process
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_size"],) * 2)

    def one_round(bar: Any = None) -> None:
        run_round(bar)
        if run.round == limits["stop_after"]:
            os.kill(os.getpid(), signal.SIGKILL)

    run.start, run.run_round = started, one_round  # type: ignore[method-assign]
    run.run()


if __name__ == "__main__":
    _main(*sys.argv[1:])
