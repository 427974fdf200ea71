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
"""A second look at scans whose target is small: they are cropped around the first mask, and segmented again.

A network segments best what has the size that it was trained at. In a scan with a wide field of view the target is
smaller, and so is the number of the network's pixels that show it. The usual size is that of the inside sites' masks,
published in the calibration of the models. Without it, there is no second look.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, cast

import torch
from ignite.engine import Engine
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.engines import IterationEvents, SupervisedEvaluator
from monai.transforms import Crop, Cropd, KeepLargestConnectedComponent
from monai.utils import CommonKeys
from torch import Tensor

from shared_iopfl.data.masks import KeepMiddleComponent
from shared_iopfl.data.scan_names import case_name
from shared_iopfl.routing.objectives import Output, target_masks
from shared_iopfl.utils.errors import InputError

logger = logging.getLogger(__name__)

PART = "part"  # key of a case, its value is a `Part`
MARGIN = 1.25  # smallest ratio of the sides of a part and of the box around the mask


class Part(NamedTuple):
    """A part of a scan: along the first two axes, where it begins and ends, as fractions of the scan.

    Attributes:
        start, end: Two fractions each, in [0, 1].
    """

    start: tuple[float, float]
    end: tuple[float, float]


def target_size(mask: Tensor) -> float:
    """Return the size of the target: the root of the fraction of the pixels that it has, in the slice with most of it.

    Args:
        mask: Mask (X, Y) or (X, Y, slices), foreground above 0.
    """
    areas = (mask > 0).float().mean((0, 1))
    return float(areas.max().sqrt())


def part_around(mask: Tensor, scale: float) -> Part | None:
    """Return the part of a scan around its mask; None if it is the whole scan.

    The part is moved into the scan where it would extend beyond it.

    Args:
        mask: Mask (X, Y) or (X, Y, slices) that is not empty, foreground above 0.
        scale: Ratio of the sides of the part and the scan. The part is larger if the mask needs it.
    """
    ends = []
    for axis in (0, 1):
        length = mask.shape[axis]
        along = (mask > 0).movedim(axis, 0).flatten(1).any(1).nonzero()
        first, last = float(along.min()) / length, float(along.max() + 1) / length
        side = min(1.0, max(scale, MARGIN * (last - first)))
        start = min(max((first + last - side) / 2, 0.0), 1.0 - side)
        ends.append((start, start + side))
    part = Part(*zip(*ends))
    return None if part == Part((0.0, 0.0), (1.0, 1.0)) else part


class CropToPartd(Cropd):
    """Crop scans to the `Part` that a case has under `PART`, or keep them whole; `Invertd` pads masks with zeros.

    A scan that was cropped gets a remark in its metadata (``remarks``), which the review list shows.

    Args:
        keys: Keys of the scans (C, X, Y) or (C, X, Y, slices).
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys, Crop())

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        d = dict(data)
        part = d.pop(PART, None) or Part((0.0, 0.0), (1.0, 1.0))
        for key in self.key_iterator(d):
            spans = zip(part.start, part.end, d[key].shape[1:])
            places = tuple(slice(round(start * length), round(end * length)) for start, end, length in spans)
            whole = tuple(d[key].shape[1:])
            # also if nothing is cut off, so that every scan has the same trace to invert
            d[key] = self.cropper(d[key], places + (slice(None),) * (d[key].ndim - 3))
            if isinstance(d[key], MetaTensor) and tuple(d[key].shape[1:]) != whole:
                field = max(end - start for start, end in zip(*part))
                earlier = d[key].meta.get("remarks")
                remark = f"small target: segmented in {field:.0%} of the field of view"
                d[key].meta["remarks"] = f"{earlier}; {remark}" if earlier else remark
        return d


class SecondLook:
    """A handler of an evaluator that segments a scan again if its target is small in the first mask.

    The scan is loaded again and cropped around the first mask, so that the target has its usual size. Attach it before
    the handlers that record or write the mask. If the second mask is empty, the first one is kept.

    The evaluator's dataset applies a `CropToPartd`, and its loader has a batch size of 1 and does not shuffle.

    Args:
        target_size: Usual size of the target; see :func:`target_size`. 0: it is unknown, and there is no second look.
        threshold: Fraction of the usual size below which a target is small. 0: never.
        output: Kind of the network's output.
    """

    def __init__(self, target_size: float, threshold: float, output: Output) -> None:
        self.target_size = target_size
        self.threshold = threshold
        self.output: Output = output

    def attach(self, engine: Engine) -> None:
        """Register the handler with an evaluator."""
        if self.target_size > 0 and self.threshold > 0:
            engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        evaluator = cast(SupervisedEvaluator, engine)
        state: Any = evaluator.state
        part = self.part(state.output[CommonKeys.PRED])
        if part is None:
            return
        loader: Any = state.dataloader
        index = (state.iteration - 1) % len(loader)
        case = loader.dataset.data[index]
        batch = loader.collate_fn([loader.dataset.transform({**case, PART: part})])
        images, labels = evaluator.prepare_batch(batch, state.device, evaluator.non_blocking, **evaluator.to_kwargs)
        with evaluator.mode(evaluator.network), torch.autocast("cuda", enabled=evaluator.amp, **evaluator.amp_kwargs):
            logits = evaluator.inferer(images, evaluator.network)
        reports = getattr(evaluator.inferer, "reports", None)
        found = bool(self._mask(logits).any())
        if reports:
            del reports[-2 if found else -1]  # of the mask that is not used
        if found:
            logger.info("%s: segmented again around its first mask", case.get("case", case_name(str(case["image"]))))
            state.batch = batch
            state.output = {CommonKeys.IMAGE: images, CommonKeys.LABEL: labels, CommonKeys.PRED: logits}

    def part(self, logits: Tensor) -> Part | None:
        """Return the part of the scan to look at again; None for a target of about the usual size, or an empty mask.

        Args:
            logits: Logits (1, C, X, Y) or (1, C, X, Y, slices) of the scan.
        """
        if len(logits) != 1:
            raise InputError(f"a second look needs a batch size of 1, got {len(logits)}: set second_look to 0.")
        mask = self._mask(logits)
        if not mask.any():
            return None
        component = KeepMiddleComponent() if mask.ndim == 4 else KeepLargestConnectedComponent()
        kept = torch.as_tensor(component(mask))[0]
        scale = target_size(kept) / self.target_size
        return part_around(kept, scale) if scale < self.threshold else None

    def _mask(self, logits: Tensor) -> Tensor:
        """The foreground (1, X, Y) or (1, X, Y, slices), on the CPU."""
        plain = logits.as_tensor() if isinstance(logits, MetaTensor) else logits
        return target_masks(plain, self.output).any(1).to("cpu", torch.uint8)
