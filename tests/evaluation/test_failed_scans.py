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
"""All scans of a folder are processed: failures are listed, and only errors that would recur end the run."""

from __future__ import annotations

import csv
import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.transforms import Compose
from tiny_scans import VALUES, nifti

from shared_iopfl.data.loading import LoadCased
from shared_iopfl.data.masks import SaveMaskd
from shared_iopfl.data.scan_files import find_scans
from shared_iopfl.evaluation.failed_scans import (
    Failure,
    ScanWriter,
    TolerantDataset,
    TolerantEvaluator,
    tolerant_collate,
)
from shared_iopfl.evaluation.records import MeasureRecorder, RoutesRecorder
from shared_iopfl.evaluation.records.growing_tables import ServedEvents
from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.utils.errors import InputError, root_input_error

Fault = Callable[[str], None]


def no_fault(case: str) -> None:
    """Leave the scan unchanged."""


def fault(case: str, error: BaseException) -> Fault:
    def raise_for(name: str) -> None:
        if name == case:
            raise error

    return raise_for


class Inferer(TestTimeRoutingInferer):
    """Foreground is what is bright; leaves a report of each scan, as routing does, before it may fail."""

    def __init__(self, fails: Fault) -> None:
        super().__init__()
        self.fails = fails

    def __call__(self, inputs: Any, network: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        case = Path(inputs.meta["filename_or_obj"][0]).name[0]
        self.reports.append({"routes": [[1.0]], "layers": ["all"], "experts": ["global"], "of": case})
        self.fails(case)
        return (inputs > 0.5).to(torch.uint8)


def serve(
    folder: Path, output: Path, loading: Fault = no_fault, inference: Fault = no_fault, writing: Fault = no_fault,
    workers: int = 0,
) -> TolerantEvaluator:  # fmt: skip
    """Process a folder of scans called a, b, c, ... as a bundle does, with a fault at some stage."""

    def at(fails: Fault) -> Callable[[dict], dict]:
        def transform(data: dict) -> dict:
            fails(data["case"])
            return data

        return transform

    inferer = Inferer(inference)
    dataset = TolerantDataset(find_scans(folder), Compose([at(loading), LoadCased("image")]))
    evaluator = TolerantEvaluator(
        output_dir=output,
        device=torch.device("cpu"),
        val_data_loader=DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=tolerant_collate),
        network=torch.nn.Identity(),
        inferer=inferer,
        val_handlers=[ScanWriter([at(writing), SaveMaskd(output_dir=output)]), RoutesRecorder(inferer, str(output))],
    )
    evaluator.logger.setLevel(logging.CRITICAL)
    evaluator.run()
    return evaluator


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "failed.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def masks(output: Path) -> list[str]:
    return sorted(path.name[0] for path in output.glob("*.nii"))


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in "abcd":
        nifti(folder / f"{name}.nii", VALUES)
    return folder


@pytest.mark.parametrize("stage", ["loading", "inference", "writing"])
@pytest.mark.parametrize(
    "error", [InputError("b is blurred:\nscan again"), RuntimeError("sizes differ"), KeyError("x")]
)
def test_a_scan_that_fails_at_any_stage_is_listed_and_the_others_are_written(scans, tmp_path, stage, error):
    output = tmp_path / "out"
    with pytest.raises(InputError, match=r"^1 of 4 scans failed: see .*failed\.csv$"):
        serve(scans, output, **{stage: fault("b", error)})
    assert masks(output) == ["a", "c", "d"]
    (row,) = rows(output)
    assert (row["case"], row["file"]) == ("b", str(scans / "b.nii"))
    told = {
        InputError: "b is blurred: scan again",
        RuntimeError: "RuntimeError: sizes differ",
        KeyError: "KeyError: 'x'",
    }
    assert row["reason"] == told[type(error)]


