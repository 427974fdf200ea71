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
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fl_bundles import (
    BUNDLES,
    FILTERS,
    TINY,
    equal,
    exchange,
    load,
    weights_of,
)
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.fl.client import MonaiAlgo, MonaiAlgoStats
from monai.fl.utils.constants import ExtraItems, FlStatistics, ModelType, WeightType
from torch import Tensor
from typed import typed

from shared_iopfl.data.splits import site_cases

pytestmark = pytest.mark.filterwarnings("ignore:executing the bundle config")

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
    where = {"cwd": tmp_path / "elsewhere", "stdin": json.dumps(TINY)}
    process = typed(script, BUNDLES / name, data, tmp_path, "A", "B", **where)
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
