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
"""Federations of four sites with fake clients, for tests of everything but the training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared_iopfl.federation import simulation as federation
from shared_iopfl.federation.averaging import average_updates
from shared_iopfl.federation.simulation import Federation
from shared_iopfl.models.files import save_atomically

State = dict[str, Tensor]
SITES = ["A", "B", "C", "D"]


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


class FakeClient:
    """A site that adds its own step to the global weights; its state is its number of rounds and its last model."""

    def __init__(self, bundle_root: str, site: str, local_epochs: int, overrides: Mapping[str, Any]) -> None:
        network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
        self.algo: Any = type("Algo", (), {"trainer": type("Trainer", (), {"network": network})})
        self.site, self.epoch, self.cases = site, 0, 1 + SITES.index(site)
        self.file = Path(overrides["ckpt_dir"]) / f"model_{site}.pt"
        self.personalised = {key: tensor.clone() for key, tensor in network.state_dict().items()}

    @property
    def weights(self) -> State:
        return {key: tensor.clone() for key, tensor in self.algo.trainer.network.state_dict().items()}

    def train(self, weights: Mapping[str, Tensor]) -> State:
        self.epoch += 1
        step = 0.1 * self.cases + 0.01 * self.epoch
        update = {key: tensor + step if tensor.is_floating_point() else tensor + 1 for key, tensor in weights.items()}
        self.personalised = {key: tensor.clone() for key, tensor in update.items()}
        save_atomically(self.personalised, self.file)
        return update

    def metrics(self) -> dict[str, float]:
        return {"train_loss": 1 / self.epoch}

    def shift(self, weights: Mapping[str, Tensor]) -> float:
        return 0.05 * self.cases

    def dice_by_statistics(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        return {"global": 0.1 * self.cases, "own": 0.15 * self.cases}

    def validate(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        return {"val_mean_dice": float(torch.sigmoid(weights["0.weight"].sum()))}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "personalised": self.personalised}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.personalised = state["epoch"], dict(state["personalised"])


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "SiteClient", FakeClient)


def make(folder: Path, **kwargs: Any) -> Federation:
    return Federation("bundle", **{"sites": SITES, "rounds": 3, "output_dir": str(folder), "min_sites": 3, **kwargs})


def by_hand(folder: Path, absent: Mapping[int, str], rounds: int = 3) -> tuple[State, dict[str, FakeClient]]:
    """The expected weights and clients of a run in which some sites are absent in some rounds."""
    run = make(folder)
    run.start()
    weights, clients = run.weights, run.clients
    for number in range(1, rounds + 1):
        there = [site for site in SITES if site not in absent.get(number, "")]
        updates = {site: clients[site].train(weights) for site in there}
        weights = average_updates(updates, {site: clients[site].cases for site in there})
    return weights, clients  # type: ignore[return-value]
