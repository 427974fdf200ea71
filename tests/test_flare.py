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
"""The federation by NVIDIA FLARE: the weights of the one-process run, and nothing personal across the wire."""

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
from monai.utils import set_determinism
from torch import Tensor

pytest.importorskip("nvflare", reason="NVIDIA FLARE is not installed: pip install '.[flare]'")

from flare_runs import BUNDLE, OF_THE_FEDERATION, REPOSITORY, SITES, TINY, assert_same, figures, make_sites, one_process
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from shared_iopfl import __main__ as command
from shared_iopfl import flare_client, flare_server
from shared_iopfl.errors import InputError
from shared_iopfl.flare import FlareRun, federate, publish_sites
from shared_iopfl.flare_client import COUNTED, Member
from shared_iopfl.flare_results import collect
from shared_iopfl.flare_server import Rounds, ServerFiles
from shared_iopfl.models import load_weights
from shared_iopfl.tables import read_rows

ENGINES = ("flare", "one")
LENIENT = {**TINY, "device": "cpu", "min_sites": 1}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("sites"))


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A config seeds the process and changes how it reports errors; a FLARE run changes the environment."""
    hook, threads, benchmark = sys.excepthook, torch.get_num_threads(), torch.backends.cudnn.benchmark
    for variable in (*flare_client.ENVIRONMENT.values(), "NVFLARE_POC_WORKSPACE"):
        monkeypatch.setenv(variable, "")  # so that it is put back, whatever a test does
        monkeypatch.delenv(variable)
    torch.set_num_threads(1)  # sums in one order, in this process as in those that a test starts
    yield
    sys.excepthook, torch.backends.cudnn.benchmark = hook, benchmark
    torch.set_num_threads(threads)
    set_determinism(None)


def flare_run(output_dir: Path, dataset_dir: Path | None, rounds: int = 2, **options: Any) -> FlareRun:
    options = {"settings": {**TINY, "device": "cpu"}, **options}
    return FlareRun(str(BUNDLE), SITES, rounds, str(output_dir), dataset_dir and str(dataset_dir), **options)


# ---- the server's rounds and the sites' members in one process, with all that crosses the wire between them ----------


class Wire:
    """FLARE's part: carries tasks to the members and their answers to the rounds, and keeps a copy of the answers."""

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
    """A task as it reaches site A: the rounds done before, and the last one in which its update counted."""
    last = number if counted is None else counted
    return FLModel(params=dict(weights), current_round=number, meta={COUNTED: {"A": last}})


def unchanged(site: str, task: str, number: int, reply: FLModel) -> FLModel:
    return reply


def run_here(run: FlareRun, workspace: Path, between: Callable[..., FLModel | None] = unchanged) -> RoundsHere:
    """A whole run: the exported job's files, the rounds and the members."""
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


def test_one_process_and_flare_give_the_same_weights(dataset, tmp_path):
    """Property 5, without FLARE's processes: global and personalised models, and every figure of the history."""
    federation = one_process(tmp_path / "one", dataset)
    run = flare_run(tmp_path / "flare", dataset)
    run_here(run, tmp_path / "work")
    assert run._finish(tmp_path / "work") == tmp_path / "flare" / "models" / "model.pt"
    assert_same(load_weights(tmp_path / "flare" / "models" / "model.pt"), federation.weights)
    for site in SITES:
        found = load_weights(tmp_path / "flare" / "sites" / site / f"model_{site}.pt")
        assert_same(found, load_weights(tmp_path / "one" / "models" / f"model_{site}.pt"))
        assert_same(load_weights(tmp_path / "flare" / "sites" / site / "model.pt"), federation.weights)
    for name in ("shares", "scores"):
        found, expected = (json.loads((tmp_path / run / "models" / f"{name}.json").read_text()) for run in ENGINES)
        keys = SITES if name == "shares" else ["usual_shift"]
        assert found == pytest.approx({key: expected[key] for key in keys}, rel=1e-5)
    assert figures(tmp_path / "flare") == figures(tmp_path / "one")


def test_weights_counts_and_numbers_cross_the_wire_and_no_personalised_model(dataset, tmp_path):
    """Every object that the server receives is looked at."""
    averaged = {**TINY, "device": "cpu", "start_epoch": 0}  # else a personalised model may equal the newest local one
    rounds = run_here(flare_run(tmp_path / "flare", dataset, settings=averaged), tmp_path / "work")
    kept = [load_weights(path) for path in (tmp_path / "flare" / "sites").glob("*/model_*.pt")]
    assert len(kept) == len(SITES)
    assert len(rounds.wire.answers) == (2 * 2 + 1) * len(SITES)
    for site, task, reply in rounds.wire.answers:
        assert all(type(value) is float for value in reply.metrics.values())
        if task == "train":
            assert set(reply.meta) == {"initial_metrics", FLMetaKey.NUM_STEPS_CURRENT_ROUND}
            assert reply.meta[FLMetaKey.NUM_STEPS_CURRENT_ROUND] == {"A": 1, "B": 2}[site]
            assert list(reply.params) == list(rounds.persistor.state["weights"])
            assert not any(all(torch.equal(reply.params[key], model[key]) for key in model) for model in kept)
        else:
            assert reply.params is None
            assert reply.meta == {}
    written = {path.name for path in (tmp_path / "work" / "iopfl").rglob("*") if path.is_file()}
    assert written == {"model.pt", "history.csv", "flare.pt", "shares.json", "scores.json"}