@pytest.mark.parametrize("stage", ["loading", "inference", "writing"])
def test_the_report_of_a_failed_scan_is_not_used_for_the_next_one(scans, tmp_path, stage):
    output, kept = tmp_path / "out", {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shared_iopfl.evaluation.records.routes.write_routes", lambda cases, _: kept.update(cases))
        with pytest.raises(InputError, match="1 of 4"):
            serve(scans, output, **{stage: fault("b", RuntimeError())})
    assert {case: report["of"] for case, report in kept.items()} == {name: name for name in "acd"}


def test_without_failures_there_is_no_table(scans, tmp_path):
    """The table of an earlier run is removed."""
    (tmp_path / "failed.csv").write_text("case,file,reason\n")
    serve(scans, tmp_path)
    assert masks(tmp_path) == ["a", "b", "c", "d"]
    assert not (tmp_path / "failed.csv").exists()


def test_all_scans_may_fail(scans, tmp_path):
    def nothing_loads(case: str) -> None:
        raise InputError(f"{case} is broken")

    with pytest.raises(InputError, match="4 of 4 scans failed"):
        serve(scans, tmp_path, loading=nothing_loads)
    assert [row["case"] for row in rows(tmp_path)] == ["a", "b", "c", "d"]


def test_failures_are_written_before_the_end_of_the_run(scans, tmp_path):
    """A run that is killed at the third scan has listed the first."""

    def faults(case: str) -> None:
        fault("a", InputError("a is broken"))(case)
        fault("c", KeyboardInterrupt())(case)

    with pytest.raises(KeyboardInterrupt):
        serve(scans, tmp_path, inference=faults)
    assert [row["case"] for row in rows(tmp_path)] == ["a"]


HOPELESS = {
    "memory": MemoryError(),
    "memory of the device": torch.OutOfMemoryError("CUDA out of memory"),
    "memory of a tensor": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    "disk": OSError(errno.ENOSPC, "No space left on device"),
    "the user": KeyboardInterrupt(),
}


@pytest.mark.parametrize("stage", ["loading", "inference", "writing"])
@pytest.mark.parametrize("what", HOPELESS)
def test_errors_that_would_recur_end_the_run(scans, tmp_path, stage, what):
    with pytest.raises(BaseException) as caught:
        serve(scans, tmp_path, **{stage: fault("b", HOPELESS[what])})
    assert "scans failed" not in str(caught.value)
    assert masks(tmp_path) == ["a"]


def test_a_full_disk_ends_the_run_with_its_own_message(scans, tmp_path, monkeypatch):
    def full(array: np.ndarray, source: Path, affine: Any, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shared_iopfl.data.masks._write", full)
    with pytest.raises(InputError, match=r"cannot write to .*No space left"):
        serve(scans, tmp_path)
    assert not (tmp_path / "failed.csv").exists()


def test_a_single_mask_that_cannot_be_written_is_a_failure_of_its_scan(scans, tmp_path, monkeypatch):
    """If a scan disappears or its name is too long, the folder is tested and found writable."""
    write = SaveMaskd.__call__

    def gone(self: SaveMaskd, data: dict) -> dict:
        if data["case"] == "b":
            (scans / "b.nii").unlink()
        return write(self, data)

    monkeypatch.setattr(SaveMaskd, "__call__", gone)
    with pytest.raises(InputError, match="1 of 4"):
        serve(scans, tmp_path)
    assert masks(tmp_path) == ["a", "c", "d"]


@pytest.mark.parametrize("stage", ["loading", "inference"])
def test_the_error_of_a_single_scan_is_raised(scans, tmp_path, stage):
    with pytest.raises(Exception) as caught:
        serve(scans / "b.nii", tmp_path, **{stage: fault("b", InputError("b is blurred"))})
    assert str(root_input_error(caught.value)) == "b is blurred"


def test_failures_in_worker_processes_are_listed(scans, tmp_path):
    """A failure in a worker process is returned with its batch."""
    (scans / "b.nii").write_bytes(b"")
    with pytest.raises(InputError, match="1 of 4"):
        serve(scans, tmp_path, workers=2)
    assert masks(tmp_path) == ["a", "c", "d"]
    assert "0 bytes" in rows(tmp_path)[0]["reason"]


def test_a_batch_contains_the_scans_that_could_be_loaded():
    failure = Failure("b", "b.nii", "broken")
    batch = tolerant_collate([{"image": torch.ones(1, 2), "case": "a"}, failure])
    assert batch["image"].shape == (1, 1, 2)
    assert batch["case"] == ["a"]
    assert batch["failures"] == [failure]
    assert len(tolerant_collate([failure])["image"]) == 0
    assert set(tolerant_collate([{"image": torch.ones(1)}])) == {"image"}


def test_characters_that_a_table_cannot_represent_become_underscores(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in ("a.nii", "b\udcff\n.nii"):
        (folder / name).write_bytes(b"")
    with pytest.raises(InputError, match="2 of 2"):
        serve(folder, tmp_path)
    assert [row["case"] for row in rows(tmp_path)] == ["a", "b__"]
    assert "b_ .nii is empty" in rows(tmp_path)[1]["reason"]


def test_a_scan_that_fails_before_its_row_is_written_removes_no_other_row(tmp_path):
    engine = Engine(lambda *_: None)
    engine.register_events(*ServedEvents)
    MeasureRecorder(str(tmp_path), {"voxels": lambda mask: 1 / mask}).attach(engine)
    engine.fire_event(Events.STARTED)
    for case, voxels in (("a", 4), ("b", 0), ("c", 5)):
        engine.state.batch, engine.state.output = [{"case": case}], [{"pred": voxels}]
        engine.fire_event(Events.ITERATION_STARTED)
        try:
            engine.fire_event(Events.ITERATION_COMPLETED)
        except ZeroDivisionError:
            engine.fire_event(ServedEvents.SCAN_FAILED)
    assert (tmp_path / "measures.csv").read_text() == "case,voxels\na,0.2500\nc,0.2000\n"
