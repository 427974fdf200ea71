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
"""The expected Dice of a mask: the line, its interval at sites left out, its file, and where it is shown."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torch.nn import BatchNorm2d, Conv2d

from shared_iopfl.evaluation.calibration.calibrator import trained_with
from shared_iopfl.evaluation.calibration.estimate import Calibration, fit, read_calibration
from shared_iopfl.evaluation.review import review_rows
from shared_iopfl.models.manifest import CALIBRATION
from shared_iopfl.models.weights import digest
from shared_iopfl.routing.settings import preset
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import write_json

SETTINGS = preset("default")


def masks(bias: float, count: int = 40, seed: int = 0, noise: float = 0.01) -> list[tuple[float, float]]:
    """Qualities from 0.8 to 1 and Dice = 0.2 + 0.6 quality + the site's bias."""
    generator = np.random.default_rng(seed)
    quality = generator.uniform(0.8, 1, count)
    return [(float(q), float(0.2 + 0.6 * q + bias + noise * generator.standard_normal())) for q in quality]


def test_the_line_is_found_and_the_interval_holds_at_sites_left_out():
    """Biases of sites, not noise between cases, set the width of the interval."""
    biases = {"A": -0.1, "B": 0.0, "C": 0.1}
    calibration = fit({site: masks(bias, seed=at) for at, (site, bias) in enumerate(biases.items())}, SETTINGS)
    assert calibration.slope == pytest.approx(0.6, abs=0.1)
    assert (calibration.sites, calibration.masks) == (3, 120)
    expected, low, high = calibration.estimate(0.9)
    assert expected == pytest.approx(0.74, abs=0.02)
    assert low < 0.64 and high > 0.84  # each site differs by up to 0.15 from the line of the two others
    alike = fit({site: masks(0.0, seed=at) for at, site in enumerate(biases)}, SETTINGS)
    assert alike.high - alike.low < 0.1


def test_nine_of_ten_masks_of_the_left_out_sites_are_in_the_interval():
    pairs = {site: masks(0.0, 400, seed, 0.05) for seed, site in enumerate("ABCD")}
    calibration = fit(pairs, SETTINGS)
    inside = [low <= dice <= high for q, dice in masks(0.0, 400, 9, 0.05) for _, low, high in [calibration.estimate(q)]]
    assert np.mean(inside) == pytest.approx(0.9, abs=0.04)


def test_few_cases_widen_the_interval_to_the_largest_errors():
    """Five masks of one case err alike: they are no five errors."""
    pairs = {site: masks(0.0, 20, seed, 0.05) for seed, site in enumerate("AB")}
    own, few = fit(pairs, SETTINGS), fit(pairs, SETTINGS, cases=8)
    assert few.low < own.low and few.high > own.high
    errors = [few.low, few.high]
    for site, other in ("AB", "BA"):
        slope, intercept = np.polyfit(*zip(*pairs[other]), 1)
        errors += [dice - min(1, intercept + slope * quality) for quality, dice in pairs[site]]
    assert (min(errors), max(errors)) == pytest.approx((few.low, few.high))


def test_disagreement_never_raises_the_estimate():
    """Where Dice falls with quality by chance, the line is level; estimates stay between 0 and 1."""
    odd = {"A": [(0.8, 0.9), (0.9, 0.8)], "B": [(0.8, 0.95), (0.9, 0.7)]}
    calibration = fit(odd, SETTINGS)
    assert calibration.slope == 0
    steep = replace(calibration, intercept=-3.0, slope=5.0, low=-0.5, high=0.5)
    assert steep.estimate(0.1) == (0.0, 0.0, 0.5) and steep.estimate(1.0) == (1.0, 0.5, 1.0)


def test_one_site_cannot_tell_how_sites_differ():
    with pytest.raises(InputError, match="at least two inside sites"):
        fit({"A": masks(0.0), "B": []}, SETTINGS)


