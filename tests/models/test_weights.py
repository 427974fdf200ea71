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
"""Finite weights, and interpolation between the global and a personalised model."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import mixture, unet
from trained_sites import equal

from shared_iopfl.models.weights import all_finite, interpolate, validated_interpolation
from shared_iopfl.utils.errors import InputError


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_one_value_that_is_not_finite_is_found_and_large_values_are_finite(dtype):
    """The sum of the largest values overflows; the sum of an infinite value and its opposite is NaN."""
    largest = torch.full((2, 1000), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(largest)
    assert all_finite(largest[:0])
    for wrong in ([torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]):
        spoilt = torch.ones(1000, dtype=dtype)
        spoilt[10 : 10 + len(wrong)] = torch.tensor(wrong).to(dtype)
        assert not all_finite(spoilt)
    assert all_finite(torch.tensor([2**62, 2**62, 2**62]))


@given(st.floats(0, 1))
@settings(max_examples=10, deadline=None)
def test_interpolation_is_the_weighted_mean_and_exact_at_its_ends(share):
    one, other = unet(1).state_dict(), unet(2).state_dict()
    kept = copy.deepcopy(one)
    between = interpolate(one, other, share)
    for key, tensor in mixture([one, other], [1 - share, share]).items():
        torch.testing.assert_close(between[key], tensor, rtol=1e-4, atol=1e-5)
        assert between[key].dtype == one[key].dtype
    assert equal(interpolate(one, other, 0), one)
    assert all(torch.equal(t, other[k]) for k, t in interpolate(one, other, 1).items() if t.is_floating_point())
    for tensor in between.values():
        tensor.zero_()
    assert equal(one, kept)


@given(st.lists(st.sampled_from([0.1, 0.5, 0.9, float("nan")]), min_size=4, max_size=4), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_validated_interpolation_is_never_worse_than_global_and_takes_the_smaller_share(dice, global_dice):
    """The global model is a candidate even if the shares do not contain 0."""
    shares = (1.0, 0.75, 0.5, 0.25)
    table = {0.0: global_dice, **dict(zip(shares, dice))}
    one, other = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    share, state = validated_interpolation(one, [other], lambda weights: table[float(weights["w"])], shares)
    best = max([global_dice, *(value for value in dice if value == value)])
    assert table[share] == best
    assert share == min(s for s, value in table.items() if value == best)
    assert float(state["w"]) == share


def test_validated_interpolation_selects_the_best_model_and_the_first_of_equal_ones():
    one, others = {"w": torch.zeros(1)}, [{"w": torch.tensor([value])} for value in (1.0, 2.0, 3.0)]
    dice = {0.0: 0.5, 0.5: 0.5, 1.0: 0.7, 1.5: 0.6, 2.0: 0.7, 3.0: 0.6}
    assert validated_interpolation(one, others, lambda state: dice[float(state["w"])], (0.5, 1.0)) == (1.0, others[0])
    dice[1.5] = 0.8  # half-way to the third, or three quarters of the second: only the former is asked for
    assert validated_interpolation(one, others, lambda state: dice[float(state["w"])], (0.5, 1.0))[0] == 0.5


def test_share_outside_its_range_is_refused():
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="share"):
            interpolate({}, {}, share)
