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
"""Checks whether a picture can be a colour photograph of the fundus of one eye.

A network gives a confident mask for any picture that resembles its training pictures, such as a red-free photograph,
one with swapped channels, or two eyes in one picture. The limits here are well outside the range of public data sets:
in 349 pictures by four cameras, the mean of green is 0.35 to 0.85 of that of red, the mean of blue 0.05 to 0.85 of that
of green, and the saturation at least 0.34.
"""

from __future__ import annotations

import numpy as np

from shared_iopfl.data.photographs.field_of_view import count_fields, field_of_view, is_bordered, stretch
from shared_iopfl.utils.errors import InputError

GREY = 0.15  # mean saturation below which a picture is grey with a tint
SINGLE = 0.15  # largest mean of the other channels, relative to the strongest one, in a picture of a single colour
RED_FIRST = 1.05  # largest mean of another channel, relative to red
GREEN_SECOND = 1.1  # largest mean of blue, relative to green
STRETCHED = 1.2  # largest ratio of the axes of a round field of view
OBLONG = 1.6  # largest ratio of the sides of a field of view: cameras crop their circle to 4:3 or 3:2
SIDE = 256  # side of the reduced copy, in pixels
COARSE = 48  # side in pixels below which shapes cannot be judged


def glance(rgb: np.ndarray) -> np.ndarray:
    """Return a reduced copy of a picture (H, W, 3), with the same proportions, as float64."""
    step = max(1, -(-max(rgb.shape[:2]) // SIDE))
    height, width = (n // step * step for n in rgb.shape[:2])
    blocks = rgb[:height, :width].reshape(height // step, step, width // step, step, 3)
    return blocks.mean(axis=(1, 3), dtype=np.float64)


def _seen(small: np.ndarray) -> np.ndarray:
    field = field_of_view(small)
    return small[field] if field.any() else small.reshape(-1, 3)


def monochrome(small: np.ndarray) -> int | None:
    """Return the channel that holds the contents of a grey or single-coloured picture.

    Args:
        small: Reduced copy of the picture, (H, W, 3).

    Returns:
        The channel; -1 if all channels are alike, and None for a picture in several colours.
    """
    seen = _seen(small)
    strongest = seen.max(axis=1)
    if ((strongest - seen.min(axis=1)) / np.maximum(strongest, 1)).mean() < GREY:
        return -1
    means = seen.mean(axis=0)
    return int(means.argmax()) if np.sort(means)[1] < SINGLE * means.max() else None


def check_colours(small: np.ndarray, name: str) -> None:
    """Check that the colours are those of a fundus: red is stronger than green, and green stronger than blue.

    Args:
        small: Reduced copy of the picture, (H, W, 3).
        name: Name of the file, for the message.

    Raises:
        InputError: If they are not.
    """
    red, green, blue = _seen(small).mean(axis=0)
    if max(green, blue) > RED_FIRST * red or blue > GREEN_SECOND * green:
        raise InputError(
            f"the colours of {name} are not those of a fundus photograph (red {red:.0f}, green {green:.0f}, "
            f"blue {blue:.0f}; red must be the strongest, then green, then blue): correct the order of its channels, "
            "or give the original"
        )


def check_shape(small: np.ndarray, name: str) -> None:
    """Check that a picture shows a single eye and that its pixels are square.

    Args:
        small: Reduced copy of the picture, (H, W, 3).
        name: Name of the file, for the message.

    Raises:
        InputError: If it does not, or if they are not.
    """
    if min(small.shape[:2]) < COARSE:
        return
    fields = count_fields(small)
    if fields > 1:
        raise InputError(f"{name} shows {fields} fields of view: save each eye as a picture of its own")
    field = field_of_view(small)
    if not field.any():
        return
    height, width = (np.ptp(places) + 1 for places in field.nonzero())
    if max(height, width) > OBLONG * min(height, width):
        raise InputError(
            f"the field of view in {name} is {width / height:.2g} times as wide as high: save each eye as a picture of "
            "its own, with square pixels"
        )
    ratio = stretch(field) if is_bordered(field) else 1.0
    if ratio > STRETCHED or ratio < 1 / STRETCHED:
        raise InputError(
            f"{name} is stretched (its round field of view is {ratio:.2g} times as wide as high): save it with square "
            "pixels"
        )
