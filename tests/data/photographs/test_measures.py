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
"""Properties of the ratio of heights."""

from __future__ import annotations

import math

import pytest
import torch

from shared_iopfl.data.photographs.measures import (
    predicted_ratio,
    ratio_error,
    ratio_of_mask,
    reference_ratio,
    vertical_ratio,
)


def nested(cup: int, disc: int) -> torch.Tensor:
    """Return (2, W, H) as MONAI loads photographs: a disc and a cup of the given heights, with other widths."""
    targets = torch.zeros(2, 40, 60)
    targets[0, 5:15, 10 : 10 + disc] = 1
    targets[1, 7:10, 12 : 12 + cup] = 1
    return targets


def test_the_ratio_is_that_of_heights_not_of_widths_or_areas():
    disc, cup = nested(cup=10, disc=40)
    assert vertical_ratio(cup, disc) == pytest.approx(0.25)


def test_gaps_count_as_part_of_the_height():
    disc, cup = nested(cup=10, disc=40)
    cup[:, 14:20] = 0
    assert vertical_ratio(cup, disc) == pytest.approx(0.25)


def test_zero_without_inner_and_nan_without_outer():
    disc, cup = nested(cup=10, disc=40)
    assert vertical_ratio(torch.zeros_like(cup), disc) == 0
    assert math.isnan(vertical_ratio(cup, torch.zeros_like(disc)))


def test_ratios_of_targets_and_of_coded_masks_agree():
    """Prediction and reference are not interchanged, and a coded mask has the ratio of its targets."""
    pred, label = nested(cup=10, disc=40), nested(cup=30, disc=40)
    assert predicted_ratio(pred, label) == pytest.approx(0.25)
    assert reference_ratio(pred, label) == pytest.approx(0.75)
    assert ratio_error(pred, label) == ratio_error(label, pred) == pytest.approx(0.5)
    assert ratio_of_mask(pred.sum(0)) == pytest.approx(0.25)
    assert math.isnan(ratio_error(pred, torch.zeros(2, 40, 60)))
