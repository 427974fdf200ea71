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
"""Cropping of a photograph around the optic disc, and the inverse, which restores the whole picture."""

from __future__ import annotations

import functools
import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Crop, Cropd

from shared_iopfl.data.photographs.locating import Disc, find_disc
from shared_iopfl.data.photographs.reader import PhotographReader, file_of
from shared_iopfl.data.scan_files import Case
from shared_iopfl.utils.errors import InputError

logger = logging.getLogger(__name__)
CROPS = ("auto", "always", "never", "crops")
MIN_CONFIDENCE = 0.35
LEAST_CONFIDENCE = 0.12  # if all pictures of the site are crops around a disc
LOOKED_AT = 9  # number of a site's pictures that are examined
OBLONG = 1.3  # largest ratio of the sides of a crop


def site_crop(crop: str, cases: Sequence[Case]) -> str:
    """Choose how to crop the pictures of a site: ``"crops"`` in place of ``"auto"`` if most are crops around the disc.

    A single picture may be misjudged: in a crop by an older camera the disc is difficult to find, and dark corners look
    like the border of a whole photograph. All pictures of a site are therefore treated in the way that suits most of
    them.

    Args:
        crop: As in `CropToDiscd`; other values than ``"auto"`` are returned unchanged.
        cases: Cases of the site. About nine of them, evenly spaced, are examined; for a single case `crop` is
            unchanged.
    """
    if crop != "auto" or len(cases) < 2:
        return crop
    step = max(1, -(-len(cases) // LOOKED_AT))
    looked = [_is_crop(case["image"]) for case in cases[::step]]
    known = [one for one in looked if one is not None]
    if 2 * sum(known) <= len(known):
        return crop
    logger.info("%d of %d examined pictures are disc crops: all are taken for disc crops", sum(known), len(known))
    return "crops"


def _is_crop(path: str) -> bool | None:
    """Return whether a picture is a crop around the disc; None if it cannot be read, which reading it will report."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return _looks_like_crop(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)  # a comparison examines the same site a hundred times
def _looks_like_crop(path: str, size: int, time: int) -> bool | None:
    try:
        reader = PhotographReader(grey="replicate")
        image, _ = reader.get_data(reader.read(path))
    except Exception:
        return None
    disc = find_disc(np.moveaxis(image, -1, 0))
    return not disc.whole if disc.confidence >= LEAST_CONFIDENCE else None


class CropToDiscd(Cropd):
    """Crop whole fundus photographs to a square around the optic disc; pictures that are such crops remain unchanged.

    All keys are cropped alike. The side of the square is `size_ratio` disc diameters, but at most the shorter side of
    the picture. If the disc is near the edge, the square is moved into the picture, so that nothing is padded.
    `Invertd` pads a mask with zeros to the pixels of the photograph. The transform comes before any scaling of
    intensities.

    The metadata of every key describe the crop for reports: ``crop_start`` and ``crop_size`` (pixels),
    ``crop_confidence`` (0 to 1; NaN if the disc was not searched), and ``remarks``, what a person should check ("" if
    nothing).

    Args:
        keys: Keys of the pictures to crop: first the photograph (3, W, H) in which the disc is searched, then its mask.
        size_ratio: Side of the square in disc diameters. With 2, the size is in the range of the public crops, whose
            discs have diameters of a quarter to three quarters of the side.
        crop: ``"auto"`` crops whole photographs and keeps crops; ``"always"`` crops both; ``"never"`` keeps both and
            does not search for the disc; with ``"crops"``, all pictures are taken for crops and kept, and one with an
            uncertain disc gets a remark. `site_crop` chooses this value for a site.

    Raises:
        InputError: (on call) If no disc is found, or its confidence is too low.
    """

    def __init__(self, keys: KeysCollection, size_ratio: float = 2.0, crop: str = "auto") -> None:
        super().__init__(keys, Crop())
        if crop not in CROPS:
            raise InputError(f'crop must be "auto", "always", "never" or "crops", got "{crop}"')
        if not size_ratio >= 1:
            raise InputError(f"size_ratio must be at least 1 disc diameter, got {size_ratio}")
        self.size_ratio = size_ratio
        self.crop = crop

    def __call__(  # type: ignore[override]
        self, data: Mapping[Hashable, MetaTensor], lazy: bool | None = None
    ) -> dict[Hashable, MetaTensor]:
        d: dict[Hashable, Any] = dict(data)
        image = d[self.keys[0]]
        shape = tuple(image.shape[1:])
        start, size, confidence, remarks = self._square(image)
        if remarks:
            logger.warning("%s: %s", file_of(image), remarks)
        for key in self.key_iterator(d):
            if tuple(d[key].shape[1:]) != shape:
                raise InputError(
                    f"{key} has {_size(d[key])} pixels but {self.keys[0]} has {_size(image)}: correct {file_of(d[key])}"
                )
            # also if nothing is cut off, so that every picture has the same trace to invert
            d[key] = self.cropper(d[key], tuple(slice(a, a + n) for a, n in zip(start, size)))
            if isinstance(d[key], MetaTensor):
                d[key].meta.update(crop_start=list(start), crop_size=list(size), crop_confidence=confidence)
                d[key].meta["remarks"] = remarks
        return d

    def _square(self, image: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], float, str]:
        """Return start and size of the crop in pixels, the confidence of the disc, and remarks."""
        shape = tuple(image.shape[1:])
        if self.crop == "never":
            return (0, 0), shape, float("nan"), _oblong(shape)
        disc = find_disc(image)
        least = LEAST_CONFIDENCE if self.crop == "crops" else MIN_CONFIDENCE
        if disc.confidence < least:
            raise InputError(
                f"no optic disc found in {file_of(image)} (confidence {disc.confidence:.2f}, needed {least:g}): give a "
                "disc crop and set --crop never"
            )
        if self.crop == "crops" or (self.crop == "auto" and not disc.whole):
            return (0, 0), shape, disc.confidence, self._remarks(disc, shape)
        side = min(round(self.size_ratio * disc.diameter), *shape)
        start = tuple(int(np.clip(round(c - side / 2), 0, n - side)) for c, n in zip(disc.center, shape))
        return start, (side, side), disc.confidence, ""

    def _remarks(self, disc: Disc, shape: tuple[int, ...]) -> str:
        remarks = [_oblong(shape)]
        if disc.confidence < MIN_CONFIDENCE:
            remarks.append(f"optic disc uncertain (confidence {disc.confidence:.2f})")
        elif disc.whole:
            remarks.append("looks like a whole photograph among crops")
        return "; ".join(filter(None, remarks))


def _oblong(shape: tuple[int, ...]) -> str:
    """Return a remark for a crop that is not about as wide as high, as it may be stretched; otherwise ""."""
    ratio = shape[0] / shape[1]
    return f"a crop {ratio:.2g} times as wide as high" if max(ratio, 1 / ratio) > OBLONG else ""


def _size(picture: torch.Tensor) -> str:
    return "x".join(str(n) for n in picture.shape[1:])
