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
"""FLARE's rounds and members in this process, with a record of the messages between them, and fake sites."""

from __future__ import annotations

import copy
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flare_runs import BUNDLE, SITES, TINY, make_sites
from monai.utils import set_determinism
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from torch import Tensor

from shared_iopfl.federation.flare import client as flare_client
from shared_iopfl.federation.flare.client import Member
from shared_iopfl.federation.flare.messages import COUNTED, ENVIRONMENT, PUBLISH
from shared_iopfl.federation.flare.persistor import ServerFiles
from shared_iopfl.federation.flare.run import FlareRun
from shared_iopfl.federation.flare.server import Rounds


@pytest.fixture(scope="module", name="dataset")
def _dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("sites"))


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A config seeds the process and changes how it reports errors; a FLARE run changes the environment."""
    hook, threads, benchmark = sys.excepthook, torch.get_num_threads(), torch.backends.cudnn.benchmark
    for variable in (*ENVIRONMENT.values(), PUBLISH, "NVFLARE_POC_WORKSPACE"):
        monkeypatch.setenv(variable, "")  # so that it is restored after the test
        monkeypatch.delenv(variable)
    torch.set_num_threads(1)  # the same order of sums in this process and in those that a test starts
    yield
    sys.excepthook, torch.backends.cudnn.benchmark = hook, benchmark
    torch.set_num_threads(threads)
    set_determinism(None)


def flare_run(output_dir: Path, dataset_dir: Path | None, rounds: int = 2, **options: Any) -> FlareRun:
    options = {"settings": {**TINY, "device": "cpu"}, **options}
    return FlareRun(str(BUNDLE), SITES, rounds, str(output_dir), dataset_dir and str(dataset_dir), **options)


# ---- the server's rounds and the sites' members in one process, with a record of the messages -----------------------


class Wire:
    """Takes the place of FLARE: carries tasks to the members and answers to the rounds, and keeps copies of answers."""

    def __init__(self, members: Mapping[str, Any], between: Callable[[str, str, int, FLModel], FLModel | None]) -> None:
        self.members, self.between = members, between
        self.answers: list[tuple[str, str, FLModel]] = []

    def carry(self, task: str, model: FLModel, targets: Sequence[str]) -> list[FLModel]:
        replies = []
        for site in targets[::-1]:  # answers may arrive in any order
            received = FLModelUtils.from_shareable(FLModelUtils.to_shareable(copy.deepcopy(model)))
            sent = self.between(site, task, model.current_round + 1, self.members[site].answer(task, received))
            if sent is not None:
                reply = FLModelUtils.from_shareable(FLModelUtils.to_shareable(copy.deepcopy(sent)))
                self.answers.append((site, task, copy.deepcopy(reply)))
                reply.meta["client_name"] = site
                replies.append(reply)
        return replies


class RoundsHere(Rounds):
    """The server's rounds without a server."""

    def __init__(self, wire: Wire, workspace: Path, **options: Any) -> None:
        super().__init__(**options)
        self.wire, self.persistor, self.told = wire, ServerFiles(), []
        self.abort_signal = SimpleNamespace(triggered=False)
        places = {"get_app_custom_dir": workspace / "server", "get_run_dir": workspace}
        paths = SimpleNamespace(**{name: lambda job, path=path: str(path) for name, path in places.items()})
        clients = [SimpleNamespace(name=site) for site in wire.members]
        self.engine = SimpleNamespace(get_workspace=lambda: paths, get_clients=lambda: clients)
        self.fl_ctx = SimpleNamespace(
            get_engine=lambda: self.engine, get_job_id=lambda: "job", set_prop=lambda *args, **kwargs: None
        )

    def event(self, event_type: str) -> None:
        pass

    def info(self, message: str) -> None:
        pass

    def warning(self, message: str) -> None:
        self.told.append(message)

    def send_model_and_wait(self, **kwargs: Any) -> list[FLModel]:
        assert kwargs["timeout"] == self.round_timeout
        return self.wire.carry(kwargs["task_name"], kwargs["data"], kwargs["targets"])


def received(weights: Mapping[str, Tensor], number: int, counted: int | None = None) -> FLModel:
    """A task for site A: the number of finished rounds, and the last one in which its update was averaged."""
    last = number if counted is None else counted
    return FLModel(params=dict(weights), current_round=number, meta={COUNTED: {"A": last}})


def unchanged(site: str, task: str, number: int, reply: FLModel) -> FLModel:
    return reply


def run_here(run: FlareRun, workspace: Path, between: Callable[..., FLModel | None] = unchanged) -> RoundsHere:
    """Run the rounds and the members with the files of the exported job."""
    run._begin()
    with run._recipe() as recipe:
        job = Path(recipe.export(str(workspace / "job")) or workspace / "job" / recipe.name)
    shutil.copytree(job / "app_server" / "custom", workspace / "server", dirs_exist_ok=True)
    arguments = json.loads((job / "app_server" / "config" / "config_fed_server.json").read_text())["workflows"][0]
    members = {
        site: Member(json.loads((job / f"app_{site}" / "custom" / "federation.json").read_text()), site)
        for site in run.sites
    }
    rounds = RoundsHere(Wire(members, between), workspace, **arguments["args"])
    rounds.run()
    return rounds


class FakeClient:
    """A site whose local weights depend on the global weights, on its own state and on the round."""

    def __init__(self, bundle_root: str, site: str, local_epochs: int, overrides: Mapping[str, Any]) -> None:
        self.site, self.overrides, self.cases, self.epoch = site, dict(overrides), 1 + SITES.index(site), 0
        self.personalised: dict[str, Tensor] = {}

    def train(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.epoch += 1
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.site}{self.epoch}".encode()))
        update = {
            key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point()
            else tensor + 1
            for key, tensor in weights.items()
        }
        past = self.personalised or update
        self.personalised = {
            key: (past[key] + tensor) / 2 if tensor.is_floating_point() else tensor for key, tensor in update.items()
        }
        # the update depends on the state that the site keeps, so that tests of resuming notice a wrong state
        return {
            key: 0.9 * tensor + 0.1 * self.personalised[key] if tensor.is_floating_point() else tensor
            for key, tensor in update.items()
        }

    def select_personalised(self, weights: Mapping[str, Tensor], own_rounds: int, shares: Sequence[float]) -> float:
        for _ in range(own_rounds):
            self.train(weights)
        return shares[-1]

    def shift(self, weights: Mapping[str, Tensor]) -> float:
        return 0.25

    def dice_by_statistics(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        return {"global": 0.5, "own": 0.6}

    def metrics(self) -> dict[str, float]:
        return {"train_loss": 1.0 / self.epoch}

    def validate(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        return {"val_mean_dice": float(next(iter(weights.values())).double().mean())}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "personalised": self.personalised}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.personalised = state["epoch"], dict(state["personalised"])


@pytest.fixture(name="fake")
def _fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    monkeypatch.setattr(flare_client, "SiteClient", FakeClient)
    return FakeClient
