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
"""Conversion between coded masks, which have one value per region, and overlapping target channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.transforms import FillHoles, KeepLargestConnectedComponent, Transform
from monai.utils import convert_to_dst_type, convert_to_tensor, ensure_tuple_rep

from shared_iopfl.data.masks import EachKey
from shared_iopfl.data.photographs.reader import file_of
from shared_iopfl.utils.errors import InputError

BACKGROUND = "background"  # the only name in a coding that is not a target
Coding = Mapping[str, Sequence[int]]


def coding_of(site: str, coding: Coding | str | Mapping[str, Coding | str]) -> Coding | str:
    """Return the coding of one site's masks, for `DecodeMaskd`.

    Args:
        site: Name of the site.
        coding: A coding, or its name, for all sites; or a dictionary of these by site. Sites that are not in the
            dictionary have the coding "index".
    """
    if isinstance(coding, str) or BACKGROUND in coding:
        return coding  # type: ignore[return-value]
    return coding.get(site, "index")  # type: ignore[return-value]


class DecodeMask(Transform):
    """Convert a coded mask (1, ...) to binary targets (T, ...), float32 with values 0 and 1, which may overlap.

    A coding lists, for each target, all values in the file whose pixels belong to it, and the values of the
    background::

        {"disc": [0, 128], "cup": [0], "background": [255]}
        {"disc": [1, 2], "cup": [2], "background": [0]}

    A value that is not in the coding is rejected; so is a mask without any background, as an empty mask looks like this
    if the coding assigns its only value to a target.

    Args:
        coding: The coding, or the name of one of `known`.
        known: Codings by name. If a mask does not fit `coding`, the message names those that it would fit.
        names: Requested targets in the order of the channels; None requests all targets of the coding.
        needs_background: Whether a mask without background is rejected.

    Raises:
        InputError: If the coding is invalid, or (on call) if a mask does not fit it.
    """

    def __init__(
        self,
        coding: Coding | str,
        known: Mapping[str, Coding] | None = None,
        names: Sequence[str] | None = None,
        needs_background: bool = True,
    ) -> None:
        self.known = dict(known or {})
        if isinstance(coding, str):
            if coding not in self.known:
                raise InputError(f'no coding is named "{coding}": choose from {sorted(self.known)}')
            coding = self.known[coding]
        _check(coding)
        self.coding = {name: tuple(values) for name, values in coding.items()}
        self.names = tuple(names) if names is not None else tuple(name for name in self.coding if name != BACKGROUND)
        unknown = [name for name in self.names if name not in self.coding or name == BACKGROUND]
        if unknown or not self.names:
            raise InputError(f"targets {unknown} are not in the mask coding {_text(coding)}: add them")
        self.needs_background = needs_background

    def __call__(self, mask: NdarrayOrTensor) -> NdarrayOrTensor:
        values: torch.Tensor = convert_to_tensor(mask, dtype=torch.float32, track_meta=False)
        if values.shape[0] != 1:
            raise InputError(f"a coded mask has one channel, got {values.shape[0]} in {file_of(mask)}")
        self._refuse_misfit({float(value) for value in torch.unique(values)}, file_of(mask))
        targets = [torch.isin(values, values.new_tensor(self.coding[name])) for name in self.names]
        return convert_to_dst_type(torch.cat(targets), mask, dtype=torch.float32)[0]

    def _refuse_misfit(self, found: set[float], file: str) -> None:
        unexpected = sorted(found.difference(*self.coding.values()))
        if unexpected:
            # a mask that was resampled has hundreds of intermediate values
            shown = ", ".join(f"{value:g}" for value in unexpected[:5]) + (", ..." if len(unexpected) > 5 else "")
            raise InputError(
                f"mask values {shown} in {file} are not in its coding {_text(self.coding)}: {self._suggestion(found)}"
            )
        if self.needs_background and found.isdisjoint(self.coding[BACKGROUND]):
            raise InputError(
                f"no background in mask {file} under its coding {_text(self.coding)}: {self._suggestion(found)}"
            )

    def _suggestion(self, found: set[float]) -> str:
        fitting = [name for name, coding in self.known.items() if _fits(coding, found)]
        return f"coding {' or '.join(map(repr, fitting))} would fit" if fitting else "correct the mask or the coding"


class DecodeMaskd(EachKey):
    """Dictionary-based `DecodeMask` with the same further arguments."""

    array_transform = DecodeMask


class EnforceNesting(Transform):
    """Restrict each target to the one before it: its value is at most that of all targets before it.

    For probabilities (T, ...) the result is the cumulative minimum along the channels, for binary targets the
    intersection. Thresholding before or after it gives the same masks.
    """

    def __call__(self, targets: NdarrayOrTensor) -> NdarrayOrTensor:
        t: torch.Tensor = convert_to_tensor(targets, track_meta=False)
        return convert_to_dst_type(torch.cummin(t, dim=0).values, targets)[0]


class EnforceNestingd(EachKey):
    """Dictionary-based `EnforceNesting`."""

    array_transform = EnforceNesting


class EncodeMask(Transform):
    """Convert nested targets (T, ...), probabilities or binary, the outermost first, to one coded mask (1, ...).

    The value of a pixel, uint8, is the number of nested targets that contain it: 0 for the background, 1 for the
    outermost target only (the rim of the disc), T for the innermost one (the cup). A target contains the pixels whose
    probability is at least 0.5.

    Args:
        largest: Whether only the largest connected component of each target is kept; one flag, or one per target.
        fill: Whether holes in each target are filled; one flag, or one per target.
    """

    def __init__(self, largest: bool | Sequence[bool] = False, fill: bool | Sequence[bool] = False) -> None:
        self.largest, self.fill = largest, fill
        self._keep_largest = KeepLargestConnectedComponent(is_onehot=False)
        self._fill_holes = FillHoles()

    def __call__(self, targets: NdarrayOrTensor) -> NdarrayOrTensor:
        t: torch.Tensor = convert_to_tensor(targets, track_meta=False)
        largest, fill = ensure_tuple_rep(self.largest, len(t)), ensure_tuple_rep(self.fill, len(t))
        coded = torch.zeros_like(t[:1], dtype=torch.int64)
        outer = torch.ones_like(t[:1], dtype=torch.bool)
        for step, target in enumerate(t):
            inner = outer & (target[None] >= 0.5)
            if largest[step] and inner.any():
                inner = convert_to_tensor(self._keep_largest(inner.to(torch.uint8)), track_meta=False) > 0
            if fill[step]:
                # a hole of the inner target may lie in a hole of the outer one that is not filled: nest it again
                inner = outer & (convert_to_tensor(self._fill_holes(inner.to(torch.uint8)), track_meta=False) > 0)
            coded[inner] = step + 1
            outer = inner
        return convert_to_dst_type(coded, targets, dtype=np.uint8)[0]


class EncodeMaskd(EachKey):
    """Dictionary-based `EncodeMask` with the same further arguments."""

    array_transform = EncodeMask


def _check(coding: Coding) -> None:
    """Raise `InputError` for a coding that has no background, or that assigns a background value to a target."""
    if not coding.get(BACKGROUND):
        raise InputError(f'mask coding {_text(coding)} has no "{BACKGROUND}" values: add them')
    empty = [name for name, values in coding.items() if not values]
    if empty:
        raise InputError(f"mask coding {_text(coding)} has no values for {empty}: add them")
    both = set(coding[BACKGROUND]) & {v for name, values in coding.items() if name != BACKGROUND for v in values}
    if both:
        raise InputError(f"mask coding {_text(coding)} gives {sorted(both)} both to the background and to a target")


def _fits(coding: Coding, found: set[float]) -> bool:
    return not found.difference(*coding.values()) and not found.isdisjoint(coding.get(BACKGROUND, ()))


def _text(coding: Coding) -> str:
    return "{" + ", ".join(f"{name}: {list(values)}" for name, values in coding.items()) + "}"
