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
"""Stacks of slices: every slice with its neighbours, there and back, and plain inference over them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from networks import images, unet, volume
from torch import Tensor

from shared_iopfl.utils.stacks import StackInferer, from_stack, to_stack


@given(st.integers(1, 6), st.integers(1, 2), st.sampled_from([1, 3, 5]))
@settings(max_examples=30, deadline=None)
def test_stack_holds_each_slice_with_its_neighbours_and_goes_back(depth, channels, slices):
    """Input d holds slices d-1, d, d+1, all channels each; beyond the edges the edge slice is repeated."""
    scan = images(channels, 4, 5, depth)
    stack = to_stack(scan, slices)
    assert stack.shape == (depth, slices * channels, 4, 5)
    for d in range(depth):
        for s in range(slices):
            neighbour = min(max(d + s - slices // 2, 0), depth - 1)
            assert torch.equal(stack[d, s * channels : (s + 1) * channels], scan[..., neighbour])
    middle = stack[:, slices // 2 * channels : (slices // 2 + 1) * channels]
    assert torch.equal(from_stack(middle), scan)


def test_stack_of_an_even_number_is_refused():
    with pytest.raises(ValueError, match="odd"):
        to_stack(volume(3)[0], 2)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_plain_inference_equals_the_loop_over_slices(depth):
    """Every slice gets the logits of its own stack, at its own place, whatever the batch size."""
    network, scans = unet(), torch.cat([volume(depth), volume(depth, seed=1)])
    logits = StackInferer(3, batch_size=2)(scans, network)
    assert logits.shape == (2, 2, 32, 32, depth)
    for scan, output in zip(scans, logits):
        for d, inputs in enumerate(to_stack(scan)):
            torch.testing.assert_close(output[..., d], network(inputs[None])[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_images_go_in_as_they_are_and_metadata_stays_outside():
    network, scans = unet(), images(3, 3, 32, 32)
    logits = StackInferer(None, batch_size=2)(MetaTensor(scans), network)
    assert type(logits) is Tensor
    torch.testing.assert_close(logits, SimpleInferer()(scans, network), rtol=1e-4, atol=1e-5)
