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
"""Volumes as stacks of slices and back, and plain inference over the slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor

from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.errors import InputError

Network = Callable[[Tensor], Tensor]
# pixels in a forward pass: enough to use the hardware fully, with a limit on memory at any image size. On a CPU, large
# tensors are allocated by the system page by page, which costs more than a larger batch gains.
FORWARD_PIXELS, CPU_PIXELS = 2**19, 2**17
# slices of a volume on which its statistics are measured and the routes adapted; 16 gain nothing (docs/trials.md)
SCAN_SLICES = 8
SCAN_PIXELS = 3 * 2**18  # limit on the pixels of these slices: 12 slices of 256 x 256, five of 384 x 384


def to_stack(volume: Tensor, slices: int = 3) -> Tensor:
    """Return the D slices of a volume as network inputs, each with its neighbours; edge slices are replicated.

    Args:
        volume: The volume, of shape (C, H, W, D).
        slices: Number of neighbouring slices in an input, odd.

    Returns:
        The inputs, of shape (D, slices * C, H, W).
    """
    if slices < 1 or slices % 2 == 0:
        raise ValueError(f"slices must be odd and positive, but is {slices}.")
    depth = volume.shape[-1]
    reach = torch.arange(slices, device=volume.device) - slices // 2
    index = (torch.arange(depth, device=volume.device)[:, None] + reach).clamp(0, depth - 1)
    stack = volume[..., index].permute(3, 4, 0, 1, 2).flatten(1, 2)  # (C, H, W, D, S) -> (D, S * C, H, W)
    return _channels_last(stack)


def from_stack(outputs: Tensor) -> Tensor:
    """Return the output of a network for a stack, of shape (D, C, H, W), as a volume of shape (C, H, W, D)."""
    return outputs.permute(1, 2, 3, 0)


def _channels_last(images: Tensor) -> Tensor:
    """Images in the memory format in which 2D networks are fastest: on a CPU 1.3 times as fast, 1.6 if turned."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def evenly(stack: Tensor, count: int) -> Tensor:
    """Return at most `count` evenly spaced inputs of a stack, without its ends unless all inputs are returned."""
    if len(stack) <= count:
        return stack
    index = torch.linspace(0, len(stack), count + 1, device=stack.device)[:-1] + len(stack) / count / 2
    return stack[index.long()]


def _name(inputs: Tensor, index: int) -> str:
    """The file name of a scan in a batch if the metadata contain it."""
    files = getattr(inputs, "meta", {}).get("filename_or_obj", ())
    files = [files] if isinstance(files, str) else files
    return str(files[index]) if index < len(files) else "a scan"


def bounded(count: int, stack: Tensor, pixels: int | None = None) -> int:
    """Limit a number of inputs by their pixels.

    Args:
        count: Largest number of inputs.
        stack: The network inputs, of shape (N, C, *spatial).
        pixels: Largest number of pixels in all inputs together; None: that of a forward pass.

    Returns:
        Number of inputs, at least 1.
    """
    if pixels is None:
        pixels = CPU_PIXELS if stack.device.type == "cpu" else FORWARD_PIXELS
    return max(1, min(count, pixels // max(1, stack[0, 0].numel())))


def scan_slices(stack: Tensor, count: int = SCAN_SLICES) -> Tensor:
    """Return the slices on which a scan is measured and adapted: `count` evenly spaced ones, or fewer if large."""
    return evenly(stack, bounded(count, stack, SCAN_PIXELS))


def _logits(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise InputError(
            f"the network returns a {type(output).__name__}, but must return one tensor of logits: wrap it in a module "
            "that returns the output to use."
        )
    return output.float()


class StackInferer(Inferer):
    """Plain inference with a 2D network on the slices of volumes, or on 2D images.

    Args:
        slices: Number of neighbouring slices in a network input, odd; None for 2D images, which are not changed.
        batch_size: Number of slices or images in a forward pass, or fewer if they are large (three of 384 x 384, or one
            on a CPU).
    """

    def __init__(self, slices: int | None = 3, batch_size: int = 16) -> None:
        check_values({"batch_size": batch_size, **({} if slices is None else {"slices": slices})})
        super().__init__()
        self.slices = slices
        self.batch_size = batch_size

    def __call__(self, inputs: Tensor, network: Network, *args: Any, **kwargs: Any) -> Tensor:
        """Return the logits, of shape (B, C, *spatial), of scans of shape (B, C_in, *spatial).

        Raises:
            InputError: If the logits are not finite; the message names the scan.
        """
        return self._join([self._forward(stack, network) for stack in self.stacks(inputs)], inputs)

    def stacks(self, inputs: Tensor) -> list[Tensor]:
        """Return each scan of a batch as a stack of network inputs, of shape (N, C, *spatial)."""
        plain = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs  # the network needs no metadata
        return [_channels_last(scan[None]) if self.slices is None else to_stack(scan, self.slices) for scan in plain]

    def _join(self, outputs: list[Tensor], inputs: Tensor) -> Tensor:
        """Join the outputs of the scans to a batch; they must be finite, because a mask of others means nothing."""
        for index, output in enumerate(outputs):
            if not torch.isfinite(output).all():
                raise InputError(
                    f"the network's output for {_name(inputs, index)} is not finite: its weights are damaged or its "
                    "training went astray; train or download the models again."
                )
        return torch.cat([output if self.slices is None else from_stack(output)[None] for output in outputs])

    def _forward(self, stack: Tensor, network: Network) -> Tensor:
        outputs = torch.cat([_logits(network(_channels_last(batch))) for batch in self._batches(stack, network)])
        # infinite values are as wrong as NaN, but a mean of probabilities would hide them
        return outputs.masked_fill(~torch.isfinite(outputs), torch.nan)

    def _batches(self, stack: Tensor, network: Network) -> Iterable[Tensor]:
        return stack.split(bounded(self.batch_size, stack))
