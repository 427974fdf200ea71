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
"""A run's folder: existing files are kept, a second run reports what it found, and two runs at a time do not mix."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared_iopfl.data.scan_files import WRITTEN
from shared_iopfl.evaluation.run import folder as run_folder
from shared_iopfl.evaluation.run.folder import claim, claim_training, describe, finish, release
from shared_iopfl.evaluation.run.written import Written
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import keepers, write_text

HOLDER = (
    "import sys; from shared_iopfl.evaluation.run.folder import claim; "
    "claim('inference', sys.argv[1]); print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture(autouse=True)
def _given_back() -> Iterator[None]:
    yield
    for folder in list(run_folder._held):
        release(folder)
    assert not keepers


def a_run(folder: Path, *names: str, kind: str = "inference") -> Path:
    """Create the folder of an earlier run."""
    claim(kind, folder)
    for name in names or ("A.nii.gz", "routes.csv"):
        write_text(folder / name, name)
    finish(folder)
    release(folder)
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_new_folder_is_claimed_and_released(tmp_path: Path) -> None:
    a_run(tmp_path / "new" / "out", "A.nii.gz")
    assert files(tmp_path / "new" / "out") == {"A.nii.gz", "run.json", WRITTEN}
    assert json.loads((tmp_path / "new" / "out" / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("name", ["scan.nii.gz", "images/eye.jpg", "a/b/slice.dcm", "routes.csv", "run.json", WRITTEN])
def test_a_file_of_other_origin_that_a_run_could_overwrite_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds {name}, which no run is known to have written"):
        claim("inference", tmp_path, overwrite=True)
    assert files(tmp_path) == {name}
    assert (tmp_path / name).read_text() == "mine"


def test_other_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    claim("inference", tmp_path)
    with pytest.raises(InputError, match="was there before this run"):
        write_text(tmp_path / "notes.txt", "no longer")
    release(tmp_path)
    claim("inference", tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_folder_of_an_earlier_run_needs_overwrite(tmp_path: Path) -> None:
    a_run(tmp_path)
    with pytest.raises(InputError, match=r"holds an inference \(finished, 3 files\).*--overwrite True\.$"):
        claim("inference", tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = files(tmp_path)
    claim("inference", tmp_path, overwrite=True)
    assert files(tmp_path) - {".run.lock"} == before  # until there is something to put in its place
    write_text(tmp_path / "B.nii.gz", "B")
    assert files(tmp_path) - {".run.lock"} == {"B.nii.gz", "notes.txt", "run.json", WRITTEN}
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "unfinished"


def test_training_replaces_an_earlier_run_at_once(tmp_path: Path) -> None:
    a_run(tmp_path, "history.csv", kind="federate")
    claim("federate", tmp_path, overwrite=True)
    assert files(tmp_path) - {".run.lock"} == {"run.json", WRITTEN}


def test_another_kind_of_run_is_never_replaced(tmp_path: Path) -> None:
    a_run(tmp_path, "models/model.pt", kind="federate")
    with pytest.raises(InputError, match=r"holds a federation .*: choose another output_dir"):
        claim("inference", tmp_path, overwrite=True)
    assert (tmp_path / "models" / "model.pt").is_file()


def test_a_mask_that_was_corrected_by_hand_is_kept(tmp_path: Path) -> None:
    a_run(tmp_path)
    (tmp_path / "A.nii.gz").write_text("better")
    with pytest.raises(InputError, match=r"A.nii.gz was changed since"):
        claim("inference", tmp_path, overwrite=True)
    assert files(tmp_path) == {"A.nii.gz", "routes.csv", "run.json", WRITTEN}


def test_list_entries_outside_the_folder_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "mine.nii.gz").write_text("mine")
    out = a_run(tmp_path / "out")
    (out / "link").symlink_to(tmp_path)
    with open(out / WRITTEN, "a") as file:
        for name in ("../mine.nii.gz", str(tmp_path / "mine.nii.gz"), "link/mine.nii.gz"):
            file.write(json.dumps({"file": name}) + "\n")
        file.write('{"file": 3}\n[[\n{"file": "A.')
    claim("inference", out, overwrite=True)
    finish(out)
    assert (tmp_path / "mine.nii.gz").read_text() == "mine"
    assert not (out / "A.nii.gz").exists()


@pytest.mark.parametrize(
    ("output", "where"), [("data", "the same as"), ("data/images", "inside"), (".", "around"), ("link", "the same")]
)
def test_the_folders_of_run_and_data_must_be_separate(output: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    with pytest.raises(InputError, match=f"is {where}"):
        claim("inference", tmp_path / output, tmp_path / "data")
    assert not files(tmp_path)


def test_resuming_needs_the_same_settings(tmp_path: Path) -> None:
    claim("federate", tmp_path, settings={"sites": ["A", "B"], "device": "cpu"})
    write_text(tmp_path / "federation.pt", "")
    (tmp_path / ".0123456789ab_model.pt").touch()
    release(tmp_path)
    with pytest.raises(InputError, match="--overwrite True, or continue it with --resume True"):
        claim("federate", tmp_path, settings={"sites": ["A", "B"]})
    with pytest.raises(InputError, match="was begun with sites"):
        claim("federate", tmp_path, settings={"sites": ["A", "C"]}, resume=True)
    claim("federate", tmp_path, settings={"sites": ("A", "B"), "device": "cuda"}, resume=True)
    write_text(tmp_path / "federation.pt", "newer")
    assert not list(tmp_path.glob(".0*"))


def test_a_run_that_cannot_be_resumed_is_unchanged(tmp_path: Path) -> None:
    """A checkpoint is compared after the folder is claimed: if that fails, a finished run remains finished."""
    claim("federate", tmp_path, settings={"sites": ["A"]})
    describe(tmp_path, {"settings": {"sites": ["A"], "rounds": 2}})
    write_text(tmp_path / "federation.pt", "")
    finish(tmp_path)
    release(tmp_path)
    before = (tmp_path / "run.json").read_text()
    claim("federate", tmp_path, settings={"sites": ["A"]}, resume=True)
    describe(tmp_path, {"settings": {"sites": ["A"], "rounds": 9}})
    release(tmp_path)
    assert (tmp_path / "run.json").read_text() == before
    claim("federate", tmp_path, settings={"sites": ["A"]}, resume=True)
    describe(tmp_path, {"settings": {"sites": ["A"], "rounds": 2}, "machine": "another"})
    write_text(tmp_path / "federation.pt", "newer")
    now = json.loads((tmp_path / "run.json").read_text())
    assert (now["status"], now["machine"], now["settings"]["rounds"]) == ("unfinished", "another", 2)


def test_a_run_whose_report_fails_is_unfinished(tmp_path: Path) -> None:
    """The report shows the status, so it is written when the run is over; its failure is one of the run."""

    def status(folder: str | Path) -> str:
        return str(json.loads((Path(folder) / "run.json").read_text())["status"])

    seen: list[str] = []
    claim("federate", tmp_path)

    def report(folder: str) -> None:
        seen.append(status(folder))
        if len(seen) == 1:
            raise InputError("metrics.csv: no column 'site'")

    with pytest.raises(InputError, match="no column"):
        finish(tmp_path, report)
    assert status(tmp_path) == "unfinished"
    finish(tmp_path, report)
    assert status(tmp_path) == "finished" and seen == ["finished", "finished"]


def test_existing_models_need_overwrite(tmp_path: Path) -> None:
    model = tmp_path / "models" / "model.pt"
    write_text(model, "shipped")
    with pytest.raises(InputError, match=r"model.pt already exists.*--overwrite True"):
        claim_training(tmp_path / "out", tmp_path / "data", [model])
    claim_training(tmp_path / "out", tmp_path / "data", [model], overwrite=True)
    assert model.read_text() == "shipped"


def test_evaluations_can_share_a_folder_but_not_a_part(tmp_path: Path) -> None:
    a_run(tmp_path, "models/model.pt", kind="federate")
    for part in ("masks/A/global", "masks/A/routed"):
        claim("evaluate", tmp_path, part=tmp_path / part)
        write_text(tmp_path / part / "Case00.nii.gz", "")
        release(tmp_path)
    with pytest.raises(InputError, match="holds an evaluation of this model"):
        claim("evaluate", tmp_path, part=tmp_path / "masks/A/global")
    claim("evaluate", tmp_path, part=tmp_path / "masks/A/global", overwrite=True)
    write_text(tmp_path / "metrics.csv", "")
    assert not (tmp_path / "masks/A/global").exists()
    assert (tmp_path / "masks/A/routed/Case00.nii.gz").exists()
    assert json.loads((tmp_path / "run.json").read_text())["kind"] == "federate"


def test_a_second_run_is_rejected_until_the_first_has_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"in use by another run .process {holder.pid}."):
            claim("inference", tmp_path, overwrite=True)
        holder.kill()
        holder.wait()
        assert (tmp_path / ".run.lock").exists()
        claim("inference", tmp_path)


def test_a_file_is_listed_before_it_gets_its_name(tmp_path: Path) -> None:
    claim("inference", tmp_path)
    (tmp_path / "sub").write_text("")  # where the folder of the next file should be
    with pytest.raises(InputError):
        write_text(tmp_path / "sub" / "A.nii.gz", "")
    write_text(tmp_path / "B.nii.gz", "")
    assert set(Written(tmp_path).files) == {"run.json", "B.nii.gz"}
