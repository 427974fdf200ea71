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
"""Tiny networks and experts for the tests, of each MONAI architecture that routing supports."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from monai.networks.nets import BasicUNet, DynUNet, SegResNet, UNet
from torch import Tensor, nn

BATCH: tuple[str, dict] = ("batch", {})


def _dynunet(dims: int, norm: str | tuple[str, dict], deep: bool) -> DynUNet:
    levels: dict[str, Any] = {
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [4, 8, 8],
    }
    return DynUNet(dims, 3, 2, norm_name=norm, deep_supervision=deep, deep_supr_num=1, **levels)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BasicUNet 2D": (lambda: BasicUNet(2, 3, 2, features=(4,) * 6, norm=BATCH), (3, 3, 32, 32)),
    "BasicUNet 3D": (lambda: BasicUNet(3, 1, 2, features=(4,) * 6, norm=BATCH), (2, 1, 16, 16, 32)),
    "UNet": (lambda: UNet(2, 3, 2, (4, 8, 8), (2, 2), num_res_units=1, norm="batch", act="prelu"), (3, 3, 16, 16)),
    "SegResNet": (
        lambda: SegResNet(2, 8, 3, 2, norm=("group", {"num_groups": 4}), blocks_down=(1, 1), blocks_up=(1,)),
        (3, 3, 16, 16),
    ),
    "DynUNet": (lambda: _dynunet(2, ("instance", {"affine": True}), deep=False), (3, 3, 16, 16)),
    "DynUNet 3D": (lambda: _dynunet(3, "batch", deep=False), (2, 3, 8, 8, 8)),
    "DynUNet deep": (lambda: _dynunet(2, "batch", deep=True), (3, 3, 16, 16)),
}


def make(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network with random weights and batch-norm statistics, in evaluation mode; the global random state is kept."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build().eval()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
    return network


def unet(seed: int = 0, outputs: int = 2, channels: int = 3) -> nn.Module:
    """A fast U-Net of two levels with batch norm, for images (B, channels, even, even)."""
    return make(lambda: UNet(2, channels, outputs, (4, 8, 8), (2, 1), norm="batch", act="relu"), seed)


def experts(count: int = 2, first: int = 1, outputs: int = 2) -> dict[str, dict[str, Tensor]]:
    """Personalised models of sites "A", "B", ... for :func:`unet`."""
    return {chr(65 + n): dict(unet(first + n, outputs).state_dict()) for n in range(count)}


def images(*shape: int, seed: int = 0) -> Tensor:
    """Images of standard normal noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def volume(depth: int, seed: int = 0) -> Tensor:
    return images(1, 1, 32, 32, depth, seed=seed)


def routes_of(count: int, seed: int = 0, layers: int | None = None) -> Tensor:
    """Random routes (count,) or (layers, count) that sum to one."""
    shape = (count,) if layers is None else (layers, count)
    return torch.softmax(2 * images(*shape, seed=seed), dim=-1)


def mixture(states: Sequence[dict[str, Tensor]], routes: Sequence[float] | Tensor) -> dict[str, Tensor]:
    """The mean of states weighted by routes, key by key; integer buffers are those of the first state."""
    mixed = {}
    for key, like in states[0].items():
        if like.is_floating_point():
            terms = [float(weight) * state[key].double() for weight, state in zip(routes, states)]
            mixed[key] = torch.stack(terms).sum(0).float()
        else:
            mixed[key] = like
    return mixed


@contextmanager
def untouched(*networks: nn.Module) -> Iterator[None]:
    """Assert that the block changes neither the global random state nor weights, gradients and modes of networks."""

    def picture() -> tuple:
        state: Any = np.random.get_state()  # noqa: NPY002 (it is the global state that must not move)
        return torch.get_rng_state().tolist(), state[1].tolist(), state[2:], random.getstate()

    def flags(network: nn.Module) -> list:
        modes = [(name, module.training, len(module._forward_pre_hooks)) for name, module in network.named_modules()]
        return [*modes, *((name, p.requires_grad, id(p)) for name, p in network.named_parameters())]

    before = picture()
    kept = [({k: v.clone() for k, v in network.state_dict().items()}, flags(network)) for network in networks]
    yield
    assert picture() == before, "global random state moved"
    for network, (state, flag) in zip(networks, kept):
        assert flags(network) == flag
        assert all(parameter.grad is None for parameter in network.parameters())
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, state[key]), f"'{key}' changed"


def spread(name: str, count: int = 3) -> tuple[nn.Module, dict[str, Any], torch.Tensor]:
    """A network of the architecture, a number of experts, and images."""
    build, shape = ARCHITECTURES[name]
    return make(build, 0), {f"e{n}": make(build, 1 + n).state_dict() for n in range(count)}, images(*shape)
