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
"""What a client sends with the privacy filter: a clipped part of the changes, reproducible by its seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.fl.utils.constants import WeightType
from monai.fl.utils.exchange_object import ExchangeObject
from networks import images, unet, untouched
from torch import Tensor

from shared_iopfl.federation.monai_fl.filters import ArrivedWeights, SelectiveSharing
from shared_iopfl.utils.errors import InputError

CHANGES = {"a": images(40, 50), "b": 100 * images(30, 10, seed=1), "count": torch.tensor(3)}


def sent(changes: dict[str, Tensor], epoch: int = 1, **options: Any) -> dict[str, Tensor]:
    data = ExchangeObject(dict(changes), weight_type=WeightType.WEIGHT_DIFF, statistics={"current_epoch": epoch})
    return SelectiveSharing(**options)(data, {}).weights


def test_small_changes_are_withheld_and_large_ones_clipped() -> None:
    """The limits are those of each tensor; integers are not changed."""
    result = sent(CHANGES, percentile=20, clip=90)
    for name in "ab":
        size, kept = CHANGES[name].abs(), result[name].abs()
        assert float((kept == 0).float().mean()) == pytest.approx(0.2, abs=0.01)
        assert float((size > kept.max()).float().mean()) == pytest.approx(0.1, abs=0.01)
        assert size[kept == 0].max() <= size[kept > 0].min()
        between = (kept > 0) & (size <= kept.max())
        assert torch.equal(result[name][between], CHANGES[name][between])
    assert torch.equal(result["count"], CHANGES["count"])


def test_open_filter_changes_nothing() -> None:
    result = sent(CHANGES, percentile=0, clip=100, share=1)
    assert all(torch.equal(result[name], change) for name, change in CHANGES.items())


def test_random_part_of_the_changes_is_sent() -> None:
    """It differs between rounds, is the same for the same seed, and does not use the global random state."""
    with untouched():
        one, again, later, other = (
            sent(CHANGES, epoch, percentile=0, share=0.3, seed=seed) for epoch, seed in ((1, 0), (1, 0), (2, 0), (1, 1))
        )
    for name in "ab":
        assert float((one[name] != 0).float().mean()) == pytest.approx(0.3, abs=0.08)
        assert torch.equal(one[name], again[name])
        assert not torch.equal(one[name] != 0, later[name] != 0)
        assert not torch.equal(one[name] != 0, other[name] != 0)


def test_values_at_the_server_stay_between_the_old_values_and_those_of_the_site() -> None:
    """A variance therefore stays positive."""
    old, new = unet(0).state_dict(), unet(1).state_dict()
    result = sent({name: new[name] - old[name] for name in old}, share=0.7)
    for name, tensor in old.items():
        value = tensor + result[name]
        low, high = torch.minimum(tensor, new[name]), torch.maximum(tensor, new[name])
        assert ((value >= low - 1e-5) & (value <= high + 1e-5)).all(), name
        if name.endswith("running_var"):
            assert (value > 0).all()


def test_full_weights_are_filtered_by_their_changes_and_sent_only_if_they_had_arrived() -> None:
    """The filter is applied to the difference from the weights that arrived last."""
    old, new = {"a": torch.ones(40, 50)}, {"a": torch.ones(40, 50) + CHANGES["a"], "own": torch.ones(2)}
    arrived = ArrivedWeights()
    options: dict[str, Any] = {"arrived": arrived, "percentile": 20, "clip": 90, "share": 0.5}
    nothing = SelectiveSharing(**options)(ExchangeObject(dict(new), weight_type=WeightType.WEIGHTS))
    assert nothing.weights == {}
    assert arrived(ExchangeObject(old)).weights is old
    old["a"] += 1  # the server changes its own tensors
    data = ExchangeObject(dict(new), weight_type=WeightType.WEIGHTS, statistics={"current_epoch": 1})
    result = SelectiveSharing(**options)(data).weights
    assert list(result) == ["a"]
    expected = sent({"a": CHANGES["a"]}, **{**options, "arrived": None})["a"]
    torch.testing.assert_close(result["a"] - 1, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"percentile": -1}, {"percentile": 99}, {"clip": 101}, {"share": 0}, {"share": 1.5}], ids=str
)
def test_limits_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        SelectiveSharing(**wrong)  # type: ignore[arg-type]
