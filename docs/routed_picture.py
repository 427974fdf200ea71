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
"""The picture at the top of the README, from the demos' output: how a site outside fares, and what it leans on.

    ./demo.sh && ./demo.sh fundus
    python docs/routed_picture.py demo_output docs/routed.png

Worst, median and best scan by the routed network's Dice: nothing is picked by eye. Synthetic sites only.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from shared_iopfl.evaluation.scores import read_scores
from shared_iopfl.report.gallery import best_median_worst
from shared_iopfl.report.pictures import WIDTH, case_views, colours, draw_view, load_case, plain, png
from shared_iopfl.utils.tables import read_rows

TASKS = {"prostate": "prostate, T2 MRI", "fundus": "optic disc and cup"}


def outside_site(run: Path) -> str:
    (site,) = {site for role, site in read_scores(run)["dice"] if role == "outside"}
    return site


def draw_cases(panels: list[Axes], run: Path) -> dict[str, Line2D]:
    """The outside site's worst, median and best scan with the outlines of both models and of the reference."""
    dice = read_scores(run)["dice"]["outside", outside_site(run)]
    files = {(row["model"], row["case"]): row for row in read_rows(run / "cases.csv", "model case image label mask")}
    seen: dict[str, Line2D] = {}
    for panel, (what, case) in zip(panels, reversed(best_median_worst(dice["routed"], list(dice["routed"])))):
        routed, common = (files[model, case] for model in ("routed", "global"))
        masks = {"reference": routed["label"], "routed": routed["mask"], "global": common["mask"]}
        images = load_case(run / routed["image"], {name: run / file for name, file in masks.items()})
        title = f"{what}: Dice {100 * dice['routed'][case]:.0f}, global model {100 * dice['global'][case]:.0f}"
        view = case_views(images, "routed", "")[0]
        view.title = title
        seen |= draw_view(panel, view, "routed", colours(()))
    return seen


def routes_of(run: Path) -> dict[str, dict[str, float]]:
    """How much of each expert each scan's network is made of, the mean over its layers: expert -> case -> weight."""
    weights: dict[str, dict[str, list[float]]] = {}
    for path in run.glob(f"**/{outside_site(run)}/**/routes.csv"):
        for row in read_rows(path, "case expert weight"):
            weights.setdefault(row["expert"], {}).setdefault(row["case"], []).append(float(row["weight"]))
    return {
        expert: {case: sum(layers) / len(layers) for case, layers in cases.items()} for expert, cases in weights.items()
    }


def draw_routes(panel: Axes, routes: dict[str, dict[str, float]], colour: Mapping[str, str]) -> None:
    cases = list(next(iter(routes.values())))
    left = [0.0] * len(cases)
    for expert, weights in routes.items():
        panel.barh(range(len(cases)), list(weights.values()), left=left, color=colour[expert], height=0.8)
        left = [start + weight for start, weight in zip(left, weights.values())]
    panel.set(xlim=(0, 1), yticks=[], xticks=[0, 0.5, 1], ylim=(len(cases) - 0.5, -0.5))
    panel.set_title("what each scan's network is made of", fontsize=9)
    panel.set_ylabel(f"{len(cases)} scans", fontsize=8.5)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.set_box_aspect(1)


def main(demo_output: str, picture: str) -> None:
    figure = Figure(figsize=(WIDTH, 6.2), layout="compressed")
    axes = figure.subplots(len(TASKS), 4)
    routes = {task: routes_of(Path(demo_output) / task) for task in TASKS}
    experts = sorted({expert for of_task in routes.values() for expert in of_task} - {"global"})
    colour = colours(experts)
    for row, (task, title) in zip(axes, TASKS.items()):
        seen = draw_cases(row[:3].tolist(), Path(demo_output) / task)
        draw_routes(row[3], routes[task], colour)
        for panel in row[:3]:
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
        row[0].set_ylabel(title, fontsize=10, fontweight="bold")
    handles = [seen[name] for name in ("reference", "routed", "global") if name in seen]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    names = {"global": "global", **{expert: f"site {plain(expert)}" for expert in experts}}
    patches = [Patch(color=colour[expert], label=name) for expert, name in names.items()]
    figure.legend(handles=patches, loc="outside lower right", ncols=len(patches), frameon=False, fontsize=9)
    Path(picture).write_bytes(png(figure, dpi=80))


if __name__ == "__main__":
    main(*sys.argv[1:])
