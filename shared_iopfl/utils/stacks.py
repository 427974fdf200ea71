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
# a forward: enough to keep the hardware busy, and a bound on memory at any image size; on a CPU what large tensors it
# makes come fresh from the system, page by page, which costs more than a larger batch gains
FORWARD_PIXELS, CPU_PIXELS = 2**19, 2**17

SCAN_SLICES = (
    8  # of a volume that its statistics are measured and the routes adapted on; 16 gain nothing (docs/trials.md)
)
SCAN_PIXELS = 3 * 2**18  # of the slices that a scan is measured on, one forward: 12 of 256 x 256, five of 384 x 384


def to_stack(volume: Tensor, slices: int = 3) -> Tensor:
    """A volume (C, H, W, D) as its D slices (D, slices * C, H, W), each with its neighbours; edge slices replicated."""
    if slices < 1 or slices % 2 == 0:
        raise ValueError(f"slices must be odd and positive, but is {slices}.")
    depth = volume.shape[-1]
    reach = torch.arange(slices, device=volume.device) - slices // 2
    index = (torch.arange(depth, device=volume.device)[:, None] + reach).clamp(0, depth - 1)
    return _channels_last(
        volume[..., index].permute(3, 4, 0, 1, 2).flatten(1, 2)
    )  # (C, H, W, D, S) -> (D, S * C, H, W)


def from_stack(outputs: Tensor) -> Tensor:
    """What a network made of a stack (D, C, H, W), as a volume (C, H, W, D)."""
    return outputs.permute(1, 2, 3, 0)


def _channels_last(images: Tensor) -> Tensor:
    """Images in the memory format that 2D networks are fastest in: on a CPU 1.3 times as fast, 1.6 when turned."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def evenly(stack: Tensor, count: int) -> Tensor:
    """At most `count` of the stack's inputs, evenly spaced, none of them an end where there are others."""
    if len(stack) <= count:
        return stack
    index = torch.linspace(0, len(stack), count + 1, device=stack.device)[:-1] + len(stack) / count / 2
    return stack[index.long()]


def _name(inputs: Tensor, index: int) -> str:
    """What a scan of a batch is called, as far as its metadata tell."""
    files = getattr(inputs, "meta", {}).get("filename_or_obj", ())
    files = [files] if isinstance(files, str) else files
    return str(files[index]) if index < len(files) else "a scan"


def bounded(count: int, stack: Tensor, pixels: int | None = None) -> int:
    """`count`, or as many of the stack's inputs as have so many pixels (default: of a forward); at least one."""
    if pixels is None:
        pixels = CPU_PIXELS if stack.device.type == "cpu" else FORWARD_PIXELS
    return max(1, min(count, pixels // max(1, stack[0, 0].numel())))


def scan_slices(stack: Tensor, count: int = SCAN_SLICES) -> Tensor:
    """The slices that a scan is measured and adapted on: `count`, evenly spaced, or fewer where they are large."""
    return evenly(stack, bounded(count, stack, SCAN_PIXELS))


def _logits(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise InputError(
            f"the network gives a {type(output).__name__}, but must give one tensor of logits: wrap it in a module "
            "that returns the output to use."
        )
    return output.float()


class StackInferer(Inferer):
    """Plain inference with a 2D network over volumes, or over images as they are.

    Args:
        slices: neighbouring slices that make a network input, odd; None: the inputs go in as they are.
        batch_size: slices (or images) a forward, or fewer where they are large (of 384 x 384 three; on a CPU one).
    """

    def __init__(self, slices: int | None = 3, batch_size: int = 16) -> None:
        check_values({"batch_size": batch_size, **({} if slices is None else {"slices": slices})})
        super().__init__()
        self.slices = slices
        self.batch_size = batch_size

    def __call__(self, inputs: Tensor, network: Network, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (B, C, *spatial) of scans (B, C_in, *spatial).

        Raises:
            InputError: naming the scan, where they are not finite.
        """
        return self._join([self._forward(stack, network) for stack in self.stacks(inputs)], inputs)

    def stacks(self, inputs: Tensor) -> list[Tensor]:
        """Each scan of the batch as a stack of network inputs."""
        plain = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs  # no metadata inside the network
        return [_channels_last(scan[None]) if self.slices is None else to_stack(scan, self.slices) for scan in plain]

    def _join(self, outputs: list[Tensor], inputs: Tensor) -> Tensor:
        """What was made of each scan, as one batch; a mask of what is not finite would be empty, or any other."""
        for index, output in enumerate(outputs):
            if not torch.isfinite(output).all():
                raise InputError(
                    f"the network's output for {_name(inputs, index)} is not finite: its weights are damaged or its "
                    "training went astray; train or download the models again."
                )
        return torch.cat([output if self.slices is None else from_stack(output)[None] for output in outputs])

    def _forward(self, stack: Tensor, network: Network) -> Tensor:
        outputs = torch.cat([_logits(network(_channels_last(batch))) for batch in self._batches(stack, network)])
        # infinite is as wrong as NaN, but a mean of probabilities would hide it
        return outputs.masked_fill(~torch.isfinite(outputs), torch.nan)

    def _batches(self, stack: Tensor, network: Network) -> Iterable[Tensor]:
        return stack.split(bounded(self.batch_size, stack))