# ---- faults, with fake clients ---------------------------------------------------------------------------------------


class FakeClient:
    """A site whose local weights depend on the global ones, its own past and the round."""

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
        # what a site has kept must show in what it sends, or a test of resuming would prove nothing
        return {
            key: 0.9 * tensor + 0.1 * self.personalised[key] if tensor.is_floating_point() else tensor
            for key, tensor in update.items()
        }

    def settle(self, weights: Mapping[str, Tensor], own_rounds: int, shares: Sequence[float]) -> float:
        for _ in range(own_rounds):
            self.train(weights)
        return shares[1]

    def shift(self, weights: Mapping[str, Tensor]) -> float:
        return 0.25

    def metrics(self) -> dict[str, float]:
        return {"train_loss": 1.0 / self.epoch}

    def validate(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        return {"val_mean_dice": float(next(iter(weights.values())).double().mean())}

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "personalised": self.personalised}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.personalised = state["epoch"], dict(state["personalised"])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    monkeypatch.setattr(flare_client, "SiteClient", FakeClient)
    return FakeClient


def failed(output_dir: Path) -> list[tuple[str, str]]:
    rows = read_rows(output_dir / "history.csv")
    return [(row["round"], row["site"]) for row in rows if row["metric"] == "failed"]


def test_site_that_fails_is_left_out_of_the_round_and_comes_back_as_it_was(dataset, tmp_path, fake, monkeypatch):
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


def test_too_few_usable_updates_end_the_run_with_what_was_done(dataset, tmp_path, fake):
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
def test_update_that_does_not_fit_is_refused_and_the_others_go_on(spoil):
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
def test_update_far_off_the_others_is_refused_unless_there_is_no_bound(factor, used):
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


class Interrupted(BaseException):
    """As a lost machine would end a run."""


@pytest.mark.slow
def test_run_cut_off_at_any_instant_and_resumed_ends_with_the_same_weights(dataset, tmp_path, fake, monkeypatch):
    """Cut off between any two messages, and before each file that the server or a site writes."""
    instants, end = 0, -1

    def tick(*args: Any) -> Any:
        nonlocal instants
        instants += 1
        if instants == end:
            raise Interrupted
        return args[-1]

    for module in (flare_server, flare_client):
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
    messages = 2 * (2 * 2 + 1)  # of each site: two a round, and one at the end
    of_sites = 2 * (2 * 3 + 2)  # files: two a training, one a scoring, two at the end
    of_server = 1 + 2 * 2 + 1  # the first checkpoint, two files a round, the last checkpoint
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
    with pytest.raises(InputError, match=r"alpha 0\.5, now it is 0\.9"):
        other._begin()
    with pytest.raises(InputError, match="earlier run"):
        flare_run(tmp_path / "flare", dataset)._begin()


# ---- what is asked for, and what travels -----------------------------------------------------------------------------


