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
"""Activation checkpointing: the backward pass computes activations again, one part of the network at a time.

For a U-Net of 32 features, the activations of 16 slices of 384 x 384 take most of the memory of training. A smaller
batch would change the statistics of batch norm, and so the gradient; computing activations again only takes more time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from shared_iopfl.routing.network import NORMS


def parts(network: nn.Module) -> list[nn.Module]:
    """Return the parts of a network whose activations are computed again: the children that contain a norm layer.

    Lists of modules, and an only child, are replaced by their own children. For a `BasicUNet` the parts are its nine
    levels. If a network has a module in two places, no part contains another.

    Args:
        network: Network to divide.
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
    """Let a forward in training, within a ``with`` block, keep only the inputs of the network's :func:`parts`.

    Modules and names of weights do not change. The backward pass may follow after the block.

    Args:
        network: Network in training.
    """
    with _NoEmptyPadding(), _keeping_inputs(parts(network)):
        yield


@contextmanager
def _keeping_inputs(changed: Sequence[nn.Module]) -> Iterator[None]:
    for part in changed:
        part.forward = _recomputing(part)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for part in changed:
            del part.forward


def _recomputing(part: nn.Module) -> Any:
    plain = part.forward
    # If one child has all norm layers (the convolutions of a level of `BasicUNet`), the forward of the part is computed
    # again only up to the input of this child. The child is computed after that forward has ended, with its variables:
    # the upsampled image, which is twice as large as an activation of the finest level. No layer runs more often.
    inner = parts(part)
    inner = inner if len(inner) == 1 else []

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return _keeping_inputs(inner), _computed_again(part, inner)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    return forward


@contextmanager
def _computed_again(part: nn.Module, inner: Sequence[nn.Module]) -> Iterator[None]:
    """Let the second forward of a step use copies of the buffers, so that only the first updates running statistics."""
    buffers = [
        (module, name, buffer) for module in part.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in buffers:
        setattr(module, name, buffer.clone())
    try:
        with _NoEmptyPadding(), _keeping_inputs(inner):
            yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)


class _NoEmptyPadding(TorchFunctionMode):
    """A mode in which padding by zero pixels returns its input instead of a copy.

    `BasicUNet` pads at every level of its decoder, although sizes that are multiples of 16 need no padding. The copies,
    which autocast makes in float32, would be kept to the end of the level.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, or skip it."""
        if function is nn.functional.pad and len(args) > 1 and not any(args[1]):
            return args[0]
        return function(*args, **(kwargs or {}))
