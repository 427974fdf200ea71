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
"""Styles of synthetic sites: how the images of a site look."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

Style = TypeVar("Style", bound=Any)


def style_of(site: str, styles: Mapping[str, Style], seed: int) -> Style:
    """Return the style of a site: the given one, or for another name a random mixture of the given ones.

    Args:
        site: Name of the site.
        styles: Name -> style, a dataclass whose fields are numbers or tuples of numbers.
        seed: Seed of the mixture; the same seed and name give the same style.
    """
    if site in styles:
        return styles[site]
    random_state = np.random.RandomState(zlib.crc32(f"{seed}/{site}".encode()))
    known = list(styles.values())
    share = random_state.dirichlet(np.ones(len(known)))  # one mixture for all fields, as colours or tissues must match
    mixed: dict[str, Any] = {}
    for field in fields(known[0]):
        value = np.tensordot(share, [getattr(style, field.name) for style in known], 1).tolist()
        mixed[field.name] = tuple(value) if isinstance(value, list) else value
    return type(known[0])(**mixed)
