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
"""Pictures of cases with the outlines of their masks; colours and sizes are shared with the charts.

Figures are drawn with matplotlib's object interface, not pyplot, so that no global state is changed and several threads
may draw at the same time.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from monai.transforms import LoadImage, Orientation

from shared_iopfl.data.photographs.reader import CodedMaskReader, PhotographReader
from shared_iopfl.data.scan_names import PICTURES, file_ending, is_dicom
from shared_iopfl.data.volumes.dicom import DicomReader

# Okabe and Ito's palette, which is safe for colour blindness. A model has the same colour in the whole report.
_MODEL_COLOURS = {
    "global": "#0072B2",
    "personalised": "#D55E00",
    "soup": "#E69F00",
    "routed": "#009E73",
    "local": "#CC79A7",
}
_OTHER_COLOURS = ("#56B4E9", "#8C6D31", "#7F7F7F", "#5B4B9A", "#1A1A1A", "#9C9E00")
_REFERENCE_COLOUR = "#F0E442"
MOST_VALUES = 10  # in a mask
MOST_SHOWN = 2000  # pixels along a picture's longer side
WIDTH = 10.5  # inches: the width of the report's page


def colours(models: Sequence[str]) -> dict[str, str]:
    """One colour per model: fixed for the method's own models, in order of appearance for others."""
    others = [model for model in dict.fromkeys(models) if model not in _MODEL_COLOURS]
    return _MODEL_COLOURS | {model: _OTHER_COLOURS[i % len(_OTHER_COLOURS)] for i, model in enumerate(others)}


