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
"""Sites that fail a round or send what must not be let in; what leaves a site; a disk that is full."""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_clients import SITES, FakeClient, State, by_hand, equal, fakes, make  # noqa: F401
from interrupted import OneProcess, TinyRun
from monai.utils import set_determinism
from networks import unet
from torch import Tensor

from shared_iopfl.errors import InputError, root_input_error
from shared_iopfl.federation import SiteClient, weighted_average
from shared_iopfl.models import load_weights
from shared_iopfl.tables import read_rows
from shared_iopfl.updates import check_update, far_off

KILLS = 12


# ---- what is let in -------------------------------------------------------------------------------------------------


def moved(state: State, distance: float) -> State:
    """The state with one entry moved so far."""
    result = {key: tensor.clone() for key, tensor in state.items()}
    key = next(key for key, tensor in state.items() if tensor.is_floating_point())
    result[key].view(-1)[0] += distance
    return result


@pytest.mark.parametrize(
    "distances, factor, refused",
    [
        ([1, 1, 1], 10, []),
        ([1, 1, 9.9], 10, []),
        ([1, 1, 10.1], 10, ["C"]),
        ([1, 2, 3, 10.1], 5, ["D"]),
        ([1, 1, 1, 100, 200], 10, ["D", "E"]),
        ([1, 1, 1e9], 0, []),
        ([1, 1e9], 10, []),  # two cannot say which of them is off
        ([0, 0, 5], 10, []),  # nobody else moved
        ([0, 5, 5], 10, []),
    ],
)
def test_update_is_far_off_beyond_so_many_times_the_others_median(distances, factor, refused):
    state = dict(unet().state_dict())
    updates = {chr(65 + n): moved(state, distance) for n, distance in enumerate(distances)}
    found = far_off(updates, state, factor)
    assert list(found) == refused
    assert all(f"'{site}'" in str(error) and "max_update_norm" in str(error) for site, error in found.items())


@pytest.mark.parametrize("wrong", [torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.long), [1.0, 1.0]])
def test_update_of_another_kind_is_refused(wrong):
    with pytest.raises(InputError, match=r"'HK' sent .*'w'"):
        check_update("HK", {"w": wrong}, {"w": torch.ones(2)})


def test_lower_precision_on_the_way_is_let_in():
    check_update("HK", {"w": torch.ones(2, dtype=torch.bfloat16)}, {"w": torch.ones(2)})


# ---- rounds that go on without a site -------------------------------------------------------------------------------


def raising(update: State) -> State:
    raise RuntimeError("CUDA out of memory:\ntried a lot")


def no_data(update: State) -> State:
    raise InputError("site 'B' has no training cases in /data/B.")


SPOILT: dict[str, tuple[Callable[[State], Any], str]] = {
    "raises": (raising, "RuntimeError: CUDA out of memory: tried a lot"),
    "no data": (no_data, "no training cases"),
    "nan": (lambda update: {**update, "0.bias": update["0.bias"] * torch.nan}, "NaN or infinite values in '0.bias'"),
    "inf": (lambda update: {**update, "0.bias": update["0.bias"] + torch.inf}, "NaN or infinite values in '0.bias'"),
    "shape": (lambda update: {**update, "0.bias": update["0.bias"][:1]}, "of shape (1,)"),
    "missing": (lambda update: {key: update[key] for key in update if key != "0.bias"}, "'0.bias'"),
    "extra": (lambda update: {**update, "more": torch.ones(1)}, "'more'"),
    "far": (lambda update: {**update, "0.bias": update["0.bias"] + 1000}, "of norm"),
    "nothing": (lambda update: None, "TypeError"),
}


def spoil(monkeypatch: pytest.MonkeyPatch, faults: Mapping[tuple[str, int], Callable[[State], Any]]) -> None:
    """Let sites fail in their n-th training, counted over all rounds, failed ones too."""
    train, calls = FakeClient.train, dict.fromkeys(SITES, 0)

    def spoilt(self: FakeClient, weights: Mapping[str, Tensor]) -> Any:
        calls[self.site] += 1
        update = train(self, weights)
        fault = faults.get((self.site, calls[self.site]))
        return fault(update) if fault else update

    monkeypatch.setattr(FakeClient, "train", spoilt)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("fault", SPOILT)
