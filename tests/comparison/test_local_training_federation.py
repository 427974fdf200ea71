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
"""The methods inside, switched by the training config: off by default, and a federation with each of them on."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from trained_sites import State, _process_as_it_was, equal  # noqa: F401

from shared_iopfl.comparison.training import fine_tune
from shared_iopfl.data.phantoms.sites import make_prostate_sites
from shared_iopfl.federation.simulation import Federation, SiteClient
from shared_iopfl.models.files import load_weights
from shared_iopfl.models.weights import interpolate


@pytest.fixture(scope="module")
def sites_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sites")
    make_prostate_sites(folder, sites=("A", "B"), cases=4, size=(32, 32, 8))
    return folder


def federation(data: Path, folder: Path, resume: bool = False, **overrides: Any) -> Federation:
    tiny = {"image_size": 32, "features": 4, "device": "cpu", "passes": 2, "batch_size": 2, "slices_per_case": 2}
    quiet = {"verbose": False, "tensorboard": False, "save_checkpoints": False, "val_interval": 0}
    bundle = str(Path(__file__).parents[2] / "bundles" / "prostate_iopfl")
    given_overrides = {"dataset_dir": str(data), **tiny, **quiet, **overrides}
    return Federation(bundle, ["A", "B"], 2, str(folder), overrides=given_overrides, val_interval=0, resume=resume)


def personal(client: SiteClient, weights: State) -> State:
    if "ditto" in client.kept:
        return client.kept["ditto"].personal_state()
    return client.kept["local_norms"].personal_state(weights) if "local_norms" in client.kept else weights


@pytest.mark.slow
@pytest.mark.parametrize("switch", [{}, {"proximal": 0.1}, {"local_norms": True}, {"ditto": 0.5}])
def test_federation_with_a_switch_on_runs_and_resumes(sites_dir, tmp_path, switch, monkeypatch):
    """Interrupted in its second round and resumed: global and site's own models to the bit; off, the handler is not."""
    whole = federation(sites_dir, tmp_path / "whole", **switch)
    whole.run()
    names = {"optimizer", "lr_scheduler", "personalization"} | (set(switch) & {"local_norms", "ditto"})
    assert all(set(client.kept) == names for client in whole.clients.values())

    train = SiteClient.train

    def train_until_the_power_goes(self: SiteClient, *arguments: Any) -> State:
        if self.site == "B" and self.algo.trainer.state.epoch == 1:  # type: ignore[union-attr]
            raise KeyboardInterrupt
        return train(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SiteClient, "train", train_until_the_power_goes)
        with pytest.raises(KeyboardInterrupt):
            federation(sites_dir, tmp_path / "part", **switch).run()
    resumed = federation(sites_dir, tmp_path / "part", resume=True, **switch)
    resumed.run()
    assert equal(resumed.weights, whole.weights)
    for site in "AB":
        one, other = (personal(run.clients[site], run.weights) for run in (resumed, whole))
        assert equal(one, other)
        assert equal(one, whole.weights) == ("ditto" not in switch and "local_norms" not in switch)


@pytest.mark.slow
def test_switches_change_what_is_learnt_and_fine_tuning_changes_nothing_else(sites_dir, tmp_path):
    plain = federation(sites_dir, tmp_path / "plain")
    plain.run()
    # a personal model beside the local one changes no weight that is sent; the others do
    assert equal(federation(sites_dir, tmp_path / "ditto", ditto=0.5).run(), plain.weights)
    for name, switch in {"proximal": {"proximal": 1.0}, "norms": {"local_norms": True}}.items():
        assert not equal(federation(sites_dir, tmp_path / name, **switch).run(), plain.weights)

    client, published = plain.clients["A"], tmp_path / "plain" / "models" / "model_A.pt"
    before, stamp = copy.deepcopy(client.state_dict()), os.stat(published).st_mtime_ns
    tuned = fine_tune(client, plain.weights, 2)
    again = fine_tune(client, plain.weights, 2)
    assert equal(tuned, again) and not equal(tuned, plain.weights)
    assert os.stat(published).st_mtime_ns == stamp
    assert equal(client.personalised, before["kept"]["personalization"]["model"])
    assert client.state_dict()["epoch"] == before["epoch"]
    by_hand = client.train(client.train(plain.weights))
    assert equal(tuned, by_hand)
    rate = client.kept["optimizer"].param_groups[0]["lr"]
    assert rate == pytest.approx(0.1 * 0.001), "the tail's small rate"


@pytest.mark.slow
def test_selected_model_goes_on_from_the_average_and_is_what_is_published(sites_dir, tmp_path):
    """By the formula: two rounds of its own from the global weights, averaged on; the global weights stay."""
    plain = federation(sites_dir, tmp_path / "plain")
    plain.run()
    client, expected, own = plain.clients["A"], dict(plain.clients["A"].personalised), dict(plain.weights)
    averages = [{key: tensor.clone() for key, tensor in expected.items()}]
    expected = averages[0]
    handler, before = client.kept["personalization"], copy.deepcopy(client.state_dict())
    count = handler.count
    for _ in range(2):
        own, count = client.train(own), count + 1
        momentum = 1.0 if count == 1 else (1 - handler.alpha) / (1 - handler.alpha**count)
        expected = {
            key: torch.lerp(tensor, own[key], momentum) if tensor.is_floating_point() else own[key]
            for key, tensor in expected.items()
        }
        averages.append(expected)
    client.load_state_dict(before)
    assert client.select_personalised(plain.weights, 2, ()) == 1.0
    assert equal(client.personalised, expected)

    selected = federation(sites_dir, tmp_path / "selected")
    selected.own_rounds, selected.shares = 2, (0.5, 1.0)
    selected.run()
    assert equal(selected.weights, plain.weights)
    shares = json.loads((tmp_path / "selected" / "models" / "shares.json").read_text())
    published = load_weights(tmp_path / "selected" / "models" / "model_A.pt")
    assert shares.keys() == {"A", "B"} and shares["A"] in (0.0, 0.5, 1.0)
    assert any(equal(published, interpolate(plain.weights, average, shares["A"])) for average in averages)
    dice = [client.validate(weights)["val_mean_dice"] for weights in (published, plain.weights, *averages)]
    assert dice[0] >= max(dice[1:]), "never worse on its validation cases than the models it lies between"
    again = federation(sites_dir, tmp_path / "selected", resume=True)
    again.own_rounds, again.shares = 2, (0.5, 1.0)
    again.run()
    assert equal(load_weights(tmp_path / "selected" / "models" / "model_A.pt"), published)
