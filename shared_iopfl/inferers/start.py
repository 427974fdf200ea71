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
"""The start of the routing of a scan: the routed network, the starting routes, and the shift of the scan."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from shared_iopfl.models.weights import Weights, equal_weights
from shared_iopfl.routing.distances import distance_routes
from shared_iopfl.routing.network import RoutedNetwork, route
from shared_iopfl.routing.settings import RoutingSettings

States = Mapping[str, Weights]


class BriefWeights(dict[str, Tensor]):
    """A state_dict with a short `repr`, because MONAI Label logs the attributes of an inferer at every request."""

    def __repr__(self) -> str:
        return f"{len(self)} tensors"


class RoutedCopy:
    """The routed copy of a network, which is built and checked again only if the weights of the network change.

    Args:
        settings: Settings of the routing.
        seed: Seed of the routers.
    """

    def __init__(self, settings: RoutingSettings, seed: int) -> None:
        self.settings = settings
        self.seed = seed
        self._built: tuple[weakref.ref[nn.Module], dict[str, Tensor], RoutedNetwork] | None = None

    def of(self, network: nn.Module, space: States, sample: Tensor | None = None) -> RoutedNetwork:
        """Return the routed copy of a network.

        Args:
            network: Network to route.
            space: Routing space, name -> state_dict.
            sample: Network input for the check of a new copy, as in `route`.
        """
        state = network.state_dict()
        # compared by value, which is fast in comparison with a scan and detects every kind of change
        if self._built is not None and self._built[0]() is network and equal_weights(self._built[1], state):
            return self._built[2]
        settings = self.settings
        routed = route(
            network,
            space,
            per=settings.per,
            activation=settings.activation,
            random=settings.start == "random",
            route_norms=settings.route_norms,
            affine=settings.affine,
            seed=self.seed,
            sample=sample,
        )
        kept = BriefWeights((key, tensor.clone()) for key, tensor in state.items())
        self._built = (weakref.ref(network), kept, routed)
        return routed


def expert_of(network: object, experts: States) -> str | None:
    """Find the expert, among several, that has the weights of a network; return None if there is no such expert."""
    if not isinstance(network, nn.Module) or len(experts) < 2:
        return None
    state = network.state_dict()
    for name, expert in experts.items():
        # on the CPU, as experts may be on another device; different networks differ in the first tensor already
        if state.keys() == expert.keys() and all(torch.equal(state[key].cpu(), expert[key].cpu()) for key in state):
            return name
    return None


def find_start(
    samples: Sequence[Tensor],
    measure: Callable[[Tensor, States], Tensor],
    space: States,
    settings: RoutingSettings,
    has_statistics: bool,
) -> tuple[Tensor, float | None]:
    """Find the starting routes for a scan, or for all scans of a site, and their shift.

    Args:
        samples: Slices (N, C_in, *spatial) of each scan, from :func:`~shared_iopfl.utils.stacks.scan_slices`.
        measure: Function of slices and models that returns the distance from each model (E,); see
            :func:`~shared_iopfl.routing.distances.scan_distances`.
        space: Routing space, name -> state_dict, with the global model first.
        settings: Settings of the routing.
        has_statistics: Whether the network has running statistics, without which there is no distance.

    Returns:
        Routes (E,), and the shift: the mean distance of the scans from the global model. The shift is None if it
        cannot be measured, or if no views judge the mask, because it takes a forward of the global model.
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
