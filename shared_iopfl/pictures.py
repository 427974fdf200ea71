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
"""The report's pictures: Dice by case, learning curves, routes, contours on a scan.

Figures are drawn through matplotlib's object interface, never pyplot, so that nothing global is touched and several
threads may draw at once.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from monai.transforms import LoadImage, Orientation

__all__ = [
    "WIDTH",
    "CaseImages",
    "View",
    "case_views",
    "colours",
    "curves_picture",
    "dice_picture",
    "load_case",
    "overlay_picture",
    "png",
    "routes_picture",
]

# Okabe and Ito's palette, told apart with every common colour blindness. A model has one colour in the whole report.
_MODEL_COLOURS = {"global": "#0072B2", "personalised": "#D55E00", "routed": "#009E73", "local": "#CC79A7"}
_OTHER_COLOURS = ("#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F", "#5B4B9A", "#1A1A1A", "#9C9E00")
_REFERENCE_COLOUR = "#F0E442"
WIDTH = 10.5  # inches: the width of the report's page
_SLANT: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}


def colours(models: Sequence[str]) -> dict[str, str]:
    """One colour a model: fixed for the method's own models, then in order of appearance for any others."""
    others = [model for model in dict.fromkeys(models) if model not in _MODEL_COLOURS]
    return _MODEL_COLOURS | {model: _OTHER_COLOURS[i % len(_OTHER_COLOURS)] for i, model in enumerate(others)}


def png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _text(value: Any) -> str:
    """Text as it is: a dollar sign in a site's or a case's name does not start a formula."""
    return str(value).replace("$", r"\$")