def test_round_goes_on_without_a_site_that_fails_and_it_comes_back(fault, tmp_path, monkeypatch, caplog):
    """Weights, the site's own state, history, log and failures.csv: as if the site had slept through that round."""
    expected, clients = by_hand(tmp_path / "hand", {2: "B"})
    spoil(monkeypatch, {("B", 2): SPOILT[fault][0]})
    run = make(tmp_path / "run")
    with caplog.at_level(logging.WARNING, logger="shared_iopfl"):
        assert equal(run.run(), expected)
    assert run.clients["B"].state_dict()["epoch"] == 2
    assert equal(run.clients["B"].personalised, clients["B"].personalised)
    assert equal(load_weights(tmp_path / "run" / "models" / "model_B.pt"), clients["B"].personalised)

    [failure] = read_rows(tmp_path / "run" / "failures.csv")
    assert (failure["round"], failure["site"]) == ("2", "B")
    assert SPOILT[fault][1] in failure["reason"]
    [line] = [record.getMessage() for record in caplog.records if "goes on without" in record.getMessage()]
    assert "'B'" in line and SPOILT[fault][1] in line and "\n" not in line
    history = read_rows(tmp_path / "run" / "history.csv")
    failed = [(row["round"], row["site"], row["value"]) for row in history if row["metric"] == "failed"]
    assert failed == [("2", "B", "1.0")]
    told = {(row["round"], row["site"]) for row in history if row["metric"] == "train_loss"}
    assert told == {(str(number), site) for number in (1, 2, 3) for site in SITES} - {("2", "B")}


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("fault", SPOILT)
def test_by_default_every_site_must_deliver(fault, tmp_path, monkeypatch):
    """The run ends with the site's own error, and goes on from the last round to the weights of an undisturbed run."""
    whole = make(tmp_path / "whole", min_sites=0).run()
    with monkeypatch.context() as patch:
        spoil(patch, {("B", 2): SPOILT[fault][0]})
        with pytest.raises((InputError, RuntimeError, TypeError)) as raised:
            make(tmp_path / "run", min_sites=0).run()
    assert SPOILT[fault][1].split(": ")[-1] in " ".join(f"{type(raised.value).__name__} {raised.value}".split())
    assert not (tmp_path / "run" / "failures.csv").exists()
    assert equal(make(tmp_path / "run", min_sites=0, resume=True).run(), whole)


@pytest.mark.usefixtures("fakes")
def test_too_few_sites_end_the_run_in_one_line_that_tells_all_reasons(tmp_path, monkeypatch):
    """And the last good round stays, from which it goes on."""
    whole = make(tmp_path / "whole").run()
    with monkeypatch.context() as patch:
        spoil(patch, {("B", 2): raising, ("D", 2): SPOILT["nan"][0]})
        with pytest.raises(InputError) as raised:
            make(tmp_path / "run").run()
    line = str(root_input_error(raised.value))
    assert "round 2" in line and "min_sites 3" in line and "\n" not in line
    assert "'B': RuntimeError" in line and "'D': site 'D' sent NaN" in line
    assert equal(make(tmp_path / "run", resume=True).run(), whole)


@pytest.mark.usefixtures("fakes")
def test_failures_of_many_rounds_are_all_counted_over_a_resumption(tmp_path, monkeypatch):
    """Each site fails once in a run of four rounds that is interrupted after the second."""
    absent = {1: "A", 2: "B", 3: "C", 4: "D"}
    expected, _ = by_hand(tmp_path / "hand", absent, rounds=4)
    faults = {(site, number): SPOILT["nan"][0] for number, site in absent.items()}

    def power_cut(update: State) -> State:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        spoil(patch, {**faults, ("A", 3): power_cut})
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "run", rounds=4).run()
    spoil(monkeypatch, {("C", 1): SPOILT["nan"][0], ("D", 2): SPOILT["nan"][0]})
    assert equal(make(tmp_path / "run", rounds=4, resume=True).run(), expected)
    rows = [(int(row["round"]), row["site"]) for row in read_rows(tmp_path / "run" / "failures.csv")]
    assert rows == list(absent.items())


@pytest.mark.usefixtures("fakes")
def test_site_that_fails_every_round_gets_no_model_and_is_named(tmp_path, monkeypatch):
    """An untrained network must not pass as its expert; the others' models are there."""
    spoil(monkeypatch, {("C", number): SPOILT["nan"][0] for number in (1, 2, 3)})
    with pytest.raises(InputError, match="'C' failed all 3 rounds"):
        make(tmp_path).run()
    models = {path.name for path in (tmp_path / "models").glob("*.pt")}
    assert models == {"model.pt", "model_A.pt", "model_B.pt", "model_D.pt"}


@pytest.mark.usefixtures("fakes")
def test_site_that_cannot_be_scored_is_left_out_of_scoring_alone(tmp_path, monkeypatch):
    """Its training counts, its validation is missing from the history, and it judges no model."""
    whole = make(tmp_path / "whole").run()
    validate = FakeClient.validate

    def broken(self: FakeClient, weights: Mapping[str, Tensor]) -> dict[str, float]:
        if self.site == "B":
            raise OSError("disk of B")
        return validate(self, weights)

    monkeypatch.setattr(FakeClient, "validate", broken)
    assert equal(make(tmp_path / "run").run(), whole)
    history = read_rows(tmp_path / "run" / "history.csv")
    assert {row["site"] for row in history if row["metric"] == "val_mean_dice"} == set(SITES) - {"B"}
    assert len(read_rows(tmp_path / "run" / "failures.csv")) == 3
    assert (tmp_path / "run" / "models" / "model_B.pt").is_file()


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("step", ["validate", "shift"])
def test_site_that_fails_when_the_models_are_judged_judges_none_and_is_named(step, tmp_path, monkeypatch):
    run = make(tmp_path)
    run.run()
    models = {"global": run.weights, **{site: run.clients[site].personalised for site in SITES}}
    expected = run._scores(models, [site for site in SITES if site != "B"])
    ours = getattr(FakeClient, step)

    def broken(self: FakeClient, weights: Mapping[str, Tensor]) -> Any:
        if self.site == "B":
            raise OSError("disk of B")
        return ours(self, weights)

    monkeypatch.setattr(FakeClient, step, broken)
    assert run._scores(models, SITES) == expected
    assert [row["site"] for row in read_rows(tmp_path / "failures.csv")] == ["B"]


