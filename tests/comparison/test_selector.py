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
"""Training of FedSM's selector: sites that look different are told apart, though each has images of one class only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import DataLoader, Dataset
from networks import images, untouched
from torch import Tensor
from trained_sites import State, _process_as_it_was, equal  # noqa: F401

from shared_iopfl.comparison.protocol import Comparison
from shared_iopfl.comparison.selector import LEARNING_RATE, train_selector
from shared_iopfl.comparison.training import EXPERTS, Trainings
from shared_iopfl.data.phantoms.sites import make_prostate_sites
from shared_iopfl.data.splits import site_cases
from shared_iopfl.inferers.selection import SelectorInferer, site_classifier
from shared_iopfl.models.files import load_weights
from shared_iopfl.utils.stacks import to_stack

BUNDLE = str(Path(__file__).parents[2] / "bundles" / "prostate_iopfl")
TINY = {"image_size": 32, "features": 4, "device": "cpu", "passes": 2, "batch_size": 2, "slices_per_case": 2}


def site_images(site: str, count: int, seed: int = 0) -> Tensor:
    """Noise; at site B it is smooth."""
    noise = images(count, 3, 32, 32, seed=seed)
    return torch.nn.functional.avg_pool2d(noise, 5, 1, 2) * 5 if site == "B" else noise


def loaders(**cases: int) -> dict[str, Any]:
    return {
        site: DataLoader(
            Dataset([{"image": image} for image in site_images(site, count)]),
            batch_size=4,
            shuffle=True,
            generator=torch.Generator(),
        )
        for site, count in cases.items()
    }


def trained(rounds: int, seed: int = 0, **cases: int) -> State:
    return train_selector(site_classifier(3, len(cases), seed), loaders(**cases), rounds, seed)


def test_a_federated_selector_tells_sites_apart() -> None:
    """New images of both sites are recognised, also if one site has few cases."""
    classifier = site_classifier(3, 2)
    with untouched():
        classifier.load_state_dict(trained(20, B=6, A=16))
    with torch.no_grad():
        for number, site in enumerate("AB"):
            probability = classifier(site_images(site, 8, seed=1)).softmax(1)[:, number]
            assert probability.min() > 0.8, site


def test_the_result_depends_on_the_seed_alone() -> None:
    one = trained(2, A=6, B=6)
    assert equal(one, trained(2, A=6, B=6))
    assert not equal(one, trained(2, seed=1, A=6, B=6))


def test_the_moments_of_adam_continue() -> None:
    """A federation of one site is plain training with Adam, whose moments continue from round to round."""
    alone = train_selector(site_classifier(3, 2), loaders(A=8), 3)
    classifier = site_classifier(3, 2)
    optimizer = torch.optim.Adam(classifier.parameters(), LEARNING_RATE)
    loader = loaders(A=8)["A"]
    loader.generator.manual_seed(0)
    for _ in range(3):
        for batch in loader:
            optimizer.zero_grad()
            classes = torch.zeros(len(batch["image"]), dtype=torch.long)
            torch.nn.functional.cross_entropy(classifier(batch["image"]), classes).backward()
            optimizer.step()
    for key, tensor in classifier.state_dict().items():
        torch.testing.assert_close(alone[key], tensor)


@pytest.fixture(scope="module")
def sites_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Site A without endorectal coil, B with one."""
    folder = tmp_path_factory.mktemp("sites")
    make_prostate_sites(folder, sites=("A", "B"), cases=5, size=(32, 32, 8))
    return folder


def test_the_selector_of_the_bundles_data_is_trained_once(sites_dir: Path, tmp_path: Path) -> None:
    """Its file lies beside the models, and the inferer that reads it recognises both sites' scans."""
    trainings = Trainings(BUNDLE, str(sites_dir), tmp_path, 8, {**TINY, "augment": False})
    trainings.select(["B", "A"], 0, str(tmp_path))
    state = load_weights(tmp_path / "selector.pt")
    serve = SelectorInferer({"A": {}, "B": {}}, state, gamma=0.5)
    for site in "AB":
        cases = [dict(case) for case in site_cases(sites_dir, site, "validation", fractions=EXPERTS)]
        config = trainings._config(site, {"validate#dataset#data": cases})
        for case in config.get_parsed_content("validate#dataset"):
            assert serve.select(to_stack(case["image"].as_tensor().float())) == site
    stamp = (tmp_path / "selector.pt").stat().st_mtime_ns
    trainings.select(["B", "A"], 0, str(tmp_path))
    assert (tmp_path / "selector.pt").stat().st_mtime_ns == stamp


def test_a_comparison_trains_the_selector_only_for_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is trained on the sites that are not left out, before the row is scored."""
    rows = {"global": {"mode": "off"}, "by site": {"baseline": "selector"}}
    comparison = Comparison(
        BUNDLE, "data", str(tmp_path), ["A", "B", "C"], 1, outside=rows, pooled=None, labelled=False
    )
    done: list[Any] = []
    monkeypatch.setattr(comparison.trainings, "experts", lambda *_: "models")
    monkeypatch.setattr(comparison.trainings, "select", lambda *given: done.append(given))
    monkeypatch.setattr(comparison.runs, "score", lambda run, site, method, path, **_: done.append((site, method)))
    comparison._outside_methods(tmp_path, "C", "models", ["A", "B"], 0)
    assert done[:3] == [("C", "global"), (["A", "B"], 0, "models"), ("C", "by site")]