def test_it_is_read_as_it_was_written(tmp_path: Path):
    calibration = fit({"A": masks(0.0), "B": masks(0.1)}, SETTINGS)
    path = tmp_path / CALIBRATION
    write_json(path, asdict(calibration))
    assert read_calibration(str(path)) == calibration
    older = {name: value for name, value in asdict(calibration).items() if name != "models"}
    write_json(path, older)  # as version 0.13.0 wrote it
    assert not read_calibration(str(path)).made_with({"global": {}})
    assert read_calibration(str(tmp_path / "none.json")) is None and read_calibration("") is None


@pytest.mark.parametrize(
    "wrong", [{"slope": "1"}, {"low": None}, {"intercept": float("inf")}, {"settings": 1}, {"models": []}, {"other": 1}]
)
def test_another_file_is_refused_in_one_line(wrong: dict[str, object], tmp_path: Path):
    write_json(tmp_path / CALIBRATION, {**asdict(fit({"A": masks(0.0), "B": masks(0.1)}, SETTINGS)), **wrong})
    with pytest.raises(InputError, match=r"calibration\.json is not a calibration: make it again"):
        read_calibration(str(tmp_path / CALIBRATION))


def test_it_applies_to_its_own_settings_alone():
    calibration = fit({"A": masks(0.0), "B": masks(0.1)}, SETTINGS)
    assert calibration.applies_to(SimpleNamespace(settings=SETTINGS, mode="episodic"))
    assert not calibration.applies_to(SimpleNamespace(settings=SETTINGS, mode="site"))
    assert not calibration.applies_to(SimpleNamespace(settings=preset("adapted"), mode="episodic"))
    assert not calibration.applies_to(object())


def test_it_applies_to_its_own_models_in_either_precision():
    """A model that was trained further, or one that is not known, has another relation of quality to Dice."""
    models = {name: BatchNorm2d(3).state_dict() for name in ("global", "A", "B")}
    calibration = replace(Calibration(0.0, 0.9, -0.2, 0.05), models={name: digest(w) for name, w in models.items()})
    assert calibration.made_with(models)
    assert calibration.made_with({name: models[name] for name in ("global", "A")})  # some of the experts
    assert not calibration.made_with({**models, "C": models["A"]})
    further = {**models["A"], "running_mean": models["A"]["running_mean"] + 1e-6}
    assert not calibration.made_with({**models, "A": further})
    network = Conv2d(3, 4, 3).state_dict()
    assert digest(network) == digest({**network, "weight": network["weight"].half()})
    assert digest(network) != digest({**network, "bias": network["bias"] + 1e-6})


def test_the_review_list_has_it_but_not_for_an_empty_mask():
    """All views agree on an empty mask, so that its quality would promise a good one."""
    calibration = Calibration(0.0, 0.9, -0.2, 0.05)
    reports = {"good": {"quality": 1.0, "areas": [5]}, "empty": {"quality": 1.0, "areas": [0]}}
    rows = {row["case"]: row for row in review_rows(reports, calibration=calibration)}
    assert [rows["good"][name] for name in ("expected_dice", "expected_low", "expected_high")] == [
        "0.900",
        "0.700",
        "0.950",
    ]
    assert rows["empty"]["expected_dice"] == ""
    assert {row["expected_dice"] for row in review_rows(reports)} == {""}


def test_training_cases_stay_out_by_the_settings_of_the_training(tmp_path: Path):
    """The split is that of the models' manifest, or of the run beside their folder."""
    models = tmp_path / "models"
    models.mkdir()
    assert trained_with(str(models), "fractions", [0.6, 0.15, 0.25]) == [0.6, 0.15, 0.25]
    write_json(tmp_path / "run.json", {"kind": "federate", "settings": {"fractions": [0.8, 0.2, 0.0]}})
    assert trained_with(str(models), "fractions", [0.6, 0.15, 0.25]) == [0.8, 0.2, 0.0]
    entry = {"size": 0, "sha256": ""}
    published = {"architecture": {}, "sites": [], "terms": "none", "files": {"model.pt": entry}}
    write_json(models / "manifest.json", {"format": 1, **published, "training": {"fractions": [0.5, 0.5, 0.0]}})
    assert trained_with(str(models), "fractions", [0.6, 0.15, 0.25]) == [0.5, 0.5, 0.0]
