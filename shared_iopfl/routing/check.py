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
"""Whether a network can be routed: checks of each layer, and one of the whole network on a real input.

A routed network replaces each layer of a copy of the network. If a forward depends on the types of its layers, reads
their weights, or keeps a layer outside the module tree, its result is wrong without an error. Comparing one forward of
the routed network with the plain network of the mixed weights finds this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from shared_iopfl.models.weights import is_weight
from shared_iopfl.utils.errors import InputError

HALF = (torch.bfloat16, torch.float16)
# of the largest output; an accelerator rounds the products of a convolution to ten bits
TOLERANCE, ACCELERATOR_TOLERANCE = 1e-3, 5e-3
OLD_STYLE = {"SpectralNorm": "remove_spectral_norm", "WeightNorm": "remove_weight_norm"}


def check_layer(name: str, layer: nn.Module) -> None:
    """Raise `InputError`, naming the layer, unless the weights that it owns can be mixed."""

    def refuse(why: str) -> None:
        raise InputError(f"cannot route '{name}' ({type(layer).__name__}): {why}.")

    if any(True for _ in layer.children()):
        refuse("it owns weights and has children")
    if type(layer).forward is nn.Module.forward:
        refuse("it owns weights and has no forward; give them to the layer that uses them")
    if any(tensor.dtype in HALF for tensor in layer.state_dict().values()):
        refuse("its weights are half precision; call network.float(), and use autocast for speed")
    for hook in layer._forward_pre_hooks.values():
        if remedy := OLD_STYLE.get(type(hook).__name__):
            refuse(f"its weight is computed by a hook; call torch.nn.utils.{remedy} on it, in all models")


def uneven_routes(count: int) -> Tensor:
    """Routes (E,) in the ratio 1 : 2 : 3 and so on."""
    shares = torch.arange(1, count + 1, dtype=torch.float32)
    return shares / shares.sum()


def mixed_states(states: Sequence[Mapping[str, Tensor]], routes: Tensor) -> dict[str, Tensor]:
    """The states' mean with the weights `routes`, key by key; counters are left out."""
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
    """Raise unless the routed network, and the plain one it collapses to, compute what the mixed weights do.

    It costs four forwards of the sample: 0.3 s of one CPU core at 96 x 96 (`BasicUNet` of 16 features, four experts),
    half of a plain forward over the 20 slices of a volume. Neither the network nor the global random state is touched.

    Args:
        routed: with routes that stay as they are, and not yet blending statistics.
        network: the one that was routed.
        plain: a copy of it with the weights that these routes mix.
        collapsed: what the routed network collapses to.
        layers: names of the routed layers, in the order of the network.
        sample: network inputs (B, C, *spatial); only the first is used.

    Raises:
        InputError: naming the first layer that differs.
    """
    sample = sample[:1]
    with torch.autocast(sample.device.type, enabled=False):
        expected = _forward(plain, sample)
        try:
            with _Watch(network) as watch:
                found = _forward(routed, sample)
            if watch.seen:
                raise InputError(
                    f"cannot route '{watch.seen}': the network's forward uses its weights from outside the module tree "
                    "(a function that closes over the layer); reach it through self."
                )
            if _differ(expected, found):
                at = _first_difference(plain, routed, layers, sample)
                raise InputError(
                    f"cannot route this network: at {at} the routed network does not compute what the plain one with "
                    "the same weights does; its forward must not ask for a layer's type, attributes or weights."
                )
            if _differ(expected, _forward(collapsed, sample)):
                raise InputError("cannot route this network: the plain network it collapses to does not compute it.")
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            at = _first_difference(plain, routed, layers, sample)
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"cannot route this network: at {at} its forward fails with routed layers ({type(error).__name__}: "
                f"{reason}); it must not ask for a layer's type, attributes or weights."
            ) from error


class _Watch(TorchFunctionMode):
    """Notes whether anything computed in this thread uses a weight of the network itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        named = [*network.named_parameters(), *network.named_buffers()]
        self.names = {id(tensor): name for name, tensor in named}
        self.seen = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if not self.seen and id(value) in self.names:
                self.seen = self.names[id(value)].rpartition(".")[0]
        return func(*args, **(kwargs or {}))


def _forward(network: nn.Module, sample: Tensor) -> list[Tensor]:
    """All tensors of the output; a network that draws numbers draws the same ones each time."""
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
    """The first layer that one network runs and the other does not, or with another output."""
    calls: list[list[tuple[str, list[Tensor]]]] = []
    for network in (plain, routed):
        made: list[tuple[str, list[Tensor]]] = []
        calls.append(made)

        def note(name: str, made: list[tuple[str, list[Tensor]]] = made) -> Any:
            return lambda layer, inputs, output: made.append((name, [t.clone() for t in _tensors(output)]))

        hooks = [network.get_submodule(name).register_forward_hook(note(name)) for name in layers]
        with suppress(Exception):  # what it fails at is what is looked for
            _forward(network, sample)
        for hook in hooks:
            hook.remove()
    for index, (name, output) in enumerate(calls[0]):
        if len(calls[1]) <= index or calls[1][index][0] != name or _differ(output, calls[1][index][1]):
            return f"'{name}'"
    return f"what follows '{calls[0][-1][0]}'" if calls[0] else "its first layer"