def _panels(names: Sequence[str], height: float, share_x: bool, most_columns: int = 4) -> tuple[Figure, list[Axes]]:
    """A figure of small multiples, one titled panel a name, with the vertical axis shared."""
    # as even as can be: six panels as three and three, not four and two
    rows = math.ceil(len(names) / most_columns)
    columns = math.ceil(len(names) / rows)
    width = WIDTH * max(columns, 2) / max(columns, 3)
    figure = Figure(figsize=(width, height * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=share_x, sharey=True, squeeze=False).ravel().tolist()
    for panel in axes[len(names) :]:
        panel.set_visible(False)
    for panel, name in zip(axes, names):
        panel.set_title(_text(name), fontsize=10, fontweight="bold")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#E4E4E4", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8.5, labelbottom=True)
    return figure, axes[: len(names)]


def dice_picture(
    sites: Mapping[str, Mapping[str, Mapping[str, float]]], colour: Mapping[str, str], label: str = "Dice (%)"
) -> Figure:
    """One panel a site: a dot for every case and model, the dots of a case joined, a bar at each model's mean.

    Args:
        sites: ``{site: {model: {case: Dice between 0 and 1, or NaN}}}``, models in the order to draw them.
        colour: colour of each model.
        label: title of the vertical axis.
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
        panel.set_xticks(range(len(by_model)), [_text(model) for model in by_model], **slant)
        panel.set_xlim(-0.6, max(len(by_model), 2) - 0.4)
    figure.supylabel(label, fontsize=9.5)
    return figure


def curves_picture(
    sites: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], colour: Mapping[str, str], label: str
) -> Figure:
    """One panel a site with a curve for each model over the rounds: ``{site: {model: [(round, value), ...]}}``."""
    figure, axes = _panels(list(sites), height=2.1, share_x=True)
    for panel, by_model in zip(axes, sites.values()):
        for model, points in by_model.items():
            marker = "o" if len(points) < 25 else None
            panel.plot(*zip(*points), color=colour[model], linewidth=1.7, marker=marker, markersize=3)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    shown = dict.fromkeys(model for by_model in sites.values() for model in by_model)
    handles = [Line2D([], [], color=colour[model], linewidth=2, label=_text(model)) for model in shown]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)
    figure.supxlabel("round", fontsize=9.5)
    figure.supylabel(label, fontsize=9.5)
    return figure


def routes_picture(weights: np.ndarray, experts: Sequence[str], cases: Sequence[str], layers: Sequence[str]) -> Figure:
    """Above, the mean route of each layer to each expert; below, each case's mean over layers as a stacked bar.

    Args:
        weights: routes of shape ``(case, layer, expert)``, NaN where there is none.
        experts: name of each expert; ``global`` keeps the colour it has elsewhere.
        cases: name of each case.
        layers: name of each routed layer, in the network's order.
    """
    figure = Figure(figsize=(WIDTH, 0.3 * len(experts) + 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[0.3 * len(experts) + 0.9, 2.7])
    by_layer = np.nanmean(weights, axis=0).T
    shown = above.imshow(by_layer, cmap="Blues", vmin=0, vmax=max(float(np.nanmax(by_layer)), 1e-6), aspect="auto")
    figure.colorbar(shown, ax=above, pad=0.01).ax.tick_params(labelsize=8)
    above.set_yticks(range(len(experts)), [_text(e) for e in experts], fontsize=9)
    above.set_title("weight by layer, mean over cases", fontsize=10, fontweight="bold", loc="left")
    above.set_xlabel("routed layer, from the network's input to its output", fontsize=9)

    by_case = np.nan_to_num(np.nanmean(weights, axis=1))
    colour, foot = colours(list(experts)), np.zeros(len(cases))
    for index, expert in enumerate(experts):
        below.bar(range(len(cases)), by_case[:, index], 0.75, bottom=foot, color=colour[expert], label=_text(expert))
        foot += by_case[:, index]
    below.set_title("weight by case, mean over layers", fontsize=10, fontweight="bold", loc="left")
    below.set_xlim(-0.6, max(len(cases), 8) - 0.4)
    below.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour[expert], label=_text(expert)) for expert in experts]
    below.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 0.98), ncols=6, frameon=False, fontsize=9)
    for panel, names in ((above, layers), (below, cases)):
        panel.tick_params(labelsize=8)
        if len(names) <= 40:  # more could not be read: numbers instead
            slant = _SLANT if max(map(len, names)) > 3 else {}
            panel.set_xticks(range(len(names)), [_text(name) for name in names], **slant)
    return figure


@dataclass
class CaseImages:
    """A case ready to be shown: a volume is in the order left, posterior, superior; a 2D picture is one slice thick.

    Attributes:
        image: array of shape ``(channel, x, y, z)``.
        masks: reference (under the name ``reference``) and predictions by model, each of shape ``(x, y, z)``.
        aspect: height of a pixel over its width.
        is_volume: whether the case is a volume.
    """

    image: np.ndarray
    masks: dict[str, np.ndarray]
    aspect: float
    is_volume: bool

    @property
    def levels(self) -> tuple[int, ...]:
        """The classes whose outlines are drawn: the whole foreground of a volume, nested classes of a 2D picture."""
        # Some public prostate references number zones inside the organ; the figures are those of the whole organ.
        return (1,) if self.is_volume else (1, 2)


def load_case(image: Path, masks: Mapping[str, Path]) -> CaseImages:
    """Load a scan and its masks; volumes are turned by their affine so that slices show in radiological convention.

    Raises:
        ValueError: when a file cannot be read, or a mask has another shape than its scan or is no mask.
    """
    load, turn = LoadImage(ensure_channel_first=True), Orientation("LPS", labels=None)
    loaded: dict[str, np.ndarray] = {}
    aspect = 1.0
    for name, path in {"image": image, **masks}.items():
        try:
            data: Any = load(path)
            if data.ndim == 4:
                data = turn(data)
                aspect = float(data.pixdim[1] / data.pixdim[0]) if name == "image" else aspect
        except Exception as error:  # readers raise whatever their library raises
            raise ValueError(f"{path} cannot be read ({type(error).__name__})") from error
        loaded[name] = data.numpy() if data.ndim == 4 else data.numpy()[..., None]
        if loaded[name].shape[1:] != loaded["image"].shape[1:]:
            raise ValueError(f"{path} has shape {loaded[name].shape[1:]}, its scan {loaded['image'].shape[1:]}")
        if name != "image" and loaded[name].max() > 10:
            raise ValueError(f"{path} holds values up to {loaded[name].max():g}: not a mask of classes 0, 1, 2")
        is_volume = data.ndim == 4
    return CaseImages(loaded.pop("image"), {name: mask[0] for name, mask in loaded.items()}, aspect, is_volume)


@dataclass
class View:
    """One panel of an overlay: a case, the number of the slice to show, counted from 0, and what stands above it."""

    case: CaseImages
    index: int
    title: str


def case_views(case: CaseImages, model: str, title: str, disagreement: bool = False) -> list[View]:
    """The slice with the largest reference area and, if wanted, the one where prediction and reference differ most."""
    predicted = case.masks[model] >= 1
    reference = case.masks["reference"] >= 1 if "reference" in case.masks else predicted
    largest = int(reference.sum((0, 1)).argmax())
    wrong = (predicted != reference).sum((0, 1))
    differing = int(wrong.argmax()) if disagreement and wrong.any() else largest
    slices = [(largest, "largest area"), (differing, "largest disagreement")][: 1 + (differing != largest)]
    note = f"\nslice {{}}/{case.image.shape[-1]}, {{}}" if case.is_volume else ""
    return [View(case, index, title + note.format(index + 1, what)) for index, what in slices]


def _window(case: CaseImages, index: int) -> tuple[slice, slice]:
    """The part of a slice to show: all of a 2D picture; of a volume, a square around what is outlined."""
    shape = case.image.shape[1:3]
    outlined = np.argwhere(np.any([mask[..., index] >= 1 for mask in case.masks.values()], axis=0))
    if not case.is_volume or not len(outlined):
        return slice(0, shape[0]), slice(0, shape[1])
    low, high = outlined.min(0), outlined.max(0) + 1
    side = max(2 * int((high - low).max()), max(shape) // 2)
    starts = [int(np.clip(round((a + b - side) / 2), 0, max(n - side, 0))) for a, b, n in zip(low, high, shape)]
    return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)


def overlay_picture(views: Sequence[View], model: str, colour: Mapping[str, str]) -> Figure:
    """Scan slices in a row with the outlines of the reference, the model and, dashed, the global model.

    Columns run from the patient's right to left and rows from anterior to posterior: radiological convention.
    """
    columns = max(len(views), 3)
    lines = max(view.title.count("\n") + 1 for view in views)
    figure = Figure(figsize=(WIDTH, WIDTH / columns + 0.17 * lines + 0.35), layout="compressed")
    axes = figure.subplots(1, columns, squeeze=False).ravel().tolist()
    styles = {"global": (colour["global"], "dashed"), "reference": (_REFERENCE_COLOUR, "solid")}
    styles |= {model: (colour[model], "solid")}
    seen: dict[str, Line2D] = {}
    for panel in axes:
        panel.set_axis_off()
    for panel, view in zip(axes, views):
        case = view.case
        x, y = _window(case, view.index)
        panel.imshow(_displayed(case)[x, y, view.index].swapaxes(0, 1), cmap="gray", vmin=0, vmax=1)
        panel.set_aspect(case.aspect)
        panel.set_title(_text(view.title), fontsize=9)
        for name, (line, dash) in styles.items():
            for level in case.levels if name in case.masks else ():
                region = (case.masks[name][x, y, view.index] >= level).T
                if region.any() and not region.all():
                    drawn = panel.contour(region, [0.5], colors=[line], linewidths=1.3, linestyles=dash)
                    halo = "black" if name == "reference" else "white"  # seen on dark and on bright tissue
                    drawn.set(path_effects=[withStroke(linewidth=2.6, foreground=halo, alpha=0.6)])
                    seen[name] = Line2D([], [], color=line, linestyle=dash, linewidth=2, label=_text(name))
        for at, side in ((0.04, "R"), (0.96, "L")) if case.is_volume else ():
            panel.text(at, 0.5, side, transform=panel.transAxes, color="white", fontsize=9, ha="center", va="center")
    handles = [seen[name] for name in dict.fromkeys(("reference", model, "global")) if name in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _displayed(case: CaseImages) -> np.ndarray:
    """Intensities between 0 and 1, ``(x, y, z)`` in grey or ``(x, y, z, 3)`` in colour."""
    if not case.is_volume and len(case.image) >= 3:
        return np.moveaxis(case.image[:3], 0, -1) / max(255, case.image.max())
    low, high = np.percentile(case.image[0], (1, 99.5))
    return np.clip((case.image[0] - low) / max(high - low, 1e-6), 0, 1)
