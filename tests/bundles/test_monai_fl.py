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
"""Both bundles are clients of MONAI's federated learning as they lie: what MONAI's own tests ask of one holds for ours.

Everything here knows of MONAI's documentation and of the bundles' files, as somebody else's federation would.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.fl.client import MonaiAlgo, MonaiAlgoStats
from monai.fl.utils.constants import ExtraItems, FlStatistics, ModelType, WeightType
from monai.fl.utils.exchange_object import ExchangeObject
from torch import Tensor

from shared_iopfl.errors import root_input_error
from shared_iopfl.federation import SiteClient
from shared_iopfl.manifest import check_manifest, write_manifest
from shared_iopfl.sites import site_cases

BUNDLES = Path(__file__).parents[2] / "bundles"
NAMES = sorted(path.parents[1].name for path in BUNDLES.glob("*/configs/metadata.json"))
TINY: dict[str, Any] = {"image_size": 32, "features": 4, "device": "cpu", "passes": 1, "batch_size": 2}
FILTERS = "configs/fl_filters.json"

pytestmark = pytest.mark.filterwarnings("ignore:executing the bundle config")


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def data(name: str, tmp_path_factory: pytest.TempPathFactory, make_sites: Callable[[str, Path], Path]) -> Path:
    return make_sites(name, tmp_path_factory.mktemp("data"))


@pytest.fixture
def bundle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the bundle, as a federated system gives one to each client; the working folder is elsewhere.

    Without published models: what it is with them is a test of its own.
    """
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return Path(shutil.copytree(BUNDLES / name, tmp_path / name, ignore=shutil.ignore_patterns("models", "eval")))


@pytest.fixture
def make(bundle: Path, data: Path) -> Callable[..., MonaiAlgo]:
    """A client by MONAI's defaults: told where the data are, and its name."""

    def make(settings: dict[str, Any] | None = None, **options: Any) -> MonaiAlgo:
        own = {"dataset_dir": str(data), **TINY, **(settings or {})}
        algo = MonaiAlgo(str(bundle), train_kwargs=dict(own), eval_kwargs=dict(own), **options)
        algo.initialize({ExtraItems.CLIENT_NAME: "A"})
        return algo

    return make


def weights_of(workflow: ConfigWorkflow | None) -> dict[str, Tensor]:
    """Initial weights, by a second parser over a client's config, as MONAI's own tests make them."""
    assert workflow is not None
    parser = ConfigParser(config=deepcopy(workflow.parser.get()))
    parser.parse()
    return parser.get_parsed_content("network").state_dict()


def exchange(weights: dict[str, Tensor]) -> ExchangeObject:
    return ExchangeObject(weights={key: tensor.clone() for key, tensor in weights.items()})


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def load(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


# ---- what MONAI's own tests ask -------------------------------------------------------------------------------------


def test_trains_alone(make: Callable[..., MonaiAlgo]) -> None:
    """Without an evaluation config, after an abort that had nothing to abort."""
    algo = make(config_evaluate_filename=None, config_filters_filename=FILTERS)
    algo.abort()
    algo.train(exchange(weights_of(algo.train_workflow)), extra={})
    assert algo.trainer.state.epoch == 1
    algo.finalize()


def test_evaluates_alone(make: Callable[..., MonaiAlgo]) -> None:
    """Without a training config; the weights may come from the merged evaluation config."""
    algo = make(config_train_filename=None, config_filters_filename=FILTERS)
    metrics = algo.evaluate(exchange(weights_of(algo.eval_workflow)), extra={}).metrics
    assert isinstance(metrics["val_mean_dice"], float)
    algo.finalize()


@pytest.mark.parametrize("send_weight_diff", [True, False])
def test_gives_weights_before_the_first_round(send_weight_diff: bool, make: Callable[..., MonaiAlgo]) -> None:
    """Full weights, but no differences: there is nothing to differ from."""
    algo = make(config_evaluate_filename=None, send_weight_diff=send_weight_diff)
    if send_weight_diff:
        with pytest.raises(ValueError, match="global_weights"):
            algo.get_weights(extra={})
    else:
        given = algo.get_weights(extra={})
        assert given.is_valid_weights()
        assert equal(given.weights, algo.trainer.network.state_dict())


def test_rounds(make: Callable[..., MonaiAlgo], bundle: Path) -> None:
    """Evaluate, train, get weights, twice: figures of each round, differences to what arrived, best and final model."""
    algo = make()
    arrived, told, states = weights_of(algo.train_workflow), [], []
    with pytest.raises(ValueError, match="No best model"):
        algo.get_weights({ExtraItems.MODEL_TYPE: ModelType.BEST_MODEL})
    for number in (1, 2):
        told.append(algo.evaluate(exchange(arrived)).metrics)
        algo.train(exchange(arrived))
        assert algo.trainer.state.epoch == number
        update = algo.get_weights()
        assert update.weight_type == WeightType.WEIGHT_DIFF
        assert update.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS] > 0
        local = algo.trainer.network.state_dict()
        assert all(torch.equal(update.weights[key], local[key] - arrived[key]) for key in local)
        assert any(bool(difference.any()) for difference in update.weights.values())
        arrived = {key: tensor + update.weights[key] for key, tensor in arrived.items()}
        states.append({key: tensor.clone() for key, tensor in local.items()})
        best, final = (algo.get_weights({ExtraItems.MODEL_TYPE: kind}) for kind in ModelType)
        assert best.weight_type == final.weight_type == WeightType.WEIGHTS
        assert equal(final.weights, states[-1])
        assert any(equal(best.weights, state) for state in states)
    assert [set(metrics) for metrics in told] == [
        {"val_mean_dice"},
        {"val_mean_dice", "personalised_val_mean_dice"},
    ]
    assert all(isinstance(value, float) for metrics in told for value in metrics.values())
    assert load(bundle / "models" / "model_A.pt").keys() == arrived.keys()