def png(figure: Figure, dpi: int = 130) -> bytes:
    """The figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def plain(value: Any) -> str:
    """Text in which a dollar sign, as in the name of a site or case, does not start a formula."""
    return str(value).replace("$", r"\$")


@dataclass
class CaseImages:
    """A case ready to be shown: a volume is in the order left, posterior, superior; a 2D picture is one slice thick.

    Attributes:
        image: Array of shape ``(channel, x, y, z)``.
        masks: Reference (under the name ``reference``) and predictions by model, each of shape ``(x, y, z)``.
        aspect: Height of a pixel over its width.
        is_volume: Whether the case is a volume.
    """

    image: np.ndarray
    masks: dict[str, np.ndarray]
    aspect: float
    is_volume: bool

    def levels(self, name: str) -> list[float]:
        """Values of a mask whose borders to all smaller values are drawn: one for a volume, all for a 2D picture."""
        # Some public prostate references number zones inside the organ; the scores are those of the whole organ.
        # Nested classes of a picture have the same borders whichever values code them: 0, 1, 2 or 255, 128, 0.
        return [1] if self.is_volume else np.unique(self.masks[name])[1:].tolist()


def load_case(image: Path, masks: Mapping[str, Path]) -> CaseImages:
    """Load a scan and its masks; volumes are reoriented by their affine to radiological convention.

    Raises:
        ValueError: If a file cannot be read, or a mask has another shape than its scan or is not a mask.
    """
    readers = PhotographReader(grey="replicate", min_size=1), CodedMaskReader(min_size=1)
    load, turn = LoadImage(ensure_channel_first=True), Orientation("LPS", labels=None)
    loaded: dict[str, np.ndarray] = {}
    aspect = 1.0
    for name, path in {"image": image, **masks}.items():
        try:
            reader: Any = readers[name != "image"] if file_ending(path) in PICTURES else None
            if Path(path).is_dir() or is_dicom(Path(path)):
                reader = DicomReader()  # MONAI's own reader starts a new series where the text of the thickness changes
            data: Any = load(path, reader=reader)
            while data.ndim > 4 and data.shape[-1] == 1:
                data = data[..., 0]
            if data.ndim == 4:
                data = turn(data)
                aspect = float(data.pixdim[1] / data.pixdim[0]) if name == "image" else aspect
        except Exception as error:  # image libraries raise many kinds of exceptions
            raise ValueError(f"{path} cannot be read ({type(error).__name__})") from error
        # large pictures are subsampled: an overlay has fewer pixels anyway
        step = max(1, max(data.shape[1:]) // MOST_SHOWN)
        loaded[name] = data.numpy() if data.ndim == 4 else data.numpy()[:, ::step, ::step, None]
        if loaded[name].shape[1:] != loaded["image"].shape[1:]:
            raise ValueError(f"{path} has shape {loaded[name].shape[1:]}, its scan {loaded['image'].shape[1:]}")
        if name != "image" and (values := len(np.unique(loaded[name]))) > MOST_VALUES:
            raise ValueError(f"{path} holds {values} different values: not a mask of a few classes")
        is_volume = data.ndim == 4
    return CaseImages(loaded.pop("image"), {name: mask[0] for name, mask in loaded.items()}, aspect, is_volume)


@dataclass
class View:
    """One panel of an overlay: a case, the index of the slice to show, counted from 0, and its title."""

    case: CaseImages
    index: int
    title: str


def case_views(case: CaseImages, model: str, title: str, disagreement: bool = False) -> list[View]:
    """The slice with the largest reference area and, if requested, the one where prediction and reference differ most.

    Without a reference, the largest area of the prediction is used; if that is empty, the middle slice.
    """
    predicted = case.masks[model] >= 1
    reference = case.masks["reference"] >= 1 if "reference" in case.masks else predicted
    area, wrong = reference.sum((0, 1)), (predicted != reference).sum((0, 1))
    empty = not area.any()
    largest = len(area) // 2 if empty else int(area.argmax())
    slices = {largest: "nothing found" if empty else "largest area"}
    if disagreement and wrong.any():
        slices.setdefault(int(wrong.argmax()), "largest disagreement")
    if not case.is_volume:
        return [View(case, 0, f"{title}\nnothing found" if empty else title)]
    return [View(case, index, f"{title}\nslice {index + 1}/{len(area)}, {what}") for index, what in slices.items()]


def _window(case: CaseImages, index: int) -> tuple[slice, slice]:
    """The part of a slice to show: the whole of a 2D picture; for a volume, a square around the outlines."""
    shape = case.image.shape[1:3]
    outlined = np.argwhere(np.any([mask[..., index] >= 1 for mask in case.masks.values()], axis=0))
    if not case.is_volume or not len(outlined):
        return slice(0, shape[0]), slice(0, shape[1])
    low, high = outlined.min(0), outlined.max(0) + 1
    side = max(2 * int((high - low).max()), max(shape) // 2)
    starts = [int(np.clip(round((a + b - side) / 2), 0, max(n - side, 0))) for a, b, n in zip(low, high, shape)]
    return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)


def draw_view(panel: Axes, view: View, model: str, colour: Mapping[str, str]) -> dict[str, Line2D]:
    """Draw a slice with its outlines in radiological convention, and return the legend handles by name."""
    styles = {"global": (colour["global"], "dashed"), "reference": (_REFERENCE_COLOUR, "solid")}
    styles |= {model: (colour[model], "solid")}
    seen: dict[str, Line2D] = {}
    case = view.case
    x, y = _window(case, view.index)
    panel.imshow(_displayed(case)[x, y, view.index].swapaxes(0, 1), cmap="gray", vmin=0, vmax=1)
    panel.set_aspect(case.aspect)
    panel.set_title(plain(view.title), fontsize=9)
    for name, (line, dash) in styles.items():
        for level in case.levels(name) if name in case.masks else ():
            region = (case.masks[name][x, y, view.index] >= level).T
            if region.any() and not region.all() and min(region.shape) > 1:  # a single row has no outline
                drawn = panel.contour(region, [0.5], colors=[line], linewidths=1.3, linestyles=dash)
                halo = "black" if name == "reference" else "white"  # visible on dark and on bright tissue
                drawn.set(path_effects=[withStroke(linewidth=2.6, foreground=halo, alpha=0.6)])
                seen[name] = Line2D([], [], color=line, linestyle=dash, linewidth=2, label=plain(name))
    for at, letter in ((0.04, "R"), (0.96, "L")) if case.is_volume else ():
        panel.text(at, 0.5, letter, transform=panel.transAxes, color="white", fontsize=9, ha="center", va="center")
    return seen


def overlay_picture(views: Sequence[View], model: str, colour: Mapping[str, str], columns: int = 3) -> Figure:
    """Scan slices in a row with the outlines of the reference, the model and, dashed, the global model.

    Columns run from the patient's right to left and rows from anterior to posterior: radiological convention.

    Args:
        views: Views to show.
        model: Model whose outlines are drawn besides the reference and the global model.
        colour: Colour of each model.
        columns: Minimal number of columns, so that fewer views are not drawn larger than those of other sites.
    """
    columns = max(len(views), columns)
    lines = max(view.title.count("\n") + 1 for view in views)
    side = min(WIDTH / columns, WIDTH / 2)
    figure = Figure(figsize=(side * columns, side + 0.17 * lines + 0.35), layout="compressed")
    axes = figure.subplots(1, columns, squeeze=False).ravel().tolist()
    seen: dict[str, Line2D] = {}
    for panel in axes:
        panel.set_axis_off()
    for panel, view in zip(axes, views):
        seen |= draw_view(panel, view, model, colour)
    handles = [seen[name] for name in dict.fromkeys(("reference", model, "global")) if name in seen]
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    return figure


def _displayed(case: CaseImages) -> np.ndarray:
    """Intensities between 0 and 1, ``(x, y, z)`` in grey or ``(x, y, z, 3)`` in colour."""
    if not case.is_volume and len(case.image) >= 3:
        return np.moveaxis(case.image[:3], 0, -1) / max(255, case.image.max())
    low, high = np.percentile(case.image[0], (1, 99.5))
    return np.clip((case.image[0] - low) / max(high - low, 1e-6), 0, 1)
