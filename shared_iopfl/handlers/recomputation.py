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
"""Activation checkpointing: the backward pass computes activations again, a part of the network at a time.

For a U-Net of 32 features the activations of 16 slices of 384 x 384 are most of what training holds. Fewer slices a
step would change the batch that batch norm normalises by, and so the gradient; computing them again changes nothing but
the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from shared_iopfl.routing.network import NORMS


def parts(network: nn.Module) -> list[nn.Module]:
    """The parts of a network whose activations are computed again: the children that hold a norm layer.

    A list of modules, and an only child, stand for their own children. Of a `BasicUNet` these are its nine levels. None
    holds another, where a network keeps a module in two places.
    """
    found = dict.fromkeys(_children_with_norms(network))
    return [part for part in found if not any(module in found for module in part.modules() if module is not part)]


def _children_with_norms(network: nn.Module) -> Iterator[nn.Module]:
    children = list(network.children())
    for child in children:
        if isinstance(child, nn.ModuleList) or (len(children) == 1 and any(child.children())):
            yield from _children_with_norms(child)
        elif any(isinstance(module, NORMS) for module in child.modules()):
            yield child


@contextmanager
def recomputed(network: nn.Module) -> Iterator[None]:
    """Within it, a forward in training keeps only the inputs of each of the network's :func:`parts`.

    The network is as before afterwards: same modules, same names of weights. Its backward pass may come later.
    """
    changed = parts(network)
    for part in changed:
        part.forward = _recomputing(part)  # type: ignore[method-assign]
    try:
        with _NoEmptyPadding():
            yield
    finally:
        for part in changed:
            del part.forward


def _recomputing(part: nn.Module) -> Any:
    plain = part.forward

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _buffers_kept(part)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return forward


@contextmanager
def _buffers_kept(part: nn.Module) -> Iterator[None]:
    """The second forward of a step works on copies of the buffers: only the first updates running statistics."""
    buffers = [
        (module, name, buffer) for module in part.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in buffers:
        setattr(module, name, buffer.clone())
    try:
        with _NoEmptyPadding():
            yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)


class _NoEmptyPadding(TorchFunctionMode):
    """Within it, padding by nothing returns its input instead of a copy.

    `BasicUNet` pads at every level of its decoder, though the sizes fit where they are multiples of 16. The copies,
    which autocast makes in float32, are kept to the end of the level.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch, or skip it."""
        if function is nn.functional.pad and len(args) > 1 and not any(args[1]):
            return args[0]
        return function(*args, **(kwargs or {}))