@pytest.mark.usefixtures("fakes")
def test_failures_of_an_earlier_run_do_not_stay(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, {("B", 2): raising})
        make(tmp_path).run()
    make(tmp_path).run()
    assert read_rows(tmp_path / "failures.csv") == []


@pytest.mark.usefixtures("fakes")
def test_bounds_out_of_range_are_refused(tmp_path):
    wrong: list[dict[str, Any]] = [{"min_sites": -1}, {"min_sites": 5}, {"min_sites": 0.5}, {"max_update_norm": -1.0}]
    for given in [*wrong, {"max_update_norm": float("nan")}]:
        with pytest.raises(InputError, match=next(iter(given))):
            make(tmp_path, **given)


# ---- with real clients ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return TinyRun.make(tmp_path_factory.mktemp("sites"))


@pytest.fixture
def _process_as_it_was() -> Iterator[None]:
    yield
    set_determinism(None)


@pytest.mark.slow
@pytest.mark.usefixtures("_process_as_it_was")
def test_real_site_that_breaks_off_in_the_middle_of_a_round_trains_again_in_the_next(tiny, tmp_path, monkeypatch):
    """ignite keeps a run that raised as begun; weights and personalised models are those of a site that was asleep."""
    asleep = tiny.federation(tmp_path / "asleep", rounds=3, min_sites=1)
    asleep.start()
    weights = asleep.weights
    for number in (1, 2, 3):
        there = ["A"] if number == 2 else ["A", "B"]
        updates = {site: asleep.clients[site].train(weights) for site in there}
        weights = weighted_average(updates, {site: asleep.clients[site].cases for site in there})

    run = tiny.federation(tmp_path / "run", rounds=3, min_sites=1, val_interval=1)
    start = run.start

    def start_with_a_fault() -> None:
        start()
        trainer: Any = run.clients["B"].algo.trainer
        evaluator: Any = run.clients["B"].algo.evaluator
        for engine, at in ((trainer, 4), (evaluator, 2)):  # B's second round, second batch; its second scoring
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
    # the figures of the round after are measured anew
    last = [row for row in read_rows(tmp_path / "run" / "history.csv") if (row["round"], row["site"]) == ("3", "B")]
    scored = {row["model"]: float(row["value"]) for row in last if row["metric"] == "val_mean_dice"}
    assert scored["global"] == pytest.approx(asleep.clients["B"].validate(weights)["val_mean_dice"])


@pytest.mark.slow
@pytest.mark.usefixtures("_process_as_it_was")
def test_only_local_weights_and_figures_leave_a_site(tiny, tmp_path, monkeypatch):
    """All that a client returns while the rounds run, but for what the site's own folder and checkpoint keep.

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
    # with a long memory from the first round on, the personalised model is not the local one
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
    # the same of the only other thing that the aggregator asks: a number of cases
    assert all(type(client.cases) is int for client in run.clients.values())


# ---- a full disk ----------------------------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.*")}


@pytest.mark.slow
@pytest.mark.parametrize("full_for", ["checkpoint", "model", "everything"])
def test_full_disk_ends_the_run_in_one_line_and_the_last_round_stays(full_for, tiny, tmp_path):
    """A process that may write no larger file: the line says where; nothing half written is left; it goes on."""
    process = OneProcess()
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert process.run(tiny, whole).code == 0
    assert process.run(tiny, folder, stop_after=2).code != 0
    before = digests(folder)
    model, checkpoint = (folder / "models" / "model_A.pt").stat().st_size, (folder / "federation.pt").stat().st_size
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
def test_killed_at_random_moments_and_resumed_a_run_ends_as_an_undisturbed_one(tiny, tmp_path):
    """A process that dies, again and again, at any instruction; then the same weights to the bit, and no litter."""
    process, moments = OneProcess(), random.Random(0)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert process.run(tiny, whole).code == 0
    killed = 0
    for _ in range(KILLS):
        ended = process.run(tiny, folder, kill_after=moments.uniform(0.05, 0.9))
        killed += ended.code == -signal.SIGALRM
        if ended.code == 0:  # it came to its end: from the start again
            shutil.rmtree(folder)
    assert killed >= KILLS // 2
    assert process.run(tiny, folder).code == 0
    assert [path for path in folder.rglob(".*") if path.is_file()] == []
    for name in ("model.pt", "model_A.pt", "model_B.pt"):
        assert equal(load_weights(folder / "models" / name), load_weights(whole / "models" / name))
