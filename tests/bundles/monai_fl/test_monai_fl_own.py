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
"""What our bundles are besides, as clients of MONAI's: both models scored, a site's own data read and no other's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fl_bundles import (
    BUNDLES,
    FILTERS,
    NAMES,
    TINY,
    equal,
    exchange,
    load,
    weights_of,
)
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from torch import Tensor

from shared_iopfl.data.splits import site_cases
from shared_iopfl.federation.simulation import SiteClient
from shared_iopfl.models.manifest import check_manifest, write_manifest
from shared_iopfl.utils.errors import root_input_error

pytestmark = pytest.mark.filterwarnings("ignore:executing the bundle config")


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
        common = {"dataset_dir": data, "site": "A", "ckpt_dir": models, "output_dir": bundle / "eval" / split}
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
