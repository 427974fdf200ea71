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
"""Adaptation of a routed network to a scan by gradient steps, and when its result is rejected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from shared_iopfl.routing.network import RoutedNetwork
from shared_iopfl.routing.objectives import Output, RoutingObjective, View, ViewSampler, foreground, is_square
from shared_iopfl.routing.settings import RoutingSettings
from shared_iopfl.utils.stacks import bounded

# of the network, images (N, C_in, *spatial) and a view: a scalar with gradient
Objective = Callable[[Callable[[Tensor], Tensor], Tensor, View], Tensor]
STEP_PIXELS = 2**18  # a backward: 16 slices of 128 x 128, one of 384 x 384


@dataclass
class Adaptation:
    """Optimiser steps on routes, routers and norm shifts.

    Args:
        settings: steps, learning rate, and the weights of the objective's terms.
        views: what the views are drawn from.
        output: of the network.
        batch_size: network inputs a step.
        seed: of views and dropout.
        objective: of the steps, in place of the `RoutingObjective` of the settings: a function of the network, the
            images (N, C_in, *spatial) and a view, whose value is a scalar with gradient.
    """

    settings: RoutingSettings
    views: ViewSampler
    output: Output
    batch_size: int
    seed: int
    objective: Objective | None = None

    def adapt(self, routed: RoutedNetwork, images: Tensor) -> None:
        """Take the steps on some network inputs (N, C_in, *spatial) of a scan; `routed` is changed."""
        objective, generator = self._objective(), torch.Generator().manual_seed(self.seed)
        routed.set_dropout(generator)
        # With routes a layer, slices meet in the statistics alone. Those of the scan at the start are kept, so
        # that a step needs the memory of a few slices, not of all.
        apart = self.settings.per == "layer"
        if apart and routed.blends:
            routed(images)
            routed.freeze_statistics(True)

        def backward(batch: Tensor) -> None:
            view = self.views.draw(generator, is_square(batch))
            for part in batch.split(bounded(len(batch), batch, STEP_PIXELS) if apart else len(batch)):
                for term in _terms(objective, routed, part, view):
                    (term * (len(part) / len(batch))).backward()

        try:
            descend(routed, images, backward, self.settings.steps, self.batch_size, self.settings.learning_rate)
        finally:
            routed.freeze_statistics(False)
            routed.set_dropout(None)

    def value(self, routed: RoutedNetwork, batches: Iterable[Tensor]) -> float:
        """The objective over fixed views, drawn from the seed: the same before and after the steps."""
        batches = list(batches)
        objective, generator = self._objective(), torch.Generator().manual_seed(self.seed + 1)
        views = [self.views.draw(generator, is_square(batches[0])) for _ in range(2)]
        values = [objective(routed, batch, view) * len(batch) for view in views for batch in batches]
        return sum(torch.stack(values).tolist()) / (len(views) * sum(map(len, batches)))

    def _objective(self) -> Objective:
        if self.objective is not None:
            return self.objective
        terms = self.settings.objective
        return RoutingObjective(self.output, terms.consistency, terms.entropy, terms.shape, terms.window, self.views)


def descend(
    routed: RoutedNetwork,
    images: Tensor,
    backward: Callable[[Tensor], None],
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Steps of Adam on all that a routed network can learn from a scan.

    Args:
        routed: is changed.
        images: network inputs (N, C_in, *spatial), of which each step takes the next batch.
        backward: adds the gradient of the objective on a batch.
        steps: how many.
        batch_size: network inputs a step.
        learning_rate: of Adam.
    """
    optimizer = torch.optim.Adam(routed.trainable(), lr=learning_rate)
    # full precision: half-precision gradients of a mean over a volume vanish
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        for step in range(steps):
            # rolled, hence copied: an inference tensor could take no part in adaptation
            batch = images.roll(-(step * batch_size % len(images)), 0)[:batch_size]
            optimizer.zero_grad(set_to_none=True)
            backward(batch)
            optimizer.step()


def _terms(objective: Objective, routed: RoutedNetwork, images: Tensor, view: View) -> Iterable[Tensor]:
    """The summands of an objective, one at a time where it has them: each needs the memory of one forward."""
    if isinstance(objective, RoutingObjective):
        return objective.terms(routed, images, view)
    return (objective(routed, images, view),)


def mask_agreement(one: Tensor, other: Tensor, output: Output) -> float:
    """Dice of the masks of two logits (N, C, *spatial) over all targets; 1 where both are empty."""
    masks = []
    for logits in (one, other):
        masks.append(logits.argmax(1) > 0 if output == "softmax" else foreground(logits, output) > 0)
    total, shared = torch.stack([masks[0].sum() + masks[1].sum(), (masks[0] & masks[1]).sum()]).tolist()
    return 2 * shared / total if total else 1.0


def objection_to(
    logits: Tensor, before: float, after: float, agreement: float, settings: RoutingSettings
) -> str | None:
    """Why the mask after adaptation is not served; None where it is.

    Args:
        logits: after adaptation (N, C, *spatial).
        before, after: the objective at the start and after the steps.
        agreement: Dice of the masks at the start and after the steps.
        settings: ``settings.agreement`` is the least that is accepted.
    """
    if not (torch.isfinite(logits).all() and math.isfinite(after)):
        return "adaptation became non-finite"
    if after >= before:
        return "adaptation did not improve its objective"
    if agreement < settings.agreement:
        return f"adapted mask strays from the start (Dice {agreement:.3f})"
    return None