def test_some_weights_may_stay_local(make: Callable[..., MonaiAlgo]) -> None:
    """A server that sends a part of the weights leaves the others to the client."""
    algo = make(config_evaluate_filename=None, send_weight_diff=False)
    own = {key: tensor.clone() for key, tensor in algo.trainer.network.state_dict().items()}
    some = {key: torch.zeros_like(tensor) for key, tensor in own.items() if key.startswith("final_conv")}
    seen: dict[str, Tensor] = {}

    def look() -> None:
        seen.update({key: tensor.clone() for key, tensor in algo.trainer.network.state_dict().items()})

    algo.trainer.add_event_handler(Events.STARTED, look)
    algo.train(exchange(some))
    assert some
    assert equal(seen, {**own, **some})


def test_statistics_of_the_data(name: str, bundle: Path, data: Path) -> None:
    """MONAI's data statistics, by a workflow and by the bundle alone with a site's data in its folder."""
    shutil.copytree(data / "A", bundle / "data" / "A")
    config = str(bundle / "configs" / "train.json")
    for workflow in (
        None,
        ConfigWorkflow(config, workflow_type="train", logging_file=False, dataset_dir=str(data), site="A"),
    ):
        algo = MonaiAlgoStats(str(bundle), workflow=workflow, config_filters_filename=FILTERS)
        algo.initialize({ExtraItems.CLIENT_NAME: "A"})
        stats = algo.get_data_stats({FlStatistics.HIST_BINS: 10, FlStatistics.HIST_RANGE: [0, 500]}).statistics
        for key, part in (("train", "train"), ("eval", "validation")):
            assert stats[key][FlStatistics.DATA_COUNT] == len(site_cases(data, "A", part))
            assert stats[key][FlStatistics.FAIL_COUNT] == 0
        assert stats[FlStatistics.TOTAL_DATA][FlStatistics.DATA_STATS]["image_histogram"]


# ---- what ours have to be besides -----------------------------------------------------------------------------------


def masks_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("masks/**/*")) if path.is_file()}


def test_evaluation_tells_of_both_models(
    name: str, make: Callable[..., MonaiAlgo], bundle: Path, random_models: Callable[..., Path]
) -> None:
    """The site's own model is scored as if it had arrived; masks and tables are those of what arrived, written once."""
    models = random_models(bundle.parent / "models", name)
    arrived = load(models / "model.pt")
    own = {key: tensor.clone() for key, tensor in arrived.items()}
    own["final_conv.bias"][-1] -= 10  # no longer sees the last target
    torch.save(own, models / "model_A.pt")
    algo = make(config_train_filename=None)
    alone, others = algo.evaluate(exchange(arrived)).metrics, algo.evaluate(exchange(own)).metrics
    algo.evaluate(exchange(arrived))
    masks, table = masks_of(bundle), (bundle / "eval" / "metrics.csv").read_bytes()
    assert masks

    (bundle / "models").mkdir()
    shutil.copy(models / "model_A.pt", bundle / "models")
    both = algo.evaluate(exchange(arrived)).metrics
    assert both == {**alone, "personalised_val_mean_dice": others["val_mean_dice"]}
    assert alone == {"val_mean_dice": both["val_mean_dice"]}
    assert both["personalised_val_mean_dice"] != both["val_mean_dice"]
    assert equal(dict(algo.evaluator.network.state_dict()), arrived)
    assert masks_of(bundle) == masks
    assert (bundle / "eval" / "metrics.csv").read_bytes() == table


