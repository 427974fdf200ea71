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
"""Where the routing of a scan starts: the routes, and the share of the scan's own batch-norm statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shared_iopfl.routing.distances import distance_routes
from shared_iopfl.routing.settings import RoutingSettings

__all__ = ["Start", "find_start", "start_routes"]


@dataclass
class Start:
    """Where routing starts.

    Attributes:
        routes: (E,), the share of each expert.
        statistics: the share of the scan's own batch-norm statistics, in [0, 1].
        measured: for the report: the ``shift`` of the scan, and ``opening``, how much of the rules it switched on.
    """

    routes: Tensor
    statistics: float
    measured: dict[str, float] = field(default_factory=dict)


def find_start(
    samples: Sequence[Tensor],
    measure: Callable[[Tensor], Tensor],
    experts: Sequence[str],
    settings: RoutingSettings,
    scores: Mapping[str, float],
    usual_shift: float,
    has_statistics: bool = True,
) -> Start:
    """The start for a scan, or for all scans of a site.

    The shift is the distance of the scans' features from what the global model's batch norms remember. Up to the shift
    that is usual at the inside sites, distances and the scans' own statistics count nothing; beyond it they count
    ``1 - usual_shift / shift``.

    Args:
        samples: slices (N, C_in, *spatial) of each scan, from :func:`~shared_iopfl.utils.stacks.scan_slices`.
        measure: slices -> how far they are from each expert (E,); see
            :func:`~shared_iopfl.routing.distances.scan_distances`.
        experts: their names, the global model first.
        settings: see `RoutingSettings`.
        scores: the experts' published Dice, name -> [0, 1]; may be empty.
        usual_shift: at the inside sites; 0: distances and statistics count in full.
        has_statistics: whether the network has running statistics, which a distance and a blend need.
    """
    by_distance = settings.start == "distance"
    by_shift = usual_shift > 0 and (by_distance or (settings.statistics > 0 and has_statistics))
    distances = torch.zeros(len(experts))
    if by_distance or by_shift:
        distances = torch.stack([measure(some) for some in samples]).mean(0)
    routes = start_routes(distances, experts, settings, scores)
    # a volume that a 3D network takes whole counts by its slices, as one that goes in slice by slice
    count = sum(len(some) * (some.shape[-1] if some.ndim == 5 else 1) for some in samples)
    statistics = settings.statistics * count / (count + settings.prior) if has_statistics else 0.0
    if not by_shift:
        return Start(routes, statistics)
    shift = float(distances[0])
    opening = max(0.0, 1 - usual_shift / shift) if shift > 0 else 0.0
    if by_distance:
        without = start_routes(torch.zeros_like(distances), experts, settings, scores)
        routes = torch.lerp(without, routes, opening)
    return Start(routes, statistics * opening, {"shift": round(shift, 4), "opening": round(opening, 4)})


def start_routes(
    distances: Tensor, experts: Sequence[str], settings: RoutingSettings, scores: Mapping[str, float]
) -> Tensor:
    """The starting routes (E,) by ``settings.start``: by distance, the global model alone, or uniform."""
    if settings.start == "distance":
        trusted = None
        if scores and settings.trust:
            # an expert that came without a score is trusted no more than the worst that has one
            trusted = [scores.get(name, min(scores.values())) for name in experts]
        return distance_routes(distances, settings.temperature, trusted, settings.trust)
    if settings.start == "global":
        routes = torch.full((len(experts),), 1e-3)
        routes[0] = 1 - 1e-3 * (len(experts) - 1)
        return routes
    return torch.full((len(experts),), 1 / len(experts))
