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
"""FLARE's privacy filters at a MONAI FL client: they are applied to the changes of the weights that arrived."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("nvflare", reason="NVIDIA FLARE is not installed: pip install '.[flare]'")

from flare_runs import BUNDLE
from monai.bundle import ConfigParser
from monai.fl.utils.constants import WeightType
from monai.fl.utils.exchange_object import ExchangeObject
from networks import unet, untouched
from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy
from nvflare.app_common.filters.svt_privacy import SVTPrivacy

from shared_iopfl.federation.flare.privacy import FlarePrivacy
from shared_iopfl.federation.monai_fl.filters import ArrivedWeights
from shared_iopfl.utils.errors import InputError

OLD, NEW = unet(0).state_dict(), unet(1).state_dict()


def sent(privacy: Any) -> dict[str, torch.Tensor]:
    arrived = ArrivedWeights()
    arrived(ExchangeObject(weights=dict(OLD)))
    data = ExchangeObject(weights=dict(NEW), weight_type=WeightType.WEIGHTS)
    return FlarePrivacy(privacy, arrived)(data, {}).weights


def test_withheld_values_are_those_that_arrived() -> None:
    """They are not zero, as withheld weights are in FLARE's filters."""
    result = sent(PercentilePrivacy(percentile=50, gamma=10.0))
    assert result.keys() == NEW.keys()
    floats = [name for name, tensor in OLD.items() if tensor.is_floating_point() and tensor.ndim]
    kept = torch.cat([(result[name] == OLD[name]).flatten() for name in floats])
    moved = torch.cat([torch.isclose(result[name], NEW[name], atol=1e-6).flatten() for name in floats])
    assert 0.4 < float(kept.float().mean()) < 0.6 and bool((kept | moved).all())
    assert all(result[name].dtype == tensor.dtype for name, tensor in NEW.items())


def test_noise_does_not_depend_on_a_seed_and_no_variance_is_negative() -> None:
    """With the config of the bundle, and noise that is larger than every weight."""
    config = ConfigParser()
    config.read_config(str(BUNDLE / "configs" / "fl_svt.json"))
    config.update({"gamma": 10.0, "fraction": 0.9})
    (privacy,) = config.get_parsed_content("post_weight_filters")
    config.get_parsed_content("arrived")(ExchangeObject(weights=dict(OLD)))
    with untouched():  # both start from the same global random state
        results = [privacy(ExchangeObject(weights=dict(NEW)), {}).weights for _ in range(2)]
    assert any(not torch.equal(results[0][name], results[1][name]) for name in NEW)
    for result in results:
        assert all(torch.isfinite(tensor).all() for tensor in result.values())
        assert all((tensor >= 0).all() for name, tensor in result.items() if name.endswith("running_var"))
    assert privacy.privacy.get_privacy_spent() > 0


def test_filter_that_sends_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="PercentilePrivacy sends no update with its settings"):
        sent(PercentilePrivacy(gamma=0.0))


def test_global_random_state_is_not_changed() -> None:
    with untouched():
        sent(SVTPrivacy())
