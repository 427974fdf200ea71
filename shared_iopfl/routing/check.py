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
"""Checks that a network can be routed: one of each layer, and one of the whole network on a real input.

Routing replaces each layer in a copy of the network. If a forward depends on the types of its layers, reads their
weights, or keeps a layer outside the module tree, its result is wrong and no error is raised. The check therefore
compares one forward of the routed network with one of a plain network that has the mixed weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from shared_iopfl.models.weights import is_weight
from shared_iopfl.utils.errors import InputError

HALF = (torch.bfloat16, torch.float16)
# largest difference, as a fraction of the largest output; an accelerator rounds a convolution's products to ten bits
TOLERANCE, ACCELERATOR_TOLERANCE = 1e-3, 5e-3
# hooks that compute a weight, and the function of torch.nn.utils that removes each
WEIGHT_HOOKS = {"SpectralNorm": "remove_spectral_norm", "WeightNorm": "remove_weight_norm"}


def check_layer(name: str, layer: nn.Module) -> None:
    """Check that the weights of a layer can be mixed.

    Args:
        name: Name of the layer in its network.
        layer: Module that owns weights.

    Raises:
        InputError: If they cannot; the message names the layer.
    """

    def refuse(why: str) -> None:
        raise InputError(f"cannot route '{name}' ({type(layer).__name__}): {why}.")

    if any(True for _ in layer.children()):
        refuse("it owns weights and has children; move the weights into a child module")
    if type(layer).forward is nn.Module.forward:
        refuse("it owns weights and has no forward; move them into the layer that uses them")
    if any(tensor.dtype in HALF for tensor in layer.state_dict().values()):
        refuse("its weights are in half precision; call network.float(), and use autocast for speed")
    for hook in layer._forward_pre_hooks.values():
        if remedy := WEIGHT_HOOKS.get(type(hook).__name__):
            refuse(f"a hook computes its weight; call torch.nn.utils.{remedy} on it, in all models")


def uneven_routes(count: int) -> Tensor:
    """Return routes (E,) of `count` experts in the ratio 1 : 2 : 3 and so on."""
    shares = torch.arange(1, count + 1, dtype=torch.float32)
    return shares / shares.sum()


def mixed_states(states: Sequence[Mapping[str, Tensor]], routes: Tensor) -> dict[str, Tensor]:
    """Mix states by routes (E,), key by key; integer counters are left out."""
    return {
        key: torch.as_tensor(sum(share * state[key].to(like) for share, state in zip(routes.tolist(), states)))
        for key, like in states[0].items()
        if is_weight(like)
    }


@torch.no_grad()
def check_routed(
    routed: nn.Module,
    network: nn.Module,
    plain: nn.Module,
    collapsed: nn.Module,
    layers: Sequence[str],
    sample: Tensor,
) -> None:
    """Check that the routed network and its collapsed form compute the same as a plain network with the mixed weights.

    This takes four forwards of the sample: 0.3 s of one CPU core at 96 x 96 (`BasicUNet` of 16 features, four experts),
    half of a plain forward over the 20 slices of a volume. Neither the network nor the global random state is changed.

    Args:
        routed: Routed network, with fixed routes and without blended statistics.
        network: Network that was routed.
        plain: Copy of that network with the weights that these routes mix.
        collapsed: Plain network that the routed one collapses to.
        layers: Names of the routed layers, in the order of the network.
        sample: Network inputs (B, C, *spatial), of which only the first is used.

    Raises:
        InputError: If the outputs differ; the message names the first layer that does.
    """
    sample = sample[:1]
    wrong, cause = "", None
    with torch.autocast(sample.device.type, enabled=False):
        expected = _forward(plain, sample)
        try:
            with _Watch(network) as watch:
                found = _forward(routed, sample)
            if watch.seen:
                raise InputError(
                    f"cannot route '{watch.seen}': the network's forward uses its weights from outside the module tree "
                    "(for example, in a function that closes over the layer); access the layer through self."
                )
            if _differ(expected, found):
                wrong = "the output of the routed network differs from that of a plain one with the same weights"
            elif _differ(expected, _forward(collapsed, sample)):
                wrong = "the output of the plain network that it collapses to is different"
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            wrong, cause = f"its forward fails with routed layers ({type(error).__name__}: {reason})", error
        if wrong:
            at = _first_difference(plain, routed, layers, sample)
            raise InputError(
                f"cannot route this network: at {at} {wrong}; its forward must not depend on a layer's type, "
                "attributes or weights."
            ) from cause


class _Watch(TorchFunctionMode):
    """Records in `seen` the first layer of a network whose weights any function of torch uses in this thread."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in (*network.named_parameters(), *network.named_buffers())}
        self.seen = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if not self.seen and id(value) in self.names:
                self.seen = self.names[id(value)].rpartition(".")[0]
        return func(*args, **(kwargs or {}))


def _forward(network: nn.Module, sample: Tensor) -> list[Tensor]:
    """Return all tensors of the output; a network that draws random numbers draws the same ones in each call."""
    devices = [sample.device] if sample.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        return _tensors(network(sample.clone()))


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _differ(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return True
    for one, other in zip(expected, found):
        size = TOLERANCE if one.device.type == "cpu" else ACCELERATOR_TOLERANCE
        wide = torch.complex128 if one.is_complex() else torch.float64
        one, other = one.cpu().to(wide), other.cpu().to(wide)
        if one.numel() and bool((one - other).abs().max() > size * one.abs().max()):
            return True
    return False


def _first_difference(plain: nn.Module, routed: nn.Module, layers: Sequence[str], sample: Tensor) -> str:
    """Name the first layer that only one of the networks runs, or whose outputs differ."""
    expected, found = (_calls(network, layers, sample) for network in (plain, routed))
    for (name, output), (other, seen) in zip(expected, chain(found, repeat(("", [])))):
        if name != other or _differ(output, seen):
            return f"'{name}'"
    return f"the part after '{expected[-1][0]}'" if expected else "its first layer"


def _calls(network: nn.Module, layers: Sequence[str], sample: Tensor) -> list[tuple[str, list[Tensor]]]:
    """The layers that a forward runs, in order, each with its output; the forward may fail."""
    calls: list[tuple[str, list[Tensor]]] = []

    def record(name: str) -> Any:
        return lambda layer, inputs, output: calls.append((name, [tensor.clone() for tensor in _tensors(output)]))

    hooks = [network.get_submodule(name).register_forward_hook(record(name)) for name in layers]
    with suppress(Exception):
        _forward(network, sample)
    for hook in hooks:
        hook.remove()
    return calls
