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
"""Charts of the report: Dice by case, learning curves, routes, differences with intervals, gain by shift."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from shared_iopfl.report.pictures import WIDTH, colours, plain

_SLANT: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}


def _panels(names: Sequence[str], height: float, share_x: bool, most_columns: int = 4) -> tuple[Figure, list[Axes]]:
    """A figure of small multiples: one panel per name, titled with it, all with the same vertical axis."""
    # rows of equal length where possible: six panels as three and three, not four and two
    rows = math.ceil(len(names) / most_columns)
    columns = math.ceil(len(names) / rows)
    width = WIDTH * max(columns, 2) / max(columns, 3)
    figure = Figure(figsize=(width, height * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=share_x, sharey=True, squeeze=False).ravel().tolist()
    for panel in axes[len(names) :]:
        panel.set_visible(False)
    for panel, name in zip(axes, names):
        panel.set_title(plain(name), fontsize=10, fontweight="bold")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8.5, labelbottom=True)
    return figure, axes[: len(names)]


def dice_picture(sites: Mapping[str, Mapping[str, Mapping[str, float]]], colour: Mapping[str, str]) -> Figure:
    """One panel per site: a dot for every case and model, a line joins the dots of a case, a bar marks a model's mean.

    Args:
        sites: ``{site: {model: {case: Dice between 0 and 1, or NaN}}}``, models in the order to draw them.
        colour: Colour of each model.
    """
    figure, axes = _panels(list(sites), height=2.9, share_x=False)
    for panel, by_model in zip(axes, sites.values()):
        for case in dict.fromkeys(case for values in by_model.values() for case in values):
            scores = [100 * values.get(case, math.nan) for values in by_model.values()]
            panel.plot(range(len(scores)), scores, color="#BDBDBD", linewidth=0.7, zorder=1)
        for at, (model, values) in enumerate(by_model.items()):
            known = [100 * value for value in values.values() if math.isfinite(value)]
            if known:
                panel.scatter([at] * len(known), known, s=17, color=colour[model], alpha=0.75, linewidths=0)
                panel.hlines(np.mean(known), at - 0.3, at + 0.3, color=colour[model], linewidth=2.6)
        slant = _SLANT if len(by_model) > 2 else {}
        panel.set_xticks(range(len(by_model)), [plain(model) for model in by_model], **slant)
        panel.set_xlim(-0.6, max(len(by_model), 2) - 0.4)
    figure.supylabel("Dice (%)", fontsize=9.5)
    return figure


def curves_picture(
    sites: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], colour: Mapping[str, str], label: str
) -> Figure:
    """One panel per site, with a curve for each model over the rounds: ``{site: {model: [(round, value), ...]}}``."""
    figure, axes = _panels(list(sites), height=2.1, share_x=True)
    for panel, by_model in zip(axes, sites.values()):
        for model, points in by_model.items():
            marker = "o" if len(points) < 25 else None
            panel.plot(*zip(*points), color=colour[model], linewidth=1.7, marker=marker, markersize=3)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    shown = dict.fromkeys(model for by_model in sites.values() for model in by_model)
    handles = [Line2D([], [], color=colour[model], linewidth=2, label=plain(model)) for model in shown]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)
    figure.supxlabel("round", fontsize=9.5)
    figure.supylabel(label, fontsize=9.5)
    return figure


def routes_picture(weights: np.ndarray, experts: Sequence[str], cases: Sequence[str], layers: Sequence[str]) -> Figure:
    """Above, each expert's mean weight by layer; below, each case's mean weights over layers as a stacked bar.

    Args:
        weights: Routes of shape ``(case, layer, expert)``, NaN if there is none.
        experts: Name of each expert; ``global`` keeps the colour it has elsewhere.
        cases: Name of each case.
        layers: Name of each routed layer, in the network's order.
    """
    figure = Figure(figsize=(WIDTH, 0.3 * len(experts) + 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[0.3 * len(experts) + 0.9, 2.7])
    by_layer = np.nanmean(weights, axis=0).T
    shown = above.imshow(by_layer, cmap="Blues", vmin=0, vmax=max(float(np.nanmax(by_layer)), 1e-6), aspect="auto")
    figure.colorbar(shown, ax=above, pad=0.01).ax.tick_params(labelsize=8)
    above.set_yticks(range(len(experts)), [plain(e) for e in experts], fontsize=9)
    above.set_title("weight by layer, mean over cases", fontsize=10, fontweight="bold", loc="left")
    above.set_xlabel("routed layer, from the network's input to its output", fontsize=9)

    by_case = np.nan_to_num(np.nanmean(weights, axis=1))
    colour, foot = colours(list(experts)), np.zeros(len(cases))
    for index, expert in enumerate(experts):
        below.bar(range(len(cases)), by_case[:, index], 0.75, bottom=foot, color=colour[expert], label=plain(expert))
        foot += by_case[:, index]
    below.set_title("weight by case, mean over layers", fontsize=10, fontweight="bold", loc="left")
    below.set_xlim(-0.6, max(len(cases), 8) - 0.4)
    below.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour[expert], label=plain(expert)) for expert in experts]
    below.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=6, frameon=False, fontsize=9)
    for panel, names in ((above, layers), (below, cases)):
        panel.tick_params(labelsize=8)
        if len(names) <= 40:  # more names would be illegible: numbers instead
            slant = _SLANT if max(map(len, names)) > 3 else {}
            panel.set_xticks(range(len(names)), [plain(name) for name in names], **slant)
    return figure


def forest_picture(
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]],
    label: str,
    colour: Mapping[str, str],
    bounds: Collection[str] = (),
) -> Figure:
    """Differences between methods with their intervals, in one panel per site or one for all; a line marks 0.

    A difference so far to the left that it would squeeze the others together is drawn as an arrow with its value.

    Args:
        panels: ``{panel: {method: (difference, low, high)}}``, with the same methods in each panel, from top to bottom.
            An interval of NaN is not drawn.
        label: Title of the horizontal axis.
        colour: Colours of the highlighted methods.
        bounds: Methods that are drawn as hollow dots, with their names in italics.
    """
    methods = list(next(iter(panels.values())))
    figure, axes = _panels(list(panels), height=0.27 * len(methods) + 0.75, share_x=True, most_columns=3)
    figure.set_figwidth(WIDTH if len(panels) == 1 else figure.get_figwidth())
    # a bound may extend the axis to the right; a method that failed must not extend it to the left
    ends = np.array(
        [found[m] for found in panels.values() for m in methods if m not in bounds or {*methods} <= {*bounds}]
    )
    floor = min(-3, -1.5 * float(np.nanmax(ends)), 1.5 * float(np.nanpercentile(np.nanmin(ends, axis=1), 15)))
    for panel, found in zip(axes, panels.values()):
        panel.grid(axis="y", visible=False)
        panel.grid(axis="x", color="#E4E4E4", linewidth=0.8)
        panel.axvline(0, color="#59636E", linewidth=1.2, zorder=1)
        for at, (method, (mean, low, high)) in enumerate(found.items()):
            ink = colour.get(method, "#6E7781" if method in bounds else "#30363D")
            size = 46 if method in colour else 30
            words: dict[str, Any] = {"fontsize": 8.5, "va": "center", "color": ink}
            text = f"{mean:+.1f}".replace("-", "\u2212")
            if mean < floor:
                panel.scatter([floor], [at], s=size, color=ink, marker="<", zorder=3)
            else:
                panel.hlines(at, max(low, floor), high, color=ink, linewidth=2.4 if method in colour else 1.6, zorder=2)
                face = "white" if method in bounds else ink
                panel.scatter([mean], [at], s=size, color=face, edgecolors=ink, zorder=3)
            if len(panels) == 1:
                text += f" [{low:+.1f}, {high:+.1f}]".replace("-", "\u2212") if math.isfinite(low) else ""
                panel.annotate(text, (1.01, at), xycoords=("axes fraction", "data"), **words)
            elif mean < floor:
                panel.annotate(text, (floor, at), xytext=(7, 0), textcoords="offset points", **words)
        panel.set_yticks(range(len(methods)), [plain(method) for method in methods])
        panel.set_ylim(len(methods) - 0.4, -0.6)
        for method, tick in zip(methods, panel.get_yticklabels()):
            tick.set(fontstyle="italic" if method in bounds else "normal", color=colour.get(method, "black"))
            tick.set_fontweight("bold" if method in colour else "normal")
    figure.supxlabel(label, fontsize=9.5)
    return figure


def gains_picture(sites: Mapping[str, Sequence[tuple[float, float]]], label: str) -> Figure:
    """Gain against shift, ``{site: [(shift, gain), ...]}``: a dot per case, a ring at each site's mean."""
    figure = Figure(figsize=(WIDTH * 2 / 3, 3.8), layout="constrained")
    panel = figure.subplots()
    colour = colours(list(sites))
    panel.axhline(0, color="#59636E", linewidth=1.2, zorder=1)
    for site, points in sites.items():
        shift, gain = np.transpose(points)
        panel.scatter(shift, gain, s=17, color=colour[site], alpha=0.6, linewidths=0, label=plain(site), zorder=2)
        mean = [shift.mean()], [gain.mean()]
        panel.scatter(*mean, s=95, color="white", edgecolors=colour[site], linewidths=2.4, zorder=3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#E4E4E4", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8.5)
    panel.set_xlabel("shift of the scan", fontsize=9.5)
    panel.set_ylabel(label, fontsize=9.5)
    figure.legend(loc="outside upper left", ncols=6, frameon=False, fontsize=9, markerscale=1.6, handletextpad=0.1)
    return figure
