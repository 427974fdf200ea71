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
"""Conversion between coded masks, one value per region, and overlapping target channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import FillHoles, KeepLargestConnectedComponent, Transform
from monai.utils import convert_to_dst_type, convert_to_tensor, ensure_tuple_rep

from shared_iopfl.data.masks import EachKey
from shared_iopfl.utils.errors import InputError

BACKGROUND = "background"  # the one name in a coding that is not a target
Coding = Mapping[str, Sequence[int]]


def coding_of(site: str, coding: Coding | str | Mapping[str, Coding | str]) -> Coding | str:
    """The coding of one site's masks, for `DecodeMaskd`.

    Args:
        site: the site's name.
        coding: one coding, or its name, for all sites; or a dictionary of these by site, where sites that it leaves out
            have the coding "index".
    """
    if isinstance(coding, str) or BACKGROUND in coding:
        return coding  # type: ignore[return-value]
    return coding.get(site, "index")  # type: ignore[return-value]


class DecodeMask(Transform):
    """Turn a coded mask (1, ...) into binary targets (T, ...), float32 0 or 1, which may overlap.

    A coding names, for each target, every file value whose pixels belong to it, and the values of the background::

        {"disc": [0, 128], "cup": [0], "background": [255]}
        {"disc": [1, 2], "cup": [2], "background": [0]}

    A value that the coding does not know is refused, never guessed; so is a mask without any background, which is what
    an empty mask looks like when the coding gives its one value to a target.

    Args:
        coding: the coding, or the name of one of `known`.
        known: codings by name. When a mask does not fit `coding`, the message names those that it would fit.
        names: the targets wanted, in the order of the channels; as in the coding if None.
        needs_background: whether a mask without background is refused.

    Raises:
        InputError: when the coding is unusable, or (on call) when a mask does not fit it.
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
            raise InputError(f"targets {unknown} are not in the mask coding {_text(coding)}")
        self.needs_background = needs_background

    def __call__(self, mask: NdarrayOrTensor) -> NdarrayOrTensor:
        values: torch.Tensor = convert_to_tensor(mask, dtype=torch.float32, track_meta=False)
        if values.shape[0] != 1:
            raise InputError(f"a coded mask has one channel, got {values.shape[0]} in {_file(mask)}")
        self._refuse_misfit({float(value) for value in torch.unique(values)}, _file(mask))
        targets = [torch.isin(values, values.new_tensor(self.coding[name])) for name in self.names]
        return convert_to_dst_type(torch.cat(targets), mask, dtype=torch.float32)[0]

    def _refuse_misfit(self, found: set[float], file: str) -> None:
        unexpected = sorted(found - _values(self.coding))
        if unexpected:
            # a resampled mask has hundreds of values in between
            shown = ", ".join(f"{value:g}" for value in unexpected[:5]) + (", ..." if len(unexpected) > 5 else "")
            raise InputError(
                f"mask values {shown} in {file} are not in its coding {_text(self.coding)}: {self._suggestion(found)}"
            )
        if self.needs_background and not found & set(self.coding[BACKGROUND]):
            raise InputError(
                f"no background in mask {file} under its coding {_text(self.coding)}: {self._suggestion(found)}"
            )

    def _suggestion(self, found: set[float]) -> str:
        fitting = [name for name, coding in self.known.items() if _fits(coding, found)]
        return f"coding {' or '.join(map(repr, fitting))} would fit" if fitting else "correct the mask or the coding"


class DecodeMaskd(EachKey):
    """Dictionary-based `DecodeMask`, with the same further arguments."""

    def __init__(self, keys: KeysCollection, *args: Any, **kwargs: Any) -> None:
        super().__init__(keys, DecodeMask(*args, **kwargs))


class EnforceNesting(Transform):
    """Make each target lie inside the one before it: a target's value is at most that of every target around it.

    For probabilities (T, ...) this is the running minimum along the channels, for binary targets the intersection; and
    thresholding before it or after it gives the same.
    """

    def __call__(self, targets: NdarrayOrTensor) -> NdarrayOrTensor:
        t: torch.Tensor = convert_to_tensor(targets, track_meta=False)
        nested = t.clone()
        for outer, inner in pairwise(range(len(t))):
            nested[inner] = torch.minimum(nested[inner], nested[outer])
        return convert_to_dst_type(nested, targets)[0]


class EnforceNestingd(EachKey):
    """Dictionary-based `EnforceNesting`."""

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys, EnforceNesting())


class EncodeMask(Transform):
    """Turn nested targets (T, ...), probabilities or binary, the outermost first, into one coded mask (1, ...).

    A pixel's value, uint8, tells how many of the nested targets hold it: 0 background, 1 only the outermost one (the
    rim of the disc), T the innermost one (the cup). A target holds the pixels whose probability is at least 0.5.

    Args:
        largest: whether each target keeps its largest connected component only; one flag, or one a target.
        fill: whether holes in each target are filled; one flag, or one a target.
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
                # a hole of the inner target may be a hole of the outer one that was to stay: hence nest again
                inner = outer & (convert_to_tensor(self._fill_holes(inner.to(torch.uint8)), track_meta=False) > 0)
            coded[inner] = step + 1
            outer = inner
        return convert_to_dst_type(coded, targets, dtype=np.uint8)[0]


class EncodeMaskd(EachKey):
    """Dictionary-based `EncodeMask`, with the same further arguments."""

    def __init__(self, keys: KeysCollection, *args: Any, **kwargs: Any) -> None:
        super().__init__(keys, EncodeMask(*args, **kwargs))


def _check(coding: Coding) -> None:
    """Refuse a coding without background, or whose background is a target as well."""
    if not coding.get(BACKGROUND):
        raise InputError(f'mask coding {_text(coding)} has no "{BACKGROUND}" values')
    empty = [name for name, values in coding.items() if not values]
    if empty:
        raise InputError(f"mask coding {_text(coding)} has no values for {empty}")
    both = set(coding[BACKGROUND]) & {v for name, values in coding.items() if name != BACKGROUND for v in values}
    if both:
        raise InputError(f"mask coding {_text(coding)} has {sorted(both)} both in the background and in a target")


def _values(coding: Coding) -> set[float]:
    return {float(value) for values in coding.values() for value in values}


def _fits(coding: Coding, found: set[float]) -> bool:
    return found <= _values(coding) and bool(found & {float(value) for value in coding.get(BACKGROUND, ())})


def _text(coding: Coding) -> str:
    return "{" + ", ".join(f"{name}: {list(values)}" for name, values in coding.items()) + "}"


def _file(mask: NdarrayOrTensor) -> str:
    return str(getattr(mask, "meta", {}).get("filename_or_obj", "a mask without a file name"))
