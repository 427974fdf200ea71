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
"""A run of many rounds and a day of many scans: memory, open files and threads stay as they were."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
from interrupted import TinyRun
from monai.bundle import ConfigWorkflow
from monai.utils import set_determinism

from shared_iopfl.evaluation.failed_scans import TolerantEvaluator
from shared_iopfl.federation.simulation import Federation
from shared_iopfl.utils.errors import root_input_error

ROUNDS, SCANS = 100, 250
SETTLED = 0.2  # of a run: caches are full by then
GROWTH = 20  # MB in the rest of it: less than a network's copy a round, or a scan kept, would take
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in /proc"),
]


class Held(NamedTuple):
    """What this process holds."""

    memory: float  # MB
    files: int
    threads: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        return cls(memory, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))


def assert_no_growth(held: dict[int, Held], count: int) -> None:
    early, late = held[round(SETTLED * count)], held[count]
    assert late.memory - early.memory < GROWTH, f"from {early} to {late}"
    assert late.files <= early.files + 1
    assert late.threads <= early.threads


def test_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, held = TinyRun.make(tmp_path / "sites"), dict[int, Held]()
    run_round = Federation.run_round

    def counted(self: Federation, bar: Any = None) -> None:
        run_round(self, bar)
        if self.round in (round(SETTLED * ROUNDS), ROUNDS):
            held[self.round] = Held.now()

    monkeypatch.setattr(Federation, "run_round", counted)
    try:
        tiny.federation(tmp_path / "run", rounds=ROUNDS, val_interval=10, passes=2).run()
    finally:
        set_determinism(None)
    assert_no_growth(held, ROUNDS)
    # as many files at the end as after one round: nothing is kept a round
    assert len([path for path in (tmp_path / "run").rglob("*") if path.is_file()]) < 20


def test_scans(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_config: Callable[..., ConfigWorkflow],
    random_models: Callable[..., Path],
) -> None:
    """A thousandth of them broken, in episodic mode, as a service would meet them."""
    folder, held, rng = tmp_path / "scans", dict[int, Held](), np.random.RandomState(0)
    folder.mkdir()
    for number in range(SCANS - 1):
        scan = rng.rand(12 + number % 7, 12 + number % 5, 1 + number % 4).astype(np.float32)
        nib.save(nib.Nifti1Image(scan, np.diag([-1.0, -1, 3, 1])), folder / f"{number:03d}.nii")
    (folder / "050.bad.nii").write_bytes(b"no scan")
    iteration = TolerantEvaluator._iteration

    def counted(self: TolerantEvaluator, engine: Any, batchdata: dict[str, Any]) -> Any:
        output = iteration(self, engine, batchdata)
        if engine.state.iteration in (round(SETTLED * SCANS), SCANS):
            held[engine.state.iteration] = Held.now()
        return output

    monkeypatch.setattr(TolerantEvaluator, "_iteration", counted)
    options = {"dataset_dir": folder, "ckpt_dir": random_models(tmp_path / "models"), "output_dir": tmp_path / "masks"}
    with pytest.raises(RuntimeError) as raised:
        run_config("inference", overlays=False, **options)
    assert f"1 of {SCANS} scans failed" in str(root_input_error(raised.value))
    assert_no_growth(held, SCANS)
    assert len(list((tmp_path / "masks").glob("*.nii"))) == SCANS - 1