def test_rounds_in_the_folder_of_published_models(
    name: str, bundle: Path, data: Path, random_models: Callable[..., Path], run_config: Callable[..., ConfigWorkflow]
) -> None:
    """Their size is the client's; what it writes is its own from then on; what it does not write stays as published."""
    models = random_models(bundle / "models", name, ("A", "B"))
    write_manifest(models, {"features": 4, "image_size": 32}, "research only")
    published = {path.name: path.read_bytes() for path in models.glob("*.pt")}
    # averaged from the first round on: before, the personalised model is the newest one, which is no routing space
    own = {"dataset_dir": str(data), "device": "cpu", "passes": 1, "start_epoch": 0}
    algo = MonaiAlgo(str(bundle), train_kwargs=dict(own), eval_kwargs=dict(own))
    algo.initialize({ExtraItems.CLIENT_NAME: "A"})
    arrived = load(models / "model.pt")
    before = algo.evaluate(exchange(arrived)).metrics
    check_manifest(models)
    assert {path.name: path.read_bytes() for path in models.glob("*.pt")} == published
    for _ in range(2):
        algo.train(exchange(arrived))
    after = algo.evaluate(exchange(arrived)).metrics
    algo.finalize()
    assert set(after) == set(before) == {"val_mean_dice", "personalised_val_mean_dice"}
    check_manifest(models)
    assert (models / "model_B.pt").read_bytes() == published["model_B.pt"]
    assert (models / "model_A.pt").read_bytes() != published["model_A.pt"]
    masks = bundle.parent / "masks"
    run_config("inference", name, bundle_root=bundle, dataset_dir=data / "E", ckpt_dir=models, output_dir=masks)
    assert {"A", "B", "global"} <= set(json.loads((masks / "routes.json").read_text())["experts"])


def test_batch_norm_may_stay_local(make: Callable[..., MonaiAlgo]) -> None:
    """FedBN by a switch: from the second round on a client trains with its own norms and all else that arrived."""
    algo = make({"local_norms": True}, config_evaluate_filename=None)
    network = algo.trainer.network
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    its_own = {id(tensor) for norm in norms for tensor in norm.state_dict(keep_vars=True).values()}
    kept = {key for key, tensor in network.state_dict(keep_vars=True).items() if id(tensor) in its_own}
    algo.train(exchange(weights_of(algo.train_workflow)))
    local = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    arrived = {key: tensor + 1 for key, tensor in local.items()}
    seen: dict[str, Tensor] = {}

    def look() -> None:
        seen.update({key: tensor.clone() for key, tensor in network.state_dict().items()})

    algo.trainer.add_event_handler(Events.EPOCH_STARTED, look)
    algo.train(exchange(arrived))
    assert len(kept) == 5 * len(norms) > 0
    assert equal(seen, {key: (local if key in kept else arrived)[key] for key in local})


def test_the_proximal_term_keeps_an_update_short(make: Callable[..., MonaiAlgo]) -> None:
    """FedProx by a switch: what a client sends lies nearer to what arrived."""
    lengths = {}
    for pull in (0.0, 100.0):
        algo = make({"proximal": pull, "passes": 4, "augment": False}, config_evaluate_filename=None)
        trained = [key for key, tensor in algo.trainer.network.named_parameters() if tensor.ndim > 1]
        algo.train(exchange(weights_of(algo.train_workflow)))
        differences = algo.get_weights().weights
        lengths[pull] = sum(float(differences[key].square().sum()) for key in trained)
    assert 0 < lengths[100.0] < 0.9 * lengths[0.0]


def test_only_validation_tells_of_both_models(
    name: str, data: Path, bundle: Path, random_models: Callable[..., Path], run_config: Callable[..., ConfigWorkflow]
) -> None:
    """A final scoring of the global model on test cases scores that one alone."""
    models = random_models(bundle.parent / "models", name)
    told = {}
    for split in ("validation", "test"):
        common = {"dataset_dir": data, "site": "A", "ckpt_dir": models, "output_dir": bundle / "eval"}
        told[split] = set(run_config("evaluate", name, split=split, **common).evaluator.state.metrics)
    assert told == {"validation": {"val_mean_dice", "personalised_val_mean_dice"}, "test": {"val_mean_dice"}}


def test_the_federation_in_one_process_scores_what_it_asks_for(bundle: Path, data: Path) -> None:
    """`SiteClient` validates both models itself: one pass each."""
    own = {"dataset_dir": str(data), "site": "A", "save_checkpoints": False, "val_interval": 0, **TINY}
    client = SiteClient(str(bundle), "A", 1, {**own, "output_dir": str(bundle), "ckpt_dir": str(bundle / "models")})
    update = client.train(client.algo.trainer.network.state_dict())
    assert (bundle / "models" / "model_A.pt").is_file()
    assert set(client.validate(update)) == {"val_mean_dice"}


