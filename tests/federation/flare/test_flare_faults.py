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
"""With NVIDIA FLARE, rounds continue without sites that fail or send wrong updates, and a run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("nvflare", reason="NVIDIA FLARE is not installed: pip install '.[flare]'")

from flare_here import FakeClient, _dataset, _fake, _process_as_it_was, flare_run, received, run_here  # noqa: F401
from flare_runs import SITES, TINY, assert_same, figures
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel

from shared_iopfl.evaluation.run.folder import release
from shared_iopfl.federation.flare import client as flare_client
from shared_iopfl.federation.flare import persistor
from shared_iopfl.federation.flare.client import Member
from shared_iopfl.federation.flare.persistor import ServerFiles
from shared_iopfl.federation.flare.results import collect
from shared_iopfl.federation.flare.server import Rounds
from shared_iopfl.models.files import load_weights
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import read_rows

LENIENT = {**TINY, "device": "cpu", "min_sites": 1}


def failed(output_dir: Path) -> list[tuple[str, str]]:
    rows = read_rows(output_dir / "history.csv")
    return [(row["round"], row["site"]) for row in rows if row["metric"] == "failed"]


def test_site_that_fails_is_left_out_of_the_round_and_rejoins_with_its_earlier_state(
    dataset, tmp_path, fake, monkeypatch
):
    train = fake.train

    def out_of_memory(self: FakeClient, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        update = train(self, weights)
        if self.site == "A" and self.epoch == 2 and not broken:
            broken.append(self)
            raise RuntimeError(f"no memory for {dataset}/A/Case00.nii.gz")
        return update

    broken: list[FakeClient] = []
    monkeypatch.setattr(fake, "train", out_of_memory)
    run = flare_run(tmp_path / "flare", dataset, rounds=3, settings=LENIENT)
    rounds = run_here(run, tmp_path / "work")
    run._finish(tmp_path / "work")
    assert failed(tmp_path / "flare") == [("2", "A")]
    (told,) = rounds.told
    assert all(word in told for word in ("Round 2", "'A'", "RuntimeError"))
    for _, _, reply in rounds.wire.answers:
        assert "Case00" not in str(reply.meta) + str(reply.metrics), "what an error says stays at the site"
    losses = {
        (row["round"], row["site"]): float(row["value"])
        for row in read_rows(tmp_path / "flare" / "history.csv")
        if row["metric"] == "train_loss"
    }
    assert losses == {("1", "A"): 1, ("1", "B"): 1, ("2", "B"): 0.5, ("3", "A"): 0.5, ("3", "B"): 1 / 3}


def test_training_log_at_the_site_has_the_whole_error(dataset, tmp_path, fake, monkeypatch):
    def fail(self: FakeClient, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise InputError("Case00.nii.gz cannot be read")

    monkeypatch.setattr(fake, "train", fail)
    run = flare_run(tmp_path / "flare", dataset)
    run._begin()
    with run._recipe() as recipe:
        recipe.export(str(tmp_path))
    job = json.loads((tmp_path / "prostate_iopfl_federation/app_A/custom/federation.json").read_text())
    member = Member(job, "A")
    with member.own_log():
        reply = member.answer("train", received({}, 0))
    assert (reply.params, reply.metrics, reply.meta) == (None, {}, {"error": "InputError"})
    log = (tmp_path / "flare" / "sites" / "A" / "training.log").read_text()
    assert "Case00.nii.gz cannot be read" in log
    assert "Traceback" in log


def test_too_few_usable_updates_end_the_run_and_finished_rounds_are_kept(dataset, tmp_path, fake):
    def silent_in_round_2(site: str, task: str, number: int, reply: FLModel) -> FLModel | None:
        return None if site == "B" and number == 2 else reply

    run = flare_run(tmp_path / "flare", dataset, rounds=3)
    with pytest.raises(InputError, match="round 2: 1 of 2 sites sent a usable update, fewer than min_sites 2"):
        run_here(run, tmp_path / "work", silent_in_round_2)
    with pytest.raises(InputError, match="stopped after 1 of 3 rounds"):
        run._finish(tmp_path / "work")
    assert load_weights(tmp_path / "flare" / "models" / "model.pt")


def spoil_weight(value: float) -> Callable[[FLModel], None]:
    return lambda reply: reply.params["w"].fill_(value)


BAD_REPLIES: dict[str, Callable[[FLModel], Any]] = {
    "NaN": spoil_weight(float("nan")),
    "infinite": spoil_weight(float("inf")),
    "a key too few": lambda reply: reply.params.pop("w"),
    "a key too many": lambda reply: reply.params.update(patient=torch.zeros(1)),
    "another shape": lambda reply: reply.params.update(w=torch.zeros(3)),
    "no tensor": lambda reply: reply.params.update(w="weights"),
    "no weights": lambda reply: setattr(reply, "params", None),
    "text": lambda reply: reply.metrics.update(patient="John Doe"),
    "a list": lambda reply: reply.metrics.update(train_loss=[1.0]),
    "no cases": lambda reply: reply.meta.update({FLMetaKey.NUM_STEPS_CURRENT_ROUND: 0}),
    "endless cases": lambda reply: reply.meta.update({FLMetaKey.NUM_STEPS_CURRENT_ROUND: float("inf")}),
    "uncounted cases": lambda reply: reply.meta.pop(FLMetaKey.NUM_STEPS_CURRENT_ROUND),
}


@pytest.mark.parametrize("spoil", [None, *BAD_REPLIES.values()], ids=["good", *BAD_REPLIES])
def test_update_that_does_not_fit_is_refused_and_the_others_are_averaged(spoil):
    replies = {
        site: FLModel(
            params={"w": torch.full((2,), float(number)), "n": torch.tensor(number)},
            metrics={"train_loss": 1.0},
            meta={FLMetaKey.NUM_STEPS_CURRENT_ROUND: 1},
        )
        for number, site in enumerate(SITES)
    }
    if spoil is not None:
        spoil(replies["A"])
    told: list[str] = []
    rounds = Rounds(sites=SITES, rounds=1, min_sites=1)
    rounds.persistor, rounds.warning = ServerFiles(), told.append
    rounds._ask = lambda task, model, sites: replies  # type: ignore[method-assign]
    average = rounds._train(FLModel(params={"w": torch.zeros(2), "n": torch.tensor(0)}))
    expected = 0.5 if spoil is None else 1.0
    assert average["w"].tolist() == [expected, expected]
    used = ["A", "B"] if spoil is None else ["B"]
    assert [row["site"] for row in rounds.persistor.history if row["metric"] == "train_loss"] == used
    assert [row["site"] for row in rounds.persistor.history if row["metric"] == "failed"] == ["A"] * (spoil is not None)
    assert all("'A'" in line for line in told)
    assert len(told) == (spoil is not None)


@pytest.mark.parametrize("factor, used", [(10.0, ["A", "B"]), (0.0, ["A", "B", "C"])])
def test_update_that_is_far_off_is_refused_unless_there_is_no_limit(factor, used):
    moved = {"A": 1.0, "B": 2.0, "C": 100.0}
    replies = {
        site: FLModel(params={"w": torch.full((2,), by)}, metrics={}, meta={FLMetaKey.NUM_STEPS_CURRENT_ROUND: 1})
        for site, by in moved.items()
    }
    told: list[str] = []
    rounds = Rounds(sites=list(moved), rounds=1, min_sites=1, max_update_norm=factor)
    rounds.persistor, rounds.warning = ServerFiles(), told.append
    rounds._ask = lambda task, model, sites: replies  # type: ignore[method-assign]
    average = rounds._train(FLModel(params={"w": torch.zeros(2)}))
    assert average["w"].tolist() == pytest.approx([sum(moved[site] for site in used) / len(used)] * 2)
    assert [row["site"] for row in rounds.persistor.failures] == [site for site in moved if site not in used]
    assert all("'C'" in line and "141.4" in line for line in told)


@pytest.mark.parametrize("earlier, refused", [([], True), ([1000.0] * 2, False), ([1.0] * 2, True)])
@pytest.mark.parametrize("averaging", ["mean", "median"])
def test_with_two_sites_the_update_is_limited_by_the_model_and_the_history(earlier, refused, averaging):
    """As in one process. The norm and the number of cases that a site reports have no influence on the limit."""
    said = {"update_norm": 1e9}
    replies = {
        site: FLModel(
            params={"w": torch.full((2,), 1.0 + by)}, metrics=said, meta={FLMetaKey.NUM_STEPS_CURRENT_ROUND: 1}
        )
        for site, by in {"A": 1.0, "B": 1000.0}.items()
    }
    replies["C"] = FLModel(params={"w": torch.ones(2)}, metrics={}, meta={FLMetaKey.NUM_STEPS_CURRENT_ROUND: 1e12})
    rounds = Rounds(sites=["A", "B", "C"], rounds=3, min_sites=1, averaging=averaging)
    rounds.persistor, rounds.warning = ServerFiles(), lambda text: None
    for norm in earlier:
        rounds._note("A", "local", {"update_norm": norm})
    rounds._ask = lambda task, model, sites, **kwargs: replies  # type: ignore[method-assign]
    rounds._train(FLModel(params={"w": torch.ones(2)}))
    assert [row["site"] for row in rounds.persistor.failures] == (["C", "B"] if refused else ["C"])
    kept = [row["value"] for row in rounds.persistor.history if row["metric"] == "update_norm"]
    assert kept[len(earlier) :] == pytest.approx([2**0.5] + [1000 * 2**0.5] * (not refused))


def test_metrics_of_a_validation_that_are_named_as_local_are_left_out():
    replies = {"A": FLModel(metrics={"local/update_norm": 1e9, "local/failed": 1.0, "global/val_mean_dice": 0.5})}
    rounds = Rounds(sites=["A"], rounds=1, min_sites=1)
    rounds.persistor, rounds.round = ServerFiles(), 1
    rounds._note("A", "local", {"train_loss": 1.0})
    rounds._ask = lambda task, model, sites, **kwargs: replies  # type: ignore[method-assign]
    rounds._validate(FLModel(params={}))
    assert [row["metric"] for row in rounds.persistor.history] == ["train_loss", "val_mean_dice"]


class Interrupted(BaseException):
    """Ends a run as a crash of the machine does."""


@pytest.mark.slow
def test_run_that_is_interrupted_anywhere_and_resumed_gives_the_same_weights(dataset, tmp_path, fake, monkeypatch):
    """It is interrupted between any two messages, and before each file that the server or a site writes."""
    instants, end = 0, -1

    def tick(*args: Any) -> Any:
        nonlocal instants
        instants += 1
        if instants == end:
            raise Interrupted
        return args[-1]

    for module in (persistor, flare_client):
        save = module.save_atomically
        monkeypatch.setattr(module, "save_atomically", lambda content, path, save=save: save(tick(content), path))

    def train(output_dir: Path, workspace: Path, resume: bool) -> dict[str, Tensor]:
        run = flare_run(output_dir, dataset, settings={**TINY, "device": "cpu", "resume": resume})
        if resume:
            collect(workspace.parent, output_dir, run.federation)
        run_here(run, workspace, tick)
        return load_weights(run._finish(workspace))

    whole = train(tmp_path / "whole" / "out", tmp_path / "whole" / "work", False)
    history = figures(tmp_path / "whole" / "out")
    last = instants
    messages = 2 * (2 * 2 + 1)  # per site: two in each round, and one at the end
    of_sites = 2 * (2 * 3 + 2)  # files: two per training, one per scoring, two at the end
    of_server = 1 + 2 * 2 + 1  # the first checkpoint, two files in each round, the last checkpoint
    assert last == messages + of_sites + of_server
    for number in range(1, last + 1):
        folder = tmp_path / str(number)
        instants, end = 0, number
        with pytest.raises(Interrupted):
            train(folder / "out", folder / "first", False)
        end = -1
        assert_same(train(folder / "out", folder / "second", True), whole)
        assert figures(folder / "out") == history


def test_run_is_not_resumed_with_other_settings(dataset, tmp_path, fake):
    run = flare_run(tmp_path / "flare", dataset)
    run_here(run, tmp_path / "work")
    run._finish(tmp_path / "work")
    other = flare_run(tmp_path / "flare", dataset, settings={**TINY, "alpha": 0.9, "resume": True})
    with pytest.raises(InputError, match=r"alpha 0\.5, but now it is 0\.9"):
        other._begin()
    before = sorted((tmp_path / "flare").rglob("*.pt"))
    with pytest.raises(
        InputError, match=r"holds a federation by FLARE .*--overwrite True, or continue it with --resume True"
    ):
        flare_run(tmp_path / "flare", dataset)._begin()
    assert sorted((tmp_path / "flare").rglob("*.pt")) == before


def test_overwrite_removes_only_the_files_of_an_earlier_run(dataset, tmp_path, fake):
    run = flare_run(tmp_path / "flare", dataset)
    run_here(run, tmp_path / "work")
    (tmp_path / "flare" / "flare").mkdir()  # as FLARE's processes write it
    for name in ("flare/server.log", "sites/A/site.log"):
        (tmp_path / "flare" / name).write_text("")
    run._finish(tmp_path / "work")
    release(tmp_path / "flare")
    (tmp_path / "flare" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="overwrite must be True or False"):
        flare_run(tmp_path / "flare", dataset, settings={**TINY, "overwrite": "yes"})
    flare_run(tmp_path / "flare", dataset, settings={**TINY, "overwrite": True})._begin()
    left = {str(path.relative_to(tmp_path / "flare")) for path in (tmp_path / "flare").rglob("*") if path.is_file()}
    assert left - {".run.lock"} == {"notes.txt", "run.json", "written.jsonl", "models/manifest.json"}


def test_file_of_unknown_origin_is_not_replaced(dataset, tmp_path, fake):
    (tmp_path / "flare" / "models").mkdir(parents=True)
    (tmp_path / "flare" / "models" / "model.pt").write_text("mine")
    with pytest.raises(InputError, match=r"holds models/model\.pt, which no run is known to have written"):
        flare_run(tmp_path / "flare", dataset, settings={**TINY, "overwrite": True})._begin()
