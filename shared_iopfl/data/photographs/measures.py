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
"""Measures of two nested targets, such as the vertical cup-to-disc ratio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.handlers import IgniteMetricHandler
from monai.metrics import CumulativeIterationMetric
from monai.metrics.utils import do_metric_reduction
from monai.utils import MetricReduction

__all__ = [
    "VerticalRatio",
    "VerticalRatioMetric",
    "predicted_ratio",
    "ratio_error",
    "ratio_of_mask",
    "reference_ratio",
    "vertical_ratio",
]

QUANTITIES = ("predicted", "reference", "absolute_error")


def vertical_ratio(inner: torch.Tensor, outer: torch.Tensor, axis: int = -1) -> float:
    """The extent of one binary target along an axis, over that of the target around it.

    The extent is the number of rows from the first to the last that the target touches, as clinicians measure the
    vertical cup-to-disc ratio.

    Args:
        inner: the inner target, (W, H) or with further dimensions; above 0.5 is inside.
        outer: the outer target, of the same shape.
        axis: the axis to measure along. The default is the vertical one of photographs as MONAI's readers load them,
            (width, height); it is -2 for arrays of (height, width).

    Returns:
        The ratio, 0 or more (at most 1 when the targets are nested); 0 without inner target, NaN without outer one.
    """
    outer_extent = _extent(outer, axis)
    return _extent(inner, axis) / outer_extent if outer_extent else float("nan")


def predicted_ratio(pred: torch.Tensor, label: torch.Tensor) -> float:
    """`vertical_ratio` of a prediction (2, W, H), the outer target first; for `CaseRecorder`."""
    return vertical_ratio(pred[1], pred[0])


def reference_ratio(pred: torch.Tensor, label: torch.Tensor) -> float:
    """`vertical_ratio` of a reference (2, W, H), the outer target first; for `CaseRecorder`."""
    return vertical_ratio(label[1], label[0])


def ratio_error(pred: torch.Tensor, label: torch.Tensor) -> float:
    """The absolute difference of `predicted_ratio` and `reference_ratio`, NaN where one of them is."""
    return abs(predicted_ratio(pred, label) - reference_ratio(pred, label))


def ratio_of_mask(mask: torch.Tensor) -> float:
    """`vertical_ratio` of a coded mask: 0 background, 1 the outer target alone, 2 also the inner one."""
    return vertical_ratio(mask == 2, mask >= 1)


def _extent(target: torch.Tensor, axis: int) -> int:
    touched = torch.movedim(torch.as_tensor(target) > 0.5, axis, 0).flatten(1).any(dim=1).nonzero()
    return int(touched[-1] - touched[0]) + 1 if len(touched) else 0


class VerticalRatioMetric(CumulativeIterationMetric):
    """For each image, the ratio of extents in the prediction, in the reference, and their absolute difference.

    Called with (B, T, W, H) binary targets or lists of (T, W, H), it buffers (B, 3): `QUANTITIES` in this order; 0 to
    1, unitless, NaN where an outer target is empty. `aggregate` leaves NaN out of the mean, as MONAI's metrics do.

    Args:
        inner: the channel of the inner target (the cup).
        outer: the channel of the outer target (the disc).
        axis: the spatial axis to measure along; -1 is the vertical one of photographs loaded by MONAI.
        reduction: how `aggregate` reduces images and quantities: MONAI's names; ``"mean_batch"`` gives three means.
        quantity: one of `QUANTITIES` to buffer alone, (B, 1); all three if None.
    """

    def __init__(
        self,
        inner: int = 1,
        outer: int = 0,
        axis: int = -1,
        reduction: MetricReduction | str = MetricReduction.MEAN_BATCH,
        quantity: str | None = None,
    ) -> None:
        super().__init__()
        if quantity is not None and quantity not in QUANTITIES:
            raise ValueError(f"quantity must be one of {QUANTITIES}, got {quantity}")
        self.inner, self.outer, self.axis = inner, outer, axis
        self.reduction = reduction
        self.columns = list(range(3)) if quantity is None else [QUANTITIES.index(quantity)]

    def _compute_tensor(  # type: ignore[override]
        self, y_pred: torch.Tensor, y: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if y is None or y_pred.shape != y.shape:
            raise ValueError(f"prediction {tuple(y_pred.shape)} and reference {None if y is None else tuple(y.shape)}")
        predicted, reference = self._ratios(y_pred), self._ratios(y)
        return torch.stack([predicted, reference, (predicted - reference).abs()], dim=1)[:, self.columns]

    def _ratios(self, targets: torch.Tensor) -> torch.Tensor:
        ratios = [vertical_ratio(image[self.inner], image[self.outer], self.axis) for image in targets]
        return torch.tensor(ratios, device=targets.device)

    def aggregate(self, reduction: MetricReduction | str | None = None) -> torch.Tensor:
        """The buffered ratios reduced over images: for ``"mean_batch"`` one mean a quantity, NaN left out."""
        buffer = self.get_buffer()
        if not isinstance(buffer, torch.Tensor):
            raise ValueError("nothing to aggregate: call the metric first")
        reduced, counted = do_metric_reduction(buffer, reduction or self.reduction)
        # MONAI's mean of nothing is 0, which for an error would read as perfect
        return torch.where(counted > 0, reduced, float("nan")) if isinstance(counted, torch.Tensor) else reduced


class VerticalRatio(IgniteMetricHandler):
    """`VerticalRatioMetric` for an evaluator's ``key_val_metric`` or ``additional_metrics``.

    The metric is the mean absolute error; its details, which `MetricsSaver` writes as a CSV, hold one row an image.

    Args:
        inner: the channel of the inner target (the cup).
        outer: the channel of the outer target (the disc).
        axis: the spatial axis to measure along; -1 is the vertical one of photographs loaded by MONAI.
        quantity: what is recorded: ``"predicted"``, ``"reference"`` or ``"absolute_error"``.
        output_transform: from the engine's output to (prediction, reference), as for MONAI's metric handlers.
    """

    def __init__(
        self,
        inner: int = 1,
        outer: int = 0,
        axis: int = -1,
        quantity: str = "absolute_error",
        output_transform: Callable[[Any], Sequence[Any]] = lambda x: x,
    ) -> None:
        metric = VerticalRatioMetric(inner, outer, axis, reduction=MetricReduction.MEAN, quantity=quantity)
        super().__init__(metric_fn=metric, output_transform=output_transform)