def test_a_federated_client_reads_no_test_case(make: Callable[..., MonaiAlgo], data: Path, opened_files: Any) -> None:
    """Nor another site's: its rounds and evaluations open its own training and validation cases."""
    with opened_files.record() as opened:
        algo = make()
        weights = weights_of(algo.train_workflow)
        algo.train(exchange(weights))
        algo.evaluate(exchange(weights))
    learned = [
        case[key]
        for part in ("train", "validation")
        for case in site_cases(data, "A", part)
        for key in ("image", "label")
    ]
    assert {path for path in opened if path.startswith(str(data))} == {os.path.abspath(path) for path in learned}


def test_a_client_that_is_no_site_is_refused(bundle: Path, data: Path) -> None:
    """Rather than trained on the scans of the site that the config names."""
    own = {"dataset_dir": str(data), **TINY}
    algo = MonaiAlgo(str(bundle), train_kwargs=dict(own), eval_kwargs=dict(own))
    with pytest.raises(Exception) as caught:
        algo.initialize({ExtraItems.CLIENT_NAME: "site-1"})
    assert "'site-1' is none of the sites" in str(root_input_error(caught.value))


@pytest.mark.parametrize("send_weight_diff", [True, False])
def test_privacy_filter(send_weight_diff: bool, make: Callable[..., MonaiAlgo], bundle: Path) -> None:
    """A part of each update leaves, of differences and of full weights; the bundles have one filter file."""
    assert len({(BUNDLES / other / FILTERS).read_bytes() for other in NAMES}) == 1
    algo = make(config_filters_filename=FILTERS, send_weight_diff=send_weight_diff, config_evaluate_filename=None)
    arrived = weights_of(algo.train_workflow)
    algo.train(exchange(arrived))
    sent = algo.get_weights().weights
    local = algo.trainer.network.state_dict()
    withheld = total = 0
    for key, tensor in local.items():
        change, given = tensor - arrived[key], sent[key] if send_weight_diff else sent[key] - arrived[key]
        if tensor.is_floating_point():
            assert ((given.abs() <= change.abs() + 1e-6) & (given * change >= 0)).all()
            withheld, total = withheld + int(((given == 0) & (change != 0)).sum()), total + change.numel()
        else:
            assert torch.equal(given, change)
    assert 0.1 < withheld / total < 0.3
    again = algo.get_weights().weights
    assert all(torch.equal(sent[key], again[key]) for key in sent)


# ---- the end --------------------------------------------------------------------------------------------------------


def held() -> tuple[set[int], set[str]]:
    """Threads, and files that this process has open."""
    files = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            files.add(os.readlink(link))
        except OSError:
            continue
    return {thread.ident for thread in threading.enumerate() if thread.ident}, {f for f in files if f.startswith("/")}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files by /proc")
def test_abort_and_finalize_leave_nothing_behind(make: Callable[..., MonaiAlgo], bundle: Path) -> None:
    """A round ends where it is aborted and makes no personalised model; another may follow; then nothing is held.

    And nothing was ever written but in the client's own folder.
    """
    threads, files = held()
    algo = make(config_filters_filename=FILTERS)
    weights = weights_of(algo.train_workflow)
    algo.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda engine: algo.abort())
    algo.train(exchange(weights))
    assert algo.trainer.state.iteration == 1
    assert not (bundle / "models" / "model_A.pt").exists()
    algo.train(exchange(weights))
    assert (bundle / "models" / "model_A.pt").exists()
    algo.evaluate(exchange(weights))
    assert held()[0] > threads  # of the event writers
    algo.finalize()
    assert held() == (threads, files)
    assert list((bundle.parent / "elsewhere").iterdir()) == []


@pytest.mark.slow
def test_third_party_federation(name: str, data: Path, tmp_path: Path) -> None:
    """A script that knows MONAI and no more runs two rounds over two clients, in a process of its own."""
    script = Path(__file__).with_name("third_party_fl.py")
    assert "shared_iopfl" not in script.read_text()
    (tmp_path / "elsewhere").mkdir()
    process = subprocess.run(
        [sys.executable, str(script), str(BUNDLES / name), str(data), str(tmp_path), "A", "B"],
        input=json.dumps(TINY), cwd=tmp_path / "elsewhere", env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    rounds = json.loads((tmp_path / "metrics.json").read_text())
    assert len(rounds) == 2
    for told in rounds:
        assert told["size"] > 0
        assert set(told["metrics"]) == {"A", "B"}
        for metrics in told["metrics"].values():
            assert set(metrics) == {"val_mean_dice", "personalised_val_mean_dice"}
            assert all(0 <= value <= 1 for value in metrics.values())
    assert list((tmp_path / "elsewhere").iterdir()) == []
    shipped = {path.name for path in (BUNDLES / name).glob("models/*")}
    for client in "AB":  # each made its own personalised model, and no other's
        models = {path.name for path in (tmp_path / client / "app" / "models").iterdir()}
        assert models == shipped | {"model.pt", "model_final.pt", f"model_{client}.pt"}
