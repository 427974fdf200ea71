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
"""The crop around the optic disc that the networks expect, from a photograph of the whole fundus, and back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Crop, InvertibleTransform, MapTransform

from shared_iopfl.errors import InputError
from shared_iopfl.locating import find_disc

__all__ = ["CropToDiscd"]


class CropToDiscd(MapTransform, InvertibleTransform):
    """Crop whole fundus photographs to a square around the optic disc; leave pictures that are such crops as they are.

    All keys are cropped alike. The square has `size_ratio` disc diameters a side, never more than the picture's
    shorter side, and is moved inside the picture where the disc lies near its edge, so that no pixel is made up.
    `Invertd` pads a mask with zeros back to the photograph's own pixels. Put it before any scaling of intensities.

    The metadata of every key tell what was done, for reports: ``crop_start`` and ``crop_size`` (pixels) and
    ``crop_confidence`` (0 to 1; NaN when nobody looked).

    Args:
        keys: what to crop: the picture, its mask.
        image_key: the picture (3, W, H) to look for the disc in; the first of `keys` if None.
        size_ratio: the square's side in disc diameters. 2 lies between the public crops, whose discs take from a
            quarter to three quarters of the side.
        crop: ``"auto"`` crops whole photographs and leaves crops, ``"always"`` crops both, ``"never"`` leaves both.
        min_confidence: a picture whose disc is less sure than this is refused, unless `crop` is ``"never"``.
        allow_missing_keys: don't raise when a key is missing, as in a case without a mask.

    Raises:
        InputError: (on call) when no disc is found.
    """

    def __init__(
        self,
        keys: KeysCollection,
        image_key: str | None = None,
        size_ratio: float = 2.0,
        crop: str = "auto",
        min_confidence: float = 0.35,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if crop not in ("auto", "always", "never"):
            raise InputError(f'crop must be "auto", "always" or "never", got "{crop}"')
        if not size_ratio >= 1:
            raise InputError(f"size_ratio must be at least 1 disc diameter, got {size_ratio}")
        self.image_key = self.keys[0] if image_key is None else image_key
        self.size_ratio = size_ratio
        self.crop = crop
        self.min_confidence = min_confidence
        self.cropper = Crop()

    def __call__(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        d: dict[Hashable, Any] = dict(data)
        image = d[self.image_key]
        shape = tuple(image.shape[1:])
        start, size, confidence = self._square(image)
        for key in self.key_iterator(d):
            if tuple(d[key].shape[1:]) != shape:
                raise InputError(
                    f"{key} has {_size(d[key])} pixels but {self.image_key} has {_size(image)}: {_file(d[key])}"
                )
            # also when nothing is cut off: then every picture has the same trace to invert
            d[key] = self.cropper(d[key], tuple(slice(a, a + n) for a, n in zip(start, size)))
            if isinstance(d[key], MetaTensor):
                d[key].meta.update(crop_start=list(start), crop_size=list(size), crop_confidence=confidence)
        return d

    def inverse(self, data: Mapping[Hashable, MetaTensor]) -> dict[Hashable, MetaTensor]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.cropper.inverse(d[key])
        return d

    def _square(self, image: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], float]:
        """Start and size, in pixels, of what to keep of the picture, and how sure the disc in it is."""
        shape = tuple(image.shape[1:])
        if self.crop == "never":
            return (0, 0), shape, float("nan")
        disc = find_disc(image)
        if disc.confidence < self.min_confidence:
            raise InputError(
                f"no optic disc found in {_file(image)} (confidence {disc.confidence:.2f}, needed "
                f'{self.min_confidence:g}): give a disc crop and set crop="never"'
            )
        if self.crop == "auto" and not disc.whole:
            return (0, 0), shape, disc.confidence
        side = min(round(self.size_ratio * disc.diameter), *shape)
        start = tuple(int(np.clip(round(c - side / 2), 0, n - side)) for c, n in zip(disc.center, shape))
        return start, (side, side), disc.confidence


def _size(picture: torch.Tensor) -> str:
    return "x".join(str(n) for n in picture.shape[1:])


def _file(picture: torch.Tensor) -> str:
    return str(getattr(picture, "meta", {}).get("filename_or_obj", "a picture without a file name"))
