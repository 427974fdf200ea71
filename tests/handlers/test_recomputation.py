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
"""Activation checkpointing: a step gives exactly the same result, with less memory for activations."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from monai.networks.nets import BasicUNet, DynUNet, UNet
from networks import images, unet
from torch import nn
from trained_sites import Site, equal

from shared_iopfl.handlers.methods import DittoHandler
from shared_iopfl.handlers.norm_statistics import NormStatisticsHandler
from shared_iopfl.handlers.precision import AutocastInferer
from shared_iopfl.handlers.recomputation import parts

NETWORKS = {
    "BasicUNet": lambda: BasicUNet(2, 3, 2, (4, 4, 8, 8, 8, 4), norm="batch", dropout=0.2),
    "UNet": lambda: UNet(2, 3, 2, (4, 8, 8), (2, 2), num_res_units=1, norm="batch", dropout=0.2),
    "DynUNet": lambda: DynUNet(2, 3, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8], norm_name="batch"),
    "plain": lambda: nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, momentum=None)),
}


def step(network: nn.Module, recompute: bool, half: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Gradients, and the state after one step's forward and backward."""
    network.train()
    with torch.random.fork_rng():
        torch.manual_seed(1)  # of dropout
        output = AutocastInferer(half, recompute)(images(2, 3, 32, 32, seed=3), network)
        (output**2).mean().backward()
        after = torch.rand(1)
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return gradients, {**network.state_dict(), "random state": after}


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradient_and_running_statistics_are_those_of_the_plain_step(name: str, half: bool) -> None:
    """Statistics and counters are updated once although the forward runs twice, and dropout is the same in both."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = NETWORKS[name]()
    again = NETWORKS[name]()
    again.load_state_dict(network.state_dict())
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    (plain, state), (gradients, same) = step(network, False, half), step(again, True, half)
    assert equal(plain, gradients)
    assert equal(state, same), "names of the weights included"
    assert any(not torch.equal(state[key], before[key]) for key in before if key.endswith("num_batches_tracked"))


@pytest.mark.parametrize("statistics", ["batch", "global", "blend"])
def test_rounds_with_all_handlers_are_the_same(statistics: str) -> None:
    """The hooks of batch norms run in both forwards, and the model of Ditto uses the same inferer."""
    results = []
    for recompute in (False, True):
        site = Site()
        ditto = DittoHandler(site.network, site.optimizer, 0.1)
        for handler in (NormStatisticsHandler(site.network, statistics), ditto):  # type: ignore[arg-type]
            handler.attach(site.trainer)
        site.trainer.inferer = AutocastInferer(False, recompute)
        site.round(unet(5).state_dict())
        results.append({**site.round(), **{f"ditto {key}": w for key, w in ditto.personal_state().items()}})
        assert not any("forward" in vars(module) for module in site.network.modules()), "as it was"
    assert equal(*results)


def test_few_activations_are_kept_between_forward_and_backward() -> None:
    network, kept = NETWORKS["BasicUNet"](), []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[-1][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = images(2, 3, 64, 64, seed=3)
    outputs = []
    for recompute in (False, True):
        kept.append({parameter.untyped_storage().data_ptr(): 0 for parameter in network.parameters()})
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs.append(AutocastInferer(False, recompute)(inputs, network))
    assert len(parts(network)) == 9
    plain, recomputed = (sum(bytes_of.values()) for bytes_of in kept)
    assert recomputed < 0.25 * plain


def test_no_layer_runs_more_than_twice_and_the_upsampled_image_is_freed_before_the_convolutions_run_again() -> None:
    network, calls = NETWORKS["BasicUNet"]().train(), Counter[str]()
    alive: list[bool] = []
    upsampled: list[Any] = []
    level = network.upcat_1
    level.upsample.register_forward_hook(lambda module, inputs, output: upsampled.append(weakref.ref(output)))
    level.convs.conv_0.register_forward_hook(lambda *args: alive.append(upsampled[-1]() is not None))
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda *args, name=name: calls.update([name]))
    output = AutocastInferer(False, True)(images(2, 3, 32, 32, seed=3), network)
    output.mean().backward()
    assert alive == [True, False]
    assert {count for name, count in calls.items() if name != "final_conv"} == {2}


@pytest.mark.parametrize("side, padded", [(32, False), (40, True)])
def test_padding_by_zero_pixels_is_skipped(side: int, padded: bool) -> None:
    """`BasicUNet` pads at every level, although only sizes that are not multiples of 16 need it."""
    network = NETWORKS["BasicUNet"]().train()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        AutocastInferer(False, True)(images(2, 3, side, side, seed=3), network).mean().backward()
    assert any(event.name == "aten::replication_pad2d" for event in profile.events() or ()) == padded


def test_an_error_in_the_forward_does_not_change_the_network() -> None:
    network = NETWORKS["BasicUNet"]()
    with pytest.raises(RuntimeError, match="channels"):
        AutocastInferer(False, True)(images(2, 5, 32, 32, seed=3), network)
    assert not any("forward" in vars(module) for module in network.modules())
