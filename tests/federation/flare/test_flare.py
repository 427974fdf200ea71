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
"""The federation with NVIDIA FLARE: it gives the weights of the one-process run, and sends nothing personal."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nvflare", reason="NVIDIA FLARE is not installed: pip install '.[flare]'")

from flare_here import _dataset, _process_as_it_was, flare_run, run_here  # noqa: F401
from flare_runs import BUNDLE, OF_THE_FEDERATION, REPOSITORY, SITES, TINY, assert_same, figures, matrix, one_process
from nvflare.apis.fl_constant import FLMetaKey

from shared_iopfl.commands import tools as command
from shared_iopfl.federation.flare.messages import PUBLISH
from shared_iopfl.federation.flare.results import publish_sites
from shared_iopfl.models.files import load_weights
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import read_rows

ENGINES = ("flare", "one")


def test_one_process_and_flare_give_the_same_weights(dataset, tmp_path, monkeypatch):
    """Property 5, without FLARE's processes: global and personalised models, every metric of the history, and the Dice
    of each model at each site, for which the sites publish their models."""
    monkeypatch.setenv(PUBLISH, "True")
    federation = one_process(tmp_path / "one", dataset)
    run = flare_run(tmp_path / "flare", dataset, publish=True)
    run_here(run, tmp_path / "work")
    assert run._finish(tmp_path / "work") == tmp_path / "flare" / "models" / "model.pt"
    assert_same(load_weights(tmp_path / "flare" / "models" / "model.pt"), federation.weights)
    for site in SITES:
        found = load_weights(tmp_path / "flare" / "sites" / site / f"model_{site}.pt")
        assert_same(found, load_weights(tmp_path / "one" / "models" / f"model_{site}.pt"))
        assert_same(load_weights(tmp_path / "flare" / "models" / f"model_{site}.pt"), found)
        assert_same(load_weights(tmp_path / "flare" / "sites" / site / "model.pt"), federation.weights)
    for name in ("shares", "scores"):
        found, expected = (json.loads((tmp_path / run / "models" / f"{name}.json").read_text()) for run in ENGINES)
        assert found == pytest.approx(expected, rel=1e-5)
    assert figures(tmp_path / "flare") == figures(tmp_path / "one")
    assert list(matrix(tmp_path / "flare")) == [("global", "A"), ("global", "B"), ("A", "B"), ("B", "A")]
    assert matrix(tmp_path / "flare") == pytest.approx(matrix(tmp_path / "one"), abs=1e-5)
    assert len(set(matrix(tmp_path / "flare").values())) == 4, "models that are all alike would prove nothing"
    assert "Models at other sites" in (tmp_path / "flare" / "report.html").read_text()
    tables = [read_rows(tmp_path / run / "statistics.csv") for run in ENGINES]
    assert [row["site"] for row in tables[0]] == list(SITES)
    for found, expected in zip(*tables):
        assert all(float(found[key]) == pytest.approx(float(expected[key]), abs=1e-5) for key in ("global", "own"))


def test_sites_send_weights_counts_and_numbers_but_no_personalised_model(dataset, tmp_path):
    """The test inspects every object that the server receives."""
    averaged = {**TINY, "device": "cpu", "start_epoch": 0}  # so that no personalised model equals the newest local one
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
    assert written == {"model.pt", "history.csv", "flare.pt", "statistics.csv", "shares.json", "scores.json"}


# ---- settings and the job -------------------------------------------------------------------------------------------


def test_job_carries_settings_for_the_named_sites_and_nothing_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
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
    assert settings["tracking"] == "" and not any("Receiver" in part["path"] for part in server["components"])
    assert len((job / "app_A" / "custom" / "iopfl_site.py").read_text().split()) < 10
    job = flare_run(tmp_path / "tracked", None, settings=TINY, tracking="mlflow").export()
    server = json.loads((job / "app_server" / "config" / "config_fed_server.json").read_text())
    assert any(part["path"].endswith("MLflowReceiver") for part in server["components"])
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true", "its makers are told nothing"
    assert json.loads((job / "app_A" / "custom" / "federation.json").read_text())["tracking"] == "mlflow"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sites": "A"}, "sites must be a list"),
        ({"sites": []}, "sites must be a list"),
        ({"sites": ["A", "A"]}, "different names"),
        ({"sites": ["A", "B C"]}, "'B C' cannot be a client"),
        ({"sites": ["A", "server"]}, "'server' cannot be a client"),
        ({"sites": ["A", "C"]}, "site 'C' is not known"),
        ({"sites": ["A", "one"]}, "needs at least 3 patients"),
        ({"rounds": 0}, "rounds must be a whole number from 1"),
        ({"min_sites": 3}, "min_sites must be 0 (all) to 2"),
        ({"min_sites": -1}, "min_sites must be a whole number from 0"),
        ({"round_timeout": -1}, "round_timeout must be"),
        ({"env": "cloud"}, "unknown env 'cloud'"),
        ({"tracking": "wandb"}, "tracking must be tensorboard or mlflow"),
        ({"dataset_dir": None}, "no dataset_dir"),
        ({"dataset_dir": "nowhere"}, "no such folder"),
        ({"bundle": "nowhere"}, "no bundle at"),
        ({"imge_size": 64}, "unknown setting 'imge_size'"),
        ({"ckpt_dir": "elsewhere"}, "unknown setting 'ckpt_dir'"),
        ({"alpha": "$__import__('os').getcwd()"}, "alpha must be a plain value"),
        ({"features": ["@seed"]}, "features must be a plain value"),
        ({"features": {"_target_": "os.getcwd"}}, "features must be a plain value"),
        ({"env": "prod"}, "each site sets its own data"),
        ({"env": "prod", "dataset_dir": None, "startup_kit": "nowhere"}, "no startup kit"),
        ({"output_dir": "with space"}, "no path with spaces"),
    ],
)
def test_wrong_settings_are_refused_in_one_line_before_anything_starts(options, words, dataset, tmp_path, monkeypatch):
    for environment in ("SimEnv", "PocEnv", "ProdEnv"):
        monkeypatch.delattr(f"shared_iopfl.federation.flare.run.{environment}")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dataset, tmp_path / "sites")
    (tmp_path / "sites" / "one").mkdir()
    for name in ("Case00.nii.gz", "Case00_segmentation.nii.gz"):
        shutil.copy(dataset / "A" / name, tmp_path / "sites" / "one" / name)
    usual = {"env": "sim", "bundle": str(BUNDLE), "sites": SITES, "rounds": 2, "output_dir": "out"}
    with pytest.raises(InputError) as error:
        command.flare(**{**usual, "dataset_dir": str(tmp_path / "sites"), **TINY, **options})
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_command_without_flare_explains_how_to_install_it(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("nvflare", "shared_iopfl.federation.flare.run"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvflare", None)
    with pytest.raises(InputError, match="pip install"):
        command.flare("bundle", SITES, "out")


# ---- publishing ------------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The models that two sites have kept."""
    for number, site in enumerate(SITES):
        folder = tmp_path / "sites" / site
        folder.mkdir(parents=True)
        torch.save({"w": torch.zeros(2)}, folder / "model.pt")
        torch.save({"w": torch.full((2,), number + 1.0)}, folder / f"model_{site}.pt")
    return tmp_path


def test_only_personalised_models_that_are_named_are_published(kept):
    (path,) = publish_sites(str(kept), ["B"])
    assert path == kept / "models" / "model_B.pt"
    assert load_weights(path)["w"].tolist() == [2, 2]
    assert [path.name for path in (kept / "models").iterdir()] == ["model_B.pt"]


@pytest.mark.parametrize(
    "sites, words",
    [([], "must be a list"), ("A", "must be a list"), (["A", "C"], "no model at"), (["../A"], "cannot be a client")],
)
def test_nothing_is_published_unless_all_named_models_exist(sites, words, kept):
    with pytest.raises(InputError, match=words):
        publish_sites(str(kept), sites)
    assert not (kept / "models").exists()


@pytest.mark.parametrize("wrong", [{"v": torch.zeros(2)}, {"w": torch.zeros(3)}, {"w": torch.full((2,), torch.nan)}])
def test_model_that_does_not_fit_the_global_one_is_not_published(wrong, kept):
    torch.save(wrong, kept / "sites" / "B" / "model_B.pt")
    with pytest.raises(InputError, match=r"site 'B'|model_B"):
        publish_sites(str(kept), SITES)
    assert not (kept / "models").exists()