def test_job_carries_settings_for_the_named_sites_and_nothing_of_the_machine(tmp_path):
    job = flare_run(tmp_path / "flare", None, settings={**TINY, "min_sites": 1}, round_timeout=60).export()
    files = {str(path.relative_to(job)) for path in job.rglob("*") if path.is_file()}
    of_site = {"config/config_fed_client.json", "custom/federation.json", "custom/iopfl_site.py"}
    expected = {"meta.json", "app_server/config/config_fed_server.json", "app_server/custom/flare.pt"}
    assert files == expected | {f"app_{site}/{name}" for site in SITES for name in of_site}
    for path in job.rglob("*"):
        if path.is_file():
            assert not any(str(place).encode() in path.read_bytes() for place in (tmp_path, REPOSITORY, Path.home()))
    assert json.loads((job / "meta.json").read_text())["min_clients"] == 1
    server = json.loads((job / "app_server" / "config" / "config_fed_server.json").read_text())
    settled = {name: TINY[name] for name in OF_THE_FEDERATION}
    rounds = {"sites": SITES, "rounds": 2, "min_sites": 1, "round_timeout": 60, **settled}
    assert server["workflows"][0]["args"] == rounds
    settings = json.loads((job / "app_A" / "custom" / "federation.json").read_text())
    assert settings["overrides"]["image_size"] == TINY["image_size"]
    assert len((job / "app_A" / "custom" / "iopfl_site.py").read_text().split()) < 10


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sites": "A"}, "sites must be a list"),
        ({"sites": []}, "sites must be a list"),
        ({"sites": ["A", "A"]}, "different names"),
        ({"sites": ["A", "B C"]}, "'B C' can be no client"),
        ({"sites": ["A", "server"]}, "'server' can be no client"),
        ({"sites": ["A", "C"]}, "site 'C' is not known"),
        ({"sites": ["A", "one"]}, "needs at least 3 cases"),
        ({"rounds": 0}, "rounds and local_epochs must be at least 1"),
        ({"min_sites": 3}, "min_sites must be 0 (all) to 2"),
        ({"min_sites": -1}, "min_sites must be 0 (all) to 2"),
        ({"round_timeout": -1}, "round_timeout must be"),
        ({"env": "cloud"}, "unknown env 'cloud'"),
        ({"dataset_dir": None}, "no dataset_dir"),
        ({"dataset_dir": "nowhere"}, "no such folder"),
        ({"bundle": "nowhere"}, "no bundle at"),
        ({"imge_size": 64}, "unknown setting 'imge_size'"),
        ({"ckpt_dir": "elsewhere"}, "unknown setting 'ckpt_dir'"),
        ({"alpha": "$__import__('os').getcwd()"}, "alpha must be a plain value"),
        ({"features": ["@seed"]}, "features must be a plain value"),
        ({"features": {"_target_": "os.getcwd"}}, "features must be a plain value"),
        ({"env": "prod"}, "each site names its own data"),
        ({"env": "prod", "dataset_dir": None, "startup_kit": "nowhere"}, "no startup kit"),
        ({"output_dir": "with space"}, "no path with spaces"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_before_anything_starts(options, words, dataset, tmp_path, monkeypatch):
    for environment in ("SimEnv", "PocEnv", "ProdEnv"):
        monkeypatch.delattr(f"shared_iopfl.flare.{environment}")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dataset, tmp_path / "sites")
    (tmp_path / "sites" / "one").mkdir()
    for name in ("Case00.nii.gz", "Case00_segmentation.nii.gz"):
        shutil.copy(dataset / "A" / name, tmp_path / "sites" / "one" / name)
    usual = {"env": "sim", "bundle": str(BUNDLE), "sites": SITES, "rounds": 2, "output_dir": "out"}
    with pytest.raises(InputError) as error:
        federate(**{**usual, "dataset_dir": str(tmp_path / "sites"), **TINY, **options})
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_command_without_flare_says_how_to_install_it(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("nvflare", "shared_iopfl.flare"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvflare", None)
    with pytest.raises(InputError, match="pip install"):
        command.flare("bundle", SITES, "out")


# ---- a site ----------------------------------------------------------------------------------------------------------


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


def test_what_a_site_says_of_itself_goes_before_the_job(tmp_path, fake):
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


def test_site_that_lacks_a_folder_or_has_another_bundle_takes_no_part(tmp_path, fake):
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


def test_site_keeps_two_states_of_its_run_and_none_of_another(tmp_path, fake):
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


def test_site_whose_update_did_not_count_goes_back_and_so_does_its_model(tmp_path, fake):
    """Refused or too late, which the server alone knows, and tells with its next task."""
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


def test_site_scores_the_global_model_and_its_own(tmp_path, fake):
    member = Member(JOB, "A", {"IOPFL_OUTPUT_DIR": str(tmp_path), "IOPFL_BUNDLE": str(BUNDLE)})
    member.answer("train", received({"w": torch.zeros(2)}, 0))
    figures = member.answer("validate", received({"w": torch.full((2,), 7.0)}, 0, counted=1)).metrics
    own = float(member.client(1).personalised["w"].double().mean())
    assert figures == {"global/val_mean_dice": 7.0, "personalised/val_mean_dice": own}
    assert own != 7.0
    assert load_weights(tmp_path / "sites" / "A" / "model.pt")["w"].tolist() == [7, 7]


# ---- publishing ------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """What two sites have kept."""
    for number, site in enumerate(SITES):
        folder = tmp_path / "sites" / site
        folder.mkdir(parents=True)
        torch.save({"w": torch.zeros(2)}, folder / "model.pt")
        torch.save({"w": torch.full((2,), number + 1.0)}, folder / f"model_{site}.pt")
    return tmp_path


def test_personalised_models_are_published_by_name_only(kept):
    (path,) = publish_sites(str(kept), ["B"])
    assert path == kept / "models" / "model_B.pt"
    assert load_weights(path)["w"].tolist() == [2, 2]
    assert [path.name for path in (kept / "models").iterdir()] == ["model_B.pt"]


@pytest.mark.parametrize(
    "sites, words",
    [([], "must be a list"), ("A", "must be a list"), (["A", "C"], "no model at"), (["../A"], "can be no client")],
)
def test_nothing_is_published_unless_all_that_is_named_is_there(sites, words, kept):
    with pytest.raises(InputError, match=words):
        publish_sites(str(kept), sites)
    assert not (kept / "models").exists()


@pytest.mark.parametrize("wrong", [{"v": torch.zeros(2)}, {"w": torch.zeros(3)}, {"w": torch.full((2,), torch.nan)}])
def test_model_that_does_not_fit_the_global_one_is_not_published(wrong, kept):
    torch.save(wrong, kept / "sites" / "B" / "model_B.pt")
    with pytest.raises(InputError, match=r"site 'B'|model_B"):
        publish_sites(str(kept), SITES)
    assert not (kept / "models").exists()
