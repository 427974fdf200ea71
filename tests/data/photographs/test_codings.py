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
"""Properties of decoding and encoding masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from shared_iopfl.data.photographs.codings import (
    DecodeMask,
    DecodeMaskd,
    EncodeMask,
    EncodeMaskd,
    EnforceNesting,
    EnforceNestingd,
)
from shared_iopfl.utils.errors import InputError

KNOWN = {
    "dofe": {"disc": [0, 128], "cup": [0], "background": [255]},
    "index": {"disc": [1, 2], "cup": [2], "background": [0]},
}


def index_mask() -> torch.Tensor:
    """Return a mask (1, 12, 10): background 0, rim 1, cup 2."""
    mask = torch.zeros(1, 12, 10)
    mask[:, 2:10, 2:9], mask[:, 4:8, 4:7] = 1, 2
    return mask


def as_dofe(index: torch.Tensor) -> torch.Tensor:
    return torch.tensor([255.0, 128.0, 0.0])[index.long()]


def test_both_codings_give_the_same_overlapping_targets():
    index = index_mask()
    expected = torch.cat([index >= 1, index == 2]).float()
    assert torch.equal(DecodeMask(KNOWN["index"])(index), expected)
    assert torch.equal(DecodeMask("dofe", known=KNOWN)(as_dofe(index)), expected)


def test_names_choose_and_order_the_targets():
    both = DecodeMask("index", KNOWN)(index_mask())
    assert torch.equal(DecodeMask("index", KNOWN, names=["cup", "disc"])(index_mask()), both.flip(0))
    assert torch.equal(DecodeMask("index", KNOWN, names=["cup"])(index_mask()), both[1:])


def test_metadata_and_kind_of_array_are_kept():
    mask = MetaTensor(index_mask(), meta={"filename_or_obj": "a.png"})
    decoded = DecodeMaskd("label", "index", KNOWN)({"label": mask})["label"]
    assert decoded.meta["filename_or_obj"] == "a.png"
    assert isinstance(DecodeMask("index", KNOWN)(index_mask().numpy()), np.ndarray)


def test_the_message_of_unexpected_values_names_file_values_coding_and_fitting_coding():
    mask = MetaTensor(as_dofe(index_mask()), meta={"filename_or_obj": "site/masks/g0001.png"})
    with pytest.raises(InputError) as error:
        DecodeMaskd("label", "index", known=KNOWN)({"label": mask})
    for part in ("128, 255", "site/masks/g0001.png", "disc: [1, 2]", "coding 'dofe' would fit"):
        assert part in str(error.value)


def test_interpolated_masks_are_refused_in_a_short_line():
    mask = torch.linspace(0, 2, 120).reshape(1, 12, 10)
    with pytest.raises(
        InputError, match=r"0\.0168067.*\.\.\. in a picture without a file name.*correct the mask"
    ) as error:
        DecodeMask("index", KNOWN)(mask)
    assert len(str(error.value)) < 300


def test_an_empty_mask_is_not_read_as_all_cup():
    empty = torch.zeros(1, 8, 8)
    assert DecodeMask("index", KNOWN)(empty).sum() == 0
    with pytest.raises(InputError, match=r"no background .*coding 'index' would fit"):
        DecodeMask("dofe", KNOWN)(empty)
    assert DecodeMask("dofe", KNOWN, needs_background=False)(empty).sum() == 2 * 64


@pytest.mark.parametrize(
    "coding, reason",
    [
        ("other", "no coding is named"),
        ({"disc": [1]}, "background"),
        ({"disc": [0, 1], "background": [0]}, "both"),
        ({"disc": [], "background": [0]}, "no values"),
        ({"background": [0]}, "not in the mask coding"),
    ],
)
def test_unusable_codings_are_refused_when_made(coding, reason):
    with pytest.raises(InputError, match=reason):
        DecodeMask(coding, KNOWN)


def test_encoding_undoes_decoding():
    index = index_mask()
    targets = DecodeMask("index", KNOWN)(index)
    encoded = EncodeMaskd("pred")({"pred": targets})["pred"]
    assert encoded.dtype == torch.uint8
    assert torch.equal(encoded.float(), index)


def test_encoded_targets_are_nested_for_any_probabilities():
    """For three random targets, the value is the number of running intersections that contain the pixel."""
    probabilities = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))
    binary = probabilities >= 0.5
    expected = binary[0].long() + (binary[0] & binary[1]).long() + binary.all(dim=0).long()
    assert torch.equal(EncodeMask()(probabilities)[0].long(), expected)


def test_nesting_commutes_with_the_threshold_and_changes_nothing_nested():
    probabilities = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(1))
    nested = EnforceNestingd("pred")({"pred": probabilities})["pred"]
    assert (nested[1:] <= nested[:-1]).all()
    assert torch.equal(nested >= 0.5, EnforceNesting()(probabilities >= 0.5))
    assert torch.equal(EnforceNesting()(nested), nested)


def test_largest_component_and_holes_per_target():
    targets = torch.zeros(2, 20, 20)
    targets[0, 2:14, 2:14] = 1
    targets[0, 5, 5] = 0  # a hole in the disc
    targets[0, 17:19, 17:19] = 1  # and an island
    targets[1, 8:12, 8:12] = 1
    targets[1, 17, 17] = 1  # a cup on the island goes with it
    cleaned = EncodeMask(largest=True, fill=[True, False])(targets)[0]
    expected = torch.zeros(20, 20, dtype=torch.uint8)
    expected[2:14, 2:14], expected[8:12, 8:12] = 1, 2
    assert torch.equal(cleaned, expected)
    assert EncodeMask()(targets)[0, 5, 5] == 0
    assert EncodeMask()(targets)[0, 17, 17] == 2


def test_empty_prediction_encodes_to_background():
    assert EncodeMask(largest=True, fill=True)(torch.zeros(2, 6, 6)).sum() == 0
