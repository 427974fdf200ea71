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
"""Prediction from several views of a scan and several networks, and how far the predictions agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args

from torch import Tensor

from shared_iopfl.routing.network import RoutedNetwork
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
    """The name of a network's output, if it is one."""
    if output not in get_args(Output):
        raise InputError(f"unknown output '{output}': choose one of {', '.join(get_args(Output))}.")
    return output  # type: ignore[return-value]


class ViewsOfScans(StackInferer):
    """A `StackInferer` that predicts a scan from several views and by several networks.

    Args:
        settings: whether the views are averaged, judge the mask alone, or are not looked at; noise and intensity of
            those that adaptation draws.
        output: "softmax" for exclusive classes, "sigmoid" for overlapping targets.
        flips: spatial axes of the network input along which the anatomy may be mirrored.
        rotations: whether quarter turns fit the anatomy.
        slices, batch_size: as in `StackInferer`.
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
        """As in `StackInferer`; but where slices look at each other, the scan goes in whole."""
        together = isinstance(network, RoutedNetwork) and (self.settings.per == "volume" or network.blends)
        return [stack] if together else super()._batches(stack, network)

    def _predict(
        self, stack: Tensor, networks: Iterable[Network], judged: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Logits of a stack; of several views and networks the logarithm (or logit) of the mean probability.

        With it what the predictions' agreement says of the mask; of one alone, the areas of its targets.

        Args:
            stack: network inputs (N, C_in, *spatial).
            networks: each is asked once before the next is taken.
            judged: those of the inputs on which the views judge the mask, where they are not averaged.
        """
        views = self.views.all(is_square(stack))
        averaged = views if self.settings.views == "average" else views[:1]
        seen: list[Tensor] = []
        alike: list[Tensor] = []
        for network in networks:
            first, *others = self._seen(stack, network, averaged)
            seen += [first, *others]
            if judged is not None and self.settings.views == "judge":
                # the slices that are judged have been predicted as they are
                alike += [evenly(first, len(judged)), *self._seen(judged, network, views[1:])]
        mean = seen[0] if len(seen) == 1 else mean_prediction(seen, self.output)
        agreed: dict[str, Any] = {"areas": target_areas(mean, self.output)}
        alike = alike if len(alike) > 1 else seen
        if len(alike) > 1:
            agreed["quality"] = view_agreement(alike, mean_prediction(alike, self.output), self.output)
        return mean, agreed

    def _seen(self, stack: Tensor, network: Network, views: Sequence[View]) -> list[Tensor]:
        """What a network makes of each view, back where the pixels came from."""
        return [view.undo(self._forward(view.apply(stack), network)) for view in views]
