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
"""Listing of the values in a site's masks, before training."""

from __future__ import annotations

from collections.abc import Sequence

from shared_iopfl.data.loading import LoadCased
from shared_iopfl.data.photographs.reader import CodedMaskReader
from shared_iopfl.data.scan_files import Case
from shared_iopfl.data.scan_names import PICTURES, file_ending

MOST = 8  # largest number of values that are listed


def mask_values(cases: Sequence[Case]) -> str:
    """Open every mask of a site and list its values; if masks differ, give an example for each set of values.

    Args:
        cases: Cases of the site.

    Returns:
        One line of text.

    Raises:
        InputError: If a mask cannot be read, is empty, or contains other values than whole numbers from 0.
    """
    pictures = LoadCased("label", spatial_dims=2, reader=CodedMaskReader())
    volumes = LoadCased("label")
    groups: dict[tuple[int, ...], list[str]] = {}
    for case in cases:
        load = pictures if file_ending(case["label"]) in PICTURES else volumes
        values = load({"label": case["label"]})["label"].unique()
        groups.setdefault(tuple(map(int, values.tolist())), []).append(case["case"])
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    texts = [_text(values) + (f" in {len(names)}" if len(groups) > 1 else "") for values, names in ordered]
    # no example is given for the most frequent set
    texts[1:] = [f"{text} ({names[0]}{', ...' * (len(names) > 1)})" for text, (_, names) in zip(texts[1:], ordered[1:])]
    return f"masks of {'; '.join(texts)}"


def _text(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:MOST])) + ", ..." * (len(values) > MOST)
