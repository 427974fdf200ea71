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
"""Where the routing of a scan starts: the routes, and how far the scan is from what the models were trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from shared_iopfl.routing.distances import distance_routes
from shared_iopfl.routing.settings import RoutingSettings

__all__ = ["find_start"]

States = Mapping[str, Mapping[str, Tensor]]


def find_start(
    samples: Sequence[Tensor],
    measure: Callable[[Tensor, States], Tensor],
    space: States,
    settings: RoutingSettings,
    has_statistics: bool = True,
) -> tuple[Tensor, float | None]:
    """The starting routes for a scan, or for all scans of a site, and their shift.

    Args:
        samples: slices (N, C_in, *spatial) of each scan, from :func:`~shared_iopfl.utils.stacks.scan_slices`.
        measure: slices and models (E) -> how far the slices are from each model (E,); see
            :func:`~shared_iopfl.routing.distances.scan_distances`.
        space: the routing space, name -> state_dict, the global model first.
        settings: see `RoutingSettings`.
        has_statistics: whether the network has running statistics, which a distance needs.

    Returns:
        Routes (E,); and the shift, the mean distance of the scans from the global model, which decides nothing and
        tells a reader how far a scan is from those of the federation. None where it cannot be measured, and where
        no views judge the mask: it costs a forward of the global model.
    """
    by_distance = settings.start == "distance"
    routes = torch.full((len(space),), 1 / len(space))
    if settings.start == "global":
        routes = torch.full((len(space),), 1e-3)
        routes[0] = 1 - 1e-3 * (len(space) - 1)
    if not by_distance and (settings.views == "none" or not has_statistics):
        return routes, None
    # only distance routes need a forward of every model
    measured = space if by_distance else dict([next(iter(space.items()))])
    distances = torch.stack([measure(some, measured) for some in samples]).mean(0)
    if by_distance:
        routes = distance_routes(distances, settings.temperature)
    return routes, float(distances[0])
