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
"""A site with NVIDIA FLARE: its own settings take precedence, and a refused update is undone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("nvflare", reason="NVIDIA FLARE is not installed: pip install '.[flare]'")

from flare_here import _dataset, _fake, _process_as_it_was, flare_run, received, run_here  # noqa: F401
from flare_runs import BUNDLE, REPOSITORY, SITES, TINY, assert_same, matrix
from nvflare.app_common.abstract.fl_model import FLModel

from shared_iopfl.federation.flare import client as flare_client
from shared_iopfl.federation.flare.client import Member
from shared_iopfl.federation.flare.messages import PUBLISH
from shared_iopfl.federation.flare.server import Rounds
from shared_iopfl.models.files import load_weights
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.reading import read_json
from shared_iopfl.utils.tables import read_rows

JOB: dict[str, Any] = {
    "bundle": None,
    "dataset_dir": "/of/the/job",
    "output_dir": None,
    "device": None,
    "fingerprint": flare_client.bundle_fingerprint(BUNDLE),
    "run": "run",
    "rounds": 2,
    "local_epochs": 3,
    "round_timeout": 0,
    "own_rounds": 1,
    "shares": [0.0, 0.5],
    "seed": 0,
    "overrides": {"alpha": 0.5, "dataset_dir": "/of/the/overrides"},
}


def test_settings_of_a_site_take_precedence_over_the_job(tmp_path, fake):
    environment = {
        "IOPFL_BUNDLE": str(BUNDLE),
        "IOPFL_DATASET_DIR": "/of/the/site",
        "IOPFL_OUTPUT_DIR": str(tmp_path),
        "IOPFL_DEVICE": "cuda:1",
    }
    overrides = Member(JOB, "A", environment).client(0).overrides
    folder = str(tmp_path / "sites" / "A")
    assert overrides == {
        "alpha": 0.5,
        "site": "A",
        "dataset_dir": "/of/the/site",
        "output_dir": folder,
        "ckpt_dir": folder,
        "epochs": 6,
        "device": "cuda:1",
    }


def test_site_without_a_folder_or_with_another_bundle_takes_no_part(tmp_path, fake):
    with pytest.raises(InputError, match="IOPFL_OUTPUT_DIR"):
        Member(JOB, "A", {})
    place = {"IOPFL_OUTPUT_DIR": str(tmp_path)}
    with pytest.raises(InputError, match="IOPFL_BUNDLE"):
        Member(JOB, "A", place).client(0)
    with pytest.raises(InputError, match="IOPFL_DATASET_DIR"):
        Member({**JOB, "dataset_dir": None}, "A", {**place, "IOPFL_BUNDLE": str(BUNDLE)}).client(0)
    other = REPOSITORY / "bundles" / "fundus_iopfl"
    with pytest.raises(InputError, match="trains in another way"):
        Member(JOB, "A", {**place, "IOPFL_BUNDLE": str(other)}).client(0)


def test_site_keeps_two_states_of_its_run_and_none_of_other_runs(tmp_path, fake):
    place = {"IOPFL_OUTPUT_DIR": str(tmp_path), "IOPFL_BUNDLE": str(BUNDLE)}
    weights = {"w": torch.zeros(2)}
    for run in ("first", "second"):
        member = Member({**JOB, "run": run}, "A", place)
        for number in range(4):
            assert member.answer("train", received(weights, number)).params
        names = sorted(path.name for path in member.folder.glob("state_*"))
        assert names == [f"state_{run}_{number}.pt" for number in (3, 4)]
    assert Member({**JOB, "run": "first"}, "A", place).client(4).epoch == 0
    assert [Member({**JOB, "run": "second"}, "A", place).client(done).epoch for done in (2, 3, 4, 9)] == [0, 3, 4, 4]


def test_site_whose_update_was_not_averaged_restores_its_state_and_its_model(tmp_path, fake):
    """Only the server knows that an update was refused or late; its next task contains this information."""
    member = Member(JOB, "A", {"IOPFL_OUTPUT_DIR": str(tmp_path), "IOPFL_BUNDLE": str(BUNDLE)})
    weights, own = {"w": torch.zeros(2)}, tmp_path / "sites" / "A" / "model_A.pt"
    member.answer("train", received(weights, 0))
    first = dict(member.client(1).personalised)
    member.answer("train", received(weights, 1))
    assert not torch.equal(member.client(2).personalised["w"], first["w"])
    member.answer("validate", received(weights, 1, counted=1))
    assert torch.equal(member.client(1).personalised["w"], first["w"])
    assert torch.equal(load_weights(own)["w"], first["w"])
    member.answer("train", received(weights, 2, counted=1))
    assert member.client(3).epoch == 2
    assert sorted(path.name for path in own.parent.glob("state_*")) == ["state_run_1.pt", "state_run_3.pt"]
    member.answer("validate", received(weights, 2, counted=0))
    assert not own.exists(), "what is left of a first round that did not count is no model"


def test_site_scores_the_global_and_its_personalised_model(tmp_path, fake):
    member = Member(JOB, "A", {"IOPFL_OUTPUT_DIR": str(tmp_path), "IOPFL_BUNDLE": str(BUNDLE)})
    member.answer("train", received({"w": torch.zeros(2)}, 0))
    figures = member.answer("validate", received({"w": torch.full((2,), 7.0)}, 0, counted=1)).metrics
    own = float(member.client(1).personalised["w"].double().mean())
    assert figures == {"global/val_mean_dice": 7.0, "personalised/val_mean_dice": own}
    assert own != 7.0
    assert load_weights(tmp_path / "sites" / "A" / "model.pt")["w"].tolist() == [7, 7]


def test_metrics_are_streamed_if_the_job_asks_for_it(tmp_path, fake):
    member = Member(JOB, "A", {"IOPFL_OUTPUT_DIR": str(tmp_path), "IOPFL_BUNDLE": str(BUNDLE)})
    told: list[tuple[str, float, int]] = []
    member.stream = lambda *figure: told.append(figure)
    trained = member.answer("train", received({"w": torch.zeros(2)}, 0)).metrics
    scored = member.answer("validate", received({"w": torch.ones(2)}, 0, counted=1)).metrics
    assert told == [
        *((f"local/{name}", value, 1) for name, value in trained.items()),
        *((n, v, 1) for n, v in scored.items()),
    ]


@pytest.mark.parametrize("allows", ["", "False", "True"])
@pytest.mark.parametrize("asked", [False, True])
def test_personalised_model_is_sent_only_if_the_site_allows_it_and_the_job_asks_for_it(
    asked, allows, dataset, tmp_path, fake, monkeypatch
):
    monkeypatch.setenv(PUBLISH, allows)
    run = flare_run(tmp_path / "flare", dataset, publish=asked)
    rounds = run_here(run, tmp_path / "work")
    sent = [site for site, task, reply in rounds.wire.answers if task == "validate" and reply.params]
    assert sorted(sent) == (SITES if asked and allows == "True" else [])
    run._finish(tmp_path / "work")
    published = {path.name for path in (tmp_path / "flare" / "models").glob("model_*.pt")}
    assert published == {f"model_{site}.pt" for site in sent}
    models = {model for model, _ in matrix(tmp_path / "flare")}
    assert models == ({"global", *sent} if asked else set()), "where no site sends its own, of the global one alone"


def test_site_that_fails_to_select_publishes_its_moving_average(dataset, tmp_path, fake, monkeypatch):
    """As in one process, the site is named, scores no models and has no selected share; others score its model."""
    averages = {}

    def fail(self: Any, weights: Any, own_rounds: int, shares: Any) -> float:
        averages[self.site] = {key: tensor.clone() for key, tensor in self.personalised.items()}
        self.train(weights)
        if self.site == "A":
            raise RuntimeError("a scan went away")
        return shares[-1]

    monkeypatch.setenv(PUBLISH, "True")
    monkeypatch.setattr(fake, "select_personalised", fail)
    run = flare_run(tmp_path / "flare", dataset, publish=True, settings={**TINY, "device": "cpu", "min_sites": 1})
    run_here(run, tmp_path / "work")
    run._finish(tmp_path / "work")
    assert_same(load_weights(tmp_path / "flare" / "models" / "model_A.pt"), averages["A"])
    assert set(matrix(tmp_path / "flare")) == {("global", "B"), ("A", "B")}
    assert set(read_json(tmp_path / "flare" / "models" / "shares.json")) == {"B"}
    (failure,) = read_rows(tmp_path / "flare" / "failures.csv")
    assert failure["site"] == "A" and "RuntimeError at 'validate'" in failure["reason"]


def test_personalised_model_that_does_not_fit_is_not_published(dataset, tmp_path, fake, monkeypatch):
    monkeypatch.setenv(PUBLISH, "True")

    def spoiled(site: str, task: str, number: int, reply: FLModel) -> FLModel:
        if site == "A" and task == "validate" and reply.params:
            reply.params = {"w": torch.zeros(1)}
        return reply

    run = flare_run(tmp_path / "flare", dataset, publish=True, settings={**TINY, "device": "cpu", "min_sites": 1})
    run_here(run, tmp_path / "work", spoiled)
    run._finish(tmp_path / "work")
    assert [path.name for path in (tmp_path / "flare" / "models").glob("model_*.pt")] == ["model_B.pt"]
    assert list(matrix(tmp_path / "flare")) == [("global", "B")]
    (failure,) = read_rows(tmp_path / "flare" / "failures.csv")
    assert failure["site"] == "A" and "other keys" in failure["reason"]


@pytest.mark.parametrize(
    "absent, losses",
    [
        ({2}, {"1": 1, "3": 1 / 2}),
        ({2, 3}, {"1": 1}),
        ({1}, {"2": 1, "3": 1 / 2}),
    ],
    ids=["leaves and comes back", "leaves for good", "is connected late"],
)
def test_site_that_is_not_connected_is_left_out_of_the_round_and_asked_in_the_next(
    absent, losses, dataset, tmp_path, fake, monkeypatch
):
    """It continues from its last state (the fake's loss is 1 / number of its rounds); the other site goes on."""
    train = Rounds._train

    def train_without(self: Any, model: Any) -> Any:
        there = [SimpleNamespace(name=site) for site in SITES if site != "B" or self.round not in absent]
        self.engine.get_clients = lambda: there
        return train(self, model)

    monkeypatch.setattr(Rounds, "_train", train_without)
    settings = {**TINY, "device": "cpu", "min_sites": 1}
    run = flare_run(tmp_path / "flare", dataset, rounds=3, settings=settings)
    rounds = run_here(run, tmp_path / "work")
    run._finish(tmp_path / "work")
    rows = read_rows(tmp_path / "flare" / "history.csv")
    told = {
        site: {
            row["round"]: float(row["value"]) for row in rows if row["metric"] == "train_loss" and row["site"] == site
        }
        for site in SITES
    }
    assert told == {"A": {"1": 1, "2": 1 / 2, "3": 1 / 3}, "B": losses}
    failures = read_rows(tmp_path / "flare" / "failures.csv")
    assert [(row["round"], row["site"]) for row in failures] == [(str(number), "B") for number in sorted(absent)]
    assert all("it is not connected" in row["reason"] for row in failures)
    assert len(rounds.told) == len(absent)
