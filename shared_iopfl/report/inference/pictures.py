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
"""Pictures of an inference page: thumbnails of overlays, and measures compared with those of the inside sites."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from shared_iopfl.report.pictures import WIDTH, plain

SIDE = 260  # pixels of a thumbnail: some 10 kB, so that 500 make a page of 5 MB
QUALITY = 75


def thumbnail(path: Path) -> str:
    """A reduced picture as a data URI; "" if the file cannot be read."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError):
        return ""
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def distribution_picture(values: Sequence[float], sites: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Values of one measure as dots with their median, and above them the quantiles of each inside site.

    Args:
        values: One value for each mask.
        sites: Site -> quantiles at 5, 25, 50, 75 and 95 %.
        title: Title of the axis.
    """
    figure = Figure(figsize=(WIDTH, 1.3 + 0.32 * len(sites)), layout="constrained")
    axes = figure.subplots()
    names = [*sites, "these scans"]
    for row, site in enumerate(sites):
        low, quarter, median, upper, high = sites[site]
        axes.barh(row, high - low, left=low, height=0.6, color="#c9d1d9")
        axes.barh(row, upper - quarter, left=quarter, height=0.6, color="#8c959f")
        axes.plot([median, median], [row - 0.3, row + 0.3], color="white", linewidth=2)
    # dots of similar values would cover each other: spread them vertically in a fixed order
    spread = 0.3 * np.sin(2.4 * np.arange(len(values)))
    order = np.argsort(values, kind="stable")
    axes.plot(np.asarray(values)[order], len(sites) + spread, ".", color="#009E73", markersize=6, alpha=0.8)
    middle = float(np.median(values))
    axes.plot([middle, middle], [len(sites) - 0.42, len(sites) + 0.42], color="#1f2328", linewidth=1.5)
    axes.set_yticks(range(len(names)), [plain(name) for name in names])
    axes.use_sticky_edges = False  # leave room between the bars and the frame
    axes.set_ylim(len(sites) + 0.6, -0.6)
    axes.set_xlabel(plain(title))
    axes.spines[["top", "right"]].set_visible(False)
    return figure
