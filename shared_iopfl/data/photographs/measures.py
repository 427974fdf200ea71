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

import torch


def vertical_ratio(inner: torch.Tensor, outer: torch.Tensor) -> float:
    """Return the ratio of the heights of two nested binary targets.

    The height is the number of rows from the first to the last row with pixels of the target, as clinicians measure the
    vertical cup-to-disc ratio.

    Args:
        inner: The inner target, (..., W, H) as MONAI's readers load pictures; values above 0.5 are inside.
        outer: The outer target, of the same shape.

    Returns:
        The ratio, at least 0 (and at most 1 if the targets are nested); 0 without inner target, NaN without outer one.
    """
    outer_height = _height(outer)
    return _height(inner) / outer_height if outer_height else float("nan")


def predicted_ratio(pred: torch.Tensor, label: torch.Tensor) -> float:
    """Return `vertical_ratio` of a prediction (2, W, H), the outer target first; for `CaseRecorder`."""
    return vertical_ratio(pred[1], pred[0])


def reference_ratio(pred: torch.Tensor, label: torch.Tensor) -> float:
    """Return `vertical_ratio` of a reference (2, W, H), the outer target first; for `CaseRecorder`."""
    return vertical_ratio(label[1], label[0])


def ratio_error(pred: torch.Tensor, label: torch.Tensor) -> float:
    """Return the absolute difference of `predicted_ratio` and `reference_ratio`; NaN if one of them is NaN."""
    return abs(predicted_ratio(pred, label) - reference_ratio(pred, label))


def ratio_of_mask(mask: torch.Tensor) -> float:
    """Return `vertical_ratio` of a coded mask: 0 background, 1 only the outer target, 2 also the inner one."""
    return vertical_ratio(mask == 2, mask >= 1)


def _height(target: torch.Tensor) -> int:
    touched = (torch.as_tensor(target) > 0.5).flatten(0, -2).any(dim=0).nonzero()
    return int(touched[-1] - touched[0]) + 1 if len(touched) else 0
