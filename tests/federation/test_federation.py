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
"""FedAvg and its rounds: checked weighted means, and runs whose result does not depend on interruptions."""

from __future__ import annotations

import copy
import itertools
import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import images, unet, untouched
from torch import Tensor, nn

from shared_iopfl.federation import checkpoint
from shared_iopfl.federation import results as federation_results
from shared_iopfl.federation import simulation as federation
from shared_iopfl.federation.averaging import average_updates
from shared_iopfl.federation.results import cross_site_scores
from shared_iopfl.federation.simulation import Federation
from shared_iopfl.federation.updates import check_update
from shared_iopfl.models.files import load_weights
from shared_iopfl.utils import files
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import read_rows

# ---- the weighted mean ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_average_is_the_mean_weighted_by_the_number_of_cases(counts, seed):
    updates = {str(n): {"w": images(3, 2, seed=seed + n)} for n in range(len(counts))}
    average = average_updates(updates, {str(n): count for n, count in enumerate(counts)})
    plain = sum(count * updates[str(n)]["w"].double() for n, count in enumerate(counts)) / sum(counts)
    torch.testing.assert_close(average["w"].double(), plain, rtol=1e-6, atol=1e-6)


def test_average_of_networks_keeps_types_and_shares_no_memory_with_the_updates():
    """Integer buffers stay integers; the average of equal networks is equal to them; changing it changes no update."""
    updates = {site: dict(unet(n).state_dict()) for n, site in enumerate("AB")}
    kept = copy.deepcopy(updates)
    average = average_updates(updates, {"A": 1, "B": 3})
    assert list(average) == list(updates["A"])
    assert [tensor.dtype for tensor in average.values()] == [tensor.dtype for tensor in updates["A"].values()]
    same = average_updates({"A": updates["A"], "B": copy.deepcopy(updates["A"])}, {"A": 2, "B": 5})
    assert all(torch.equal(tensor, updates["A"][key]) for key, tensor in same.items())
    for tensor in (*average.values(), *average_updates({"A": updates["A"]}, {"A": 1}).values()):
        tensor.add_(1)
    assert all(torch.equal(tensor, kept[site][key]) for site in "AB" for key, tensor in updates[site].items())


def test_half_precision_is_averaged_in_full():
    """The mean of 1024 equal values is exact; if they were summed in half precision, it would not be."""
    updates = {str(n): {"w": torch.tensor([0.1], dtype=torch.half)} for n in range(1024)}
    average = average_updates(updates, dict.fromkeys(updates, 1))["w"]
    assert average.dtype == torch.half
    assert torch.equal(average, updates["0"]["w"])


GOOD = {"w": torch.ones(2), "n": torch.tensor(3)}


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"w": torch.ones(2)}, ["'n'"]),
        ({**GOOD, "extra": torch.ones(1)}, ["'extra'"]),
        ({**GOOD, "w": torch.ones(3)}, ["'w'", "(3,)", "(2,)"]),
        ({**GOOD, "w": torch.tensor([1.0, torch.nan])}, ["'w'", "NaN"]),
        ({**GOOD, "w": torch.tensor([1.0, -torch.inf])}, ["'w'", "infinite"]),
    ],
)
def test_update_that_does_not_fit_names_the_site_and_the_key(wrong, words):
    with pytest.raises(InputError) as error:
        check_update("UCL", wrong, GOOD)
    assert all(word in str(error.value) for word in ("'UCL'", *words))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [0, -1, float("nan")])
def test_site_without_cases_is_refused_by_name(count):
    with pytest.raises(InputError, match="'UCL'"):
        average_updates({"HK": GOOD, "UCL": GOOD}, {"HK": 5, "UCL": count})


def test_nothing_to_average_is_refused():
    with pytest.raises(InputError, match="no site"):
        average_updates({}, {})


# ---- rounds, with fake clients --------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """Ends a run as Ctrl-C or a crash of the machine does."""


class Clock:
    """Counts the points at which a run can be interrupted, and interrupts it at one of them."""

    def __init__(self) -> None:
        self.instant, self.end = 0, -1

    def tick(self) -> None:
        self.instant += 1
        if self.instant == self.end:
            raise Interrupted


CLOCK = Clock()


