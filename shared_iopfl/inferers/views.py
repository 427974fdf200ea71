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
"""Prediction of a scan from several views and by several networks, and the agreement of the predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from torch import Tensor, nn

from shared_iopfl.routing.network import RoutedNetwork, collapse
from shared_iopfl.routing.objectives import (
    Output,
    View,
    ViewSampler,
    is_square,
    mean_prediction,
    target_areas,
    view_agreement,
)
from shared_iopfl.routing.settings import RoutingSettings
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.stacks import Network, StackInferer, evenly


def check_output(output: str) -> Output:
    """Return the kind of a network's output, or raise `InputError` if there is no such kind."""
    if output not in get_args(Output):
        raise InputError(f"unknown output '{output}': choose one of {', '.join(get_args(Output))}.")
    return output  # type: ignore[return-value]


class ViewsOfScans(StackInferer):
    """A `StackInferer` that predicts a scan from several views and by several networks.

    Args:
        settings: Settings of the routing: use of the views, and noise and intensity of those that adaptation draws.
        output: "softmax" for exclusive classes, "sigmoid" for overlapping targets.
        flips: Spatial axes of the network input along which the anatomy may be mirrored.
        rotations: Whether quarter turns fit the anatomy.
        slices: Neighbouring slices per network input, as in `StackInferer`.
        batch_size: Network inputs per forward, as in `StackInferer`.
    """

    def __init__(
        self,
        settings: RoutingSettings,
        output: Output,
        flips: Sequence[int],
        rotations: bool,
        slices: int | None,
        batch_size: int,
    ) -> None:
        super().__init__(slices, batch_size)
        self.settings = settings
        self.output = check_output(output)
        self.views = ViewSampler(tuple(flips), rotations, settings.objective.noise, settings.objective.intensity)

    def _batches(self, stack: Tensor, network: Network) -> Iterable[Tensor]:
        """The batches of `StackInferer`; or the whole stack, if the prediction of a slice depends on the others."""
        together = isinstance(network, RoutedNetwork) and (self.settings.per == "volume" or network.blends)
        return [stack] if together else super()._batches(stack, network)

    def _networks(self, routed: RoutedNetwork, some: Tensor, shares: Sequence[float]) -> Iterator[nn.Module]:
        """The network for each share of the scan's statistics; each has to be used before the next is requested.

        Args:
            routed: Routed network at its current routes.
            some: Slices (N, C_in, *spatial) that the statistics are measured on.
            shares: Shares of the scan's own statistics.
        """
        for share in shares:
            routed.set_statistics(share)
            yield self._plain_for(routed, some)

    def _plain_for(self, routed: RoutedNetwork, some: Tensor) -> nn.Module:
        """The plain network that a routed one collapses to; the routed one itself if routes differ between slices."""
        if self.settings.per != "layer":
            return routed
        if routed.blends:
            routed(some)
        return collapse(routed).eval()

    def _predict(
        self, stack: Tensor, networks: Iterable[Network], judged: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Predict a stack, averaged over views and networks.

        Args:
            stack: Network inputs (N, C_in, *spatial).
            networks: Networks, each of which is used before the next is requested.
            judged: Those of the inputs on which the views judge the mask, if they are not averaged.

        Returns:
            Logits (N, C, *spatial), and a report: ``areas`` and, for several predictions, ``quality``.
        """
        views = self.views.all(is_square(stack))
        averaged = views if self.settings.views == "average" else views[:1]
        predictions: list[Tensor] = []
        compared: list[Tensor] = []
        for network in networks:
            found = self._of_views(stack, network, averaged)
            predictions += found
            if judged is not None and self.settings.views == "judge":
                # these slices have already been predicted as they are
                compared += [evenly(found[0], len(judged)), *self._of_views(judged, network, views[1:])]
        mean = predictions[0] if len(predictions) == 1 else mean_prediction(predictions, self.output)
        report: dict[str, Any] = {"areas": target_areas(mean, self.output)}
        compared = compared if len(compared) > 1 else predictions
        if len(compared) > 1:
            report["quality"] = view_agreement(compared, mean_prediction(compared, self.output), self.output)
        return mean, report

    def _of_views(self, stack: Tensor, network: Network, views: Sequence[View]) -> list[Tensor]:
        """The prediction from each view, transformed back."""
        return [view.undo(self._forward(view.apply(stack), network)) for view in views]
