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
"""Real clients: an exception within a round, what leaves a site, a full disk, and a killed process."""

from __future__ import annotations

import copy
import hashlib
import itertools
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_clients import State, equal
from interrupted import OneProcess, TinyRun
from monai.utils import set_determinism
from torch import Tensor

from shared_iopfl.federation.averaging import average_updates
from shared_iopfl.federation.simulation import SiteClient
from shared_iopfl.models.files import load_weights
from shared_iopfl.utils.tables import read_rows

KILLS = 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("sites"))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert OneProcess().run(tiny, folder).code == 0
    return folder


@pytest.fixture
def _process_as_it_was() -> Iterator[None]:
    yield
    set_determinism(None)


@pytest.mark.slow
@pytest.mark.usefixtures("_process_as_it_was")
def test_site_that_fails_in_the_middle_of_a_round_trains_again_in_the_next(tiny, tmp_path, monkeypatch):
    """ignite considers the failed run as started; the results are those of a site that was not asked in that round."""
    asleep = tiny.federation(tmp_path / "asleep", rounds=3, min_sites=1)
    asleep.start()
    weights = asleep.weights
    for number in (1, 2, 3):
        there = ["A"] if number == 2 else ["A", "B"]
        updates = {site: asleep.clients[site].train(weights) for site in there}
        weights = average_updates(updates, {site: asleep.clients[site].cases for site in there})

    run = tiny.federation(tmp_path / "run", rounds=3, min_sites=1, val_interval=1)
    start = run.start

    def start_with_a_fault() -> None:
        start()
        trainer: Any = run.clients["B"].algo.trainer
        evaluator: Any = run.clients["B"].algo.evaluator
        # B's second round, last batch; its second scoring
        for engine, at in ((trainer, 2 * len(trainer.data_loader)), (evaluator, len(evaluator.data_loader) + 1)):
            inferer, calls = engine.inferer, itertools.count(1)

            def broken(*args: Any, inferer=inferer, calls=calls, at=at, **kwargs: Any) -> Tensor:
                if next(calls) == at:
                    raise RuntimeError("out of memory")
                return inferer(*args, **kwargs)

            engine.inferer = broken

    monkeypatch.setattr(run, "start", start_with_a_fault)
    assert equal(run.run(), weights)
    for site in "AB":
        assert equal(run.clients[site].personalised, asleep.clients[site].personalised)
    failures = [(row["round"], row["site"]) for row in read_rows(tmp_path / "run" / "failures.csv")]
    assert failures == [("1", "B"), ("2", "B")]
    # the metrics of the next round are measured again
    last = [row for row in read_rows(tmp_path / "run" / "history.csv") if (row["round"], row["site"]) == ("3", "B")]
    scored = {row["model"]: float(row["value"]) for row in last if row["metric"] == "val_mean_dice"}
    assert scored["global"] == pytest.approx(asleep.clients["B"].validate(weights)["val_mean_dice"])


@pytest.mark.slow
@pytest.mark.usefixtures("_process_as_it_was")
def test_only_local_weights_and_figures_leave_a_site(tiny, tmp_path, monkeypatch):
    """Check everything that a client returns while the rounds run, except for its own folder and checkpoint.

    No tensor is the personalised model's, or shares its memory; no word but the names of weights and of figures.
    """
    received: list[tuple[str, int, Any]] = []

    def recording(name: str) -> None:
        method = getattr(SiteClient, name)

        def recorded(self: SiteClient, *args: Any) -> Any:
            result = method(self, *args)
            trainer: Any = self.algo.trainer
            received.append((f"{self.site} {name}", trainer.state.epoch, result))
            if name == "train":
                kept[self.site, trainer.state.epoch] = copy.deepcopy(dict(self.personalised))
                local[self.site, trainer.state.epoch] = copy.deepcopy(dict(trainer.network.state_dict()))
                for tensor in result.values():
                    addresses = {own.untyped_storage().data_ptr() for own in self.personalised.values()}
                    assert tensor.untyped_storage().data_ptr() not in addresses
            return result

        monkeypatch.setattr(SiteClient, name, recorded)

    kept: dict[tuple[str, int], State] = {}
    local: dict[tuple[str, int], State] = {}
    for name in ("train", "metrics", "validate"):
        recording(name)
    # a long moving average from the first round on, so that the personalised model differs from the local one
    run = tiny.federation(tmp_path, rounds=3, val_interval=1, alpha=0.9, start_epoch=0)
    run.run()

    assert {who.split()[1] for who, _, _ in received} == {"train", "metrics", "validate"}
    figures = {"train_loss", "learning_rate", "val_mean_dice"}
    for who, epoch, result in received:
        site, name = who.split()
        if name != "train":
            assert set(result) <= figures
            assert all(type(value) is float for value in result.values())
            continue
        assert list(result) == list(run.weights)
        assert all(type(tensor) is Tensor for tensor in result.values())
        assert equal(result, local[site, epoch])
        if epoch > 1:
            for key, tensor in result.items():
                if tensor.is_floating_point() and tensor.numel() > 1:
                    assert not torch.equal(tensor, kept[site, epoch][key]), key
    # the server reads only one other value: the number of cases
    assert all(type(client.cases) is int for client in run.clients.values())


# ---- a full disk ----------------------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.*")}


@pytest.mark.slow
@pytest.mark.parametrize("full_for", ["checkpoint", "model", "everything"])
def test_full_disk_ends_the_run_with_one_line_and_the_last_round_is_kept(full_for, tiny, whole, tmp_path):
    """With a limit on file sizes: the line says where, no incomplete file is left, and the run can be resumed."""
    process, folder = OneProcess(), tmp_path / "run"
    assert process.run(tiny, folder, stop_after=2).code != 0
    before = digests(folder)
    model, checkpoint = (whole / "models" / "model_A.pt").stat().st_size, (folder / "federation.pt").stat().st_size
    limit = {"checkpoint": checkpoint - 4096, "model": model - 1024, "everything": 64}[full_for]
    assert full_for != "checkpoint" or limit > model
    ended = process.run(tiny, folder, file_size=limit)
    assert ended.code == 1
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert "cannot write to" in line and str(tmp_path / "run") in line
    assert "Traceback" not in ended.stderr
    assert digests(folder)["federation.pt"] == before["federation.pt"]
    assert [path for path in folder.rglob(".*") if path.is_file()] == []
    assert process.run(tiny, folder).code == 0
    for name in ("model.pt", "model_A.pt", "model_B.pt"):
        assert equal(load_weights(folder / "models" / name), load_weights(whole / "models" / name))


# ---- killed ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_that_is_killed_at_random_moments_and_resumed_gives_the_results_of_an_uninterrupted_one(
    tiny, whole, tmp_path
):
    """After a process was killed repeatedly, the weights are the same to the bit, and no temporary files are left."""
    process, moments, folder = OneProcess(), random.Random(0), tmp_path / "run"
    killed = 0
    for _ in range(KILLS):
        ended = process.run(tiny, folder, kill_after=moments.uniform(0.05, 0.9))
        killed += ended.code == -signal.SIGALRM
        if ended.code == 0:  # it finished: start again
            shutil.rmtree(folder)
    assert killed >= KILLS // 2
    assert process.run(tiny, folder).code == 0
    assert [path for path in folder.rglob(".*") if path.is_file()] == []
    for name in ("model.pt", "model_A.pt", "model_B.pt"):
        assert equal(load_weights(folder / "models" / name), load_weights(whole / "models" / name))