class FakeClient:
    """A site with a personalised model, whose local weights depend on the global weights and its number of rounds."""

    def __init__(self, bundle_root: str, site: str, local_epochs: int, overrides: Mapping[str, Any]) -> None:
        self.site, self.overrides, self.cases = site, dict(overrides), 1 + len(site)
        network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.algo = SimpleNamespace(trainer=SimpleNamespace(network=network))
        self.epoch, self.scored = 0, 0
        self.personalised = {key: tensor.clone() for key, tensor in network.state_dict().items()}

    @property
    def weights(self) -> dict[str, Tensor]:
        return {key: tensor.clone() for key, tensor in self.algo.trainer.network.state_dict().items()}

    def dice_by_statistics(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        return {"global": 0.5, "own": 0.6}

    def train(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        CLOCK.tick()
        self.epoch += 1
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.site}{self.epoch}".encode()))
        update = {
            key: 0.9 * tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point()
            else tensor + 1
            for key, tensor in weights.items()
        }
        for key, tensor in update.items():
            own = self.personalised[key]
            self.personalised[key] = own.lerp(tensor, 0.5) if tensor.is_floating_point() else tensor.clone()
        CLOCK.tick()
        return update

    def metrics(self) -> dict[str, float]:
        return {"train_loss": 1 / self.epoch}

    def shift(self, weights: Mapping[str, Tensor]) -> float:
        return 0.05 * self.cases

    def validate(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        CLOCK.tick()
        return {"val_mean_dice": float(torch.sigmoid(weights["0.weight"].sum()))}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "personalised": self.personalised}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.personalised = state["epoch"], dict(state["personalised"])


@pytest.fixture(autouse=True)
def fakes(monkeypatch) -> None:
    """Use fake clients; a run can be interrupted before and after each file is written or renamed."""

    def ticking(write: Callable[..., None]) -> Callable[..., None]:
        def ticked(*args: Any) -> None:
            CLOCK.tick()
            write(*args)
            CLOCK.tick()

        return ticked

    monkeypatch.setattr(federation, "SiteClient", FakeClient)
    for module in (federation, checkpoint, federation_results):
        for name in ("save_atomically", "write_rows", "write_json"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, ticking(getattr(module, name)))
    monkeypatch.setattr(files.os, "replace", ticking(os.replace))
    monkeypatch.setattr(CLOCK, "instant", 0)
    monkeypatch.setattr(CLOCK, "end", -1)


def make(folder: Path, **kwargs: Any) -> Federation:
    return Federation("bundle", **{"sites": ["HK", "UCL"], "rounds": 3, "output_dir": str(folder), **kwargs})


def outcome(folder: Path) -> dict[str, Any]:
    """The results of a run, except for durations."""
    rows = [row for row in read_rows(folder / "history.csv") if row["metric"] != "seconds"]
    models = {path.name: load_weights(path) for path in sorted((folder / "models").glob("*.pt"))}
    plain = {name: {key: tensor.tolist() for key, tensor in state.items()} for name, state in models.items()}
    return {"history": rows, "models": plain, "scores": json.loads((folder / "models" / "scores.json").read_text())}


def test_run_that_is_interrupted_anywhere_and_resumed_gives_the_results_of_an_uninterrupted_one(tmp_path):
    """Weights, personalised models, scores and the whole history are equal to the bit."""
    make(tmp_path / "whole").run()
    expected, instants = outcome(tmp_path / "whole"), CLOCK.instant
    assert instants > 40
    for end in range(1, instants + 1):
        folder = tmp_path / str(end)
        CLOCK.instant, CLOCK.end = 0, end
        with pytest.raises(Interrupted):
            make(folder).run()
        CLOCK.end = -1
        make(folder, resume=True).run()
        assert outcome(folder) == expected, f"interrupted at instant {end}"


def test_history_has_each_round_site_and_model_once(tmp_path):
    """Local training is in every round; both models are scored every val_interval rounds and at the end."""
    make(tmp_path, rounds=5, val_interval=2).run()
    rows = read_rows(tmp_path / "history.csv")
    assert list(rows[0]) == ["round", "site", "model", "metric", "value"]
    keys = [(int(row["round"]), row["site"], row["model"], row["metric"]) for row in rows]
    assert len(set(keys)) == len(keys)
    local = itertools.product(range(1, 6), ("HK", "UCL"), ("local",), ("train_loss", "seconds", "update_norm"))
    scored = itertools.product((2, 4, 5), ("HK", "UCL"), ("global", "personalised"), ("val_mean_dice",))
    assert set(keys) == {*local, *scored}
    assert all(torch.isfinite(torch.tensor(float(row["value"]))) for row in rows)


def test_global_model_is_the_weighted_average_of_each_rounds_updates(tmp_path):
    """This holds from the first global weights, which are the same for all sites and depend on the seed."""
    run = make(tmp_path, rounds=2, seed=3)
    found = run.run()
    start = make(tmp_path / "other", seed=3)
    start.start()
    weights, clients = start.weights, start.clients
    for _ in range(2):
        weights = average_updates({s: c.train(weights) for s, c in clients.items()}, {"HK": 3, "UCL": 4})
    assert all(torch.equal(tensor, weights[key]) for key, tensor in found.items())
    published = load_weights(tmp_path / "models" / "model.pt")
    assert all(torch.equal(tensor, weights[key]) for key, tensor in published.items())
    other = make(tmp_path / "seed", seed=4)
    other.start()
    assert not torch.equal(other.weights["0.weight"], start.weights["0.weight"])


def test_score_of_a_model_is_its_difference_to_the_global_model_at_the_other_sites(tmp_path, monkeypatch):
    """A model is not scored at its own site, and does not gain by being scored at easier sites."""
    table = {"global": {"A": 0.9, "BB": 0.8, "CCC": 0.7}, "A": {"A": 0.99, "BB": 0.82, "CCC": 0.6}}
    run = make(tmp_path, sites=["A", "BB", "CCC"], rounds=1)
    run.run()

    def validate(client, weights):
        name = "A" if weights is run.clients["A"].personalised else "global"
        return {"val_mean_dice": table[name][client.site]}

    monkeypatch.setattr(type(run.clients["A"]), "validate", validate)
    scores = cross_site_scores(run, {"global": run.weights, "A": run.clients["A"].personalised}, run.sites)
    assert scores["global"] == pytest.approx(0.8)
    assert scores["A"] == pytest.approx(0.8 + (0.02 - 0.1) / 2)
    told = {(row["model"], row["site"]): float(row["dice"]) for row in read_rows(tmp_path / "cross_site.csv")}
    assert told == {(name, site): dice for name, at in table.items() for site, dice in at.items() if name != site}
    make(tmp_path / "alone", sites=["A"], rounds=1).run()
    assert json.loads((tmp_path / "alone" / "models" / "scores.json").read_text())["A"] is None


def test_clients_receive_their_site_and_folders_and_random_state_is_not_changed(tmp_path):
    run = make(tmp_path, overrides={"alpha": 0.3, "site": "x"}, local_epochs=2)
    with untouched():
        run.run()
    overrides = run.clients["UCL"].overrides  # type: ignore[attr-defined]
    assert overrides["site"] == "UCL"
    assert overrides["alpha"] == 0.3
    assert overrides["epochs"] == 6
    assert overrides["ckpt_dir"] == str(tmp_path / "models")
    assert overrides["output_dir"] != run.clients["HK"].overrides["output_dir"]  # type: ignore[attr-defined]


def test_sites_are_copied_before_a_round_only_if_they_may_fail(tmp_path, monkeypatch):
    """The copies are as large as the sites' personalised models."""
    copied: list[Any] = []
    monkeypatch.setattr(federation.copy, "deepcopy", copied.append)
    for min_sites, copies in ((0, 0), (2, 0), (1, 2)):
        run = make(tmp_path / str(min_sites), min_sites=min_sites)
        run.start()
        copied.clear()
        run.run_round()
        assert len(copied) == copies


def test_run_is_resumed_only_with_the_same_settings_and_an_intact_checkpoint(tmp_path):
    make(tmp_path).run()
    for changed in ({"rounds": 9}, {"sites": ["HK", "ISBI"]}, {"seed": 1}, {"local_epochs": 2}):
        with pytest.raises(InputError, match=f"begun with {next(iter(changed))}"):
            make(tmp_path, resume=True, **changed).run()
    for name in ("federation.pt", "federation_previous.pt"):
        (tmp_path / name).write_bytes(b"half")
    with pytest.raises(InputError, match=r"federation\.pt .* nor .*federation_previous\.pt"):
        make(tmp_path, resume=True).run()
    (tmp_path / "federation_previous.pt").unlink()
    torch.save({"something": "else"}, tmp_path / "federation.pt")
    with pytest.raises(InputError, match=r"federation\.pt"):
        make(tmp_path, resume=True).run()
    make(tmp_path).run()  # without resume, it starts again
    make(tmp_path / "new", resume=True).run()  # without a checkpoint, it starts


def test_settings_that_are_not_allowed_are_refused(tmp_path):
    runs: list[dict[str, Any]] = [
        {"sites": "HK"},
        {"sites": []},
        {"sites": ["HK"] * 2},
        {"rounds": 0},
        {"local_epochs": 0},
    ]
    for wrong in runs:
        with pytest.raises(InputError, match=next(iter(wrong))):
            make(tmp_path, **wrong)


def test_bad_update_ends_the_run_which_can_be_resumed_from_the_round_before(tmp_path, monkeypatch):
    """The error names the site that sent NaN; resumed without it, the run gives the results of an uninterrupted one."""
    make(tmp_path / "whole").run()
    train = FakeClient.train

    def poisoned(self: FakeClient, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        update = train(self, weights)
        return {**update, "0.bias": update["0.bias"] * torch.nan} if (self.site, self.epoch) == ("UCL", 2) else update

    with monkeypatch.context() as patch:
        patch.setattr(FakeClient, "train", poisoned)
        with pytest.raises(InputError, match=r"'UCL'.*'0\.bias'"):
            make(tmp_path / "run").run()
    make(tmp_path / "run", resume=True).run()
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
