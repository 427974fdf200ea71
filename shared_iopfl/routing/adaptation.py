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
"""Adaptation of a routed network to a scan by gradient steps, and the check that accepts or rejects its result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared_iopfl.routing.network import RoutedNetwork
from shared_iopfl.routing.objectives import Output, RoutingObjective, View, ViewSampler, is_square
from shared_iopfl.routing.settings import RoutingSettings
from shared_iopfl.utils.stacks import bounded

# a function of the network, images (N, C_in, *spatial) and a view; its value is a scalar with gradient
Objective = Callable[[Callable[[Tensor], Tensor], Tensor, View], Tensor]
STEP_PIXELS = 2**18  # the largest number of pixels in one backward pass: 16 slices of 128 x 128, one of 384 x 384


@dataclass
class Adaptation:
    """Optimiser steps on the routes, the routers and the shifts of the norm layers.

    Args:
        settings: Number of steps, learning rate, and the weights of the objective's terms.
        views: Sampler that the views are drawn from.
        output: Kind of the network's output.
        batch_size: Number of network inputs in each step.
        seed: Seed of the views and of dropout.
        objective: Objective of the steps, which replaces the `RoutingObjective` of the settings: a function of the
            network, the images (N, C_in, *spatial) and a view, whose value is a scalar with gradient.
    """

    settings: RoutingSettings
    views: ViewSampler
    output: Output
    batch_size: int
    seed: int
    objective: Objective | None = None

    def adapt(self, routed: RoutedNetwork, images: Tensor) -> None:
        """Take the steps.

        Args:
            routed: Network to adapt, which is changed in place.
            images: Network inputs (N, C_in, *spatial) of the scan.
        """
        objective, generator = self._objective(), torch.Generator().manual_seed(self.seed)
        routed.set_dropout(generator)
        # With one set of routes per layer, the slices affect each other only through batch statistics. These are kept
        # from a first forward over all slices, so that a step needs the memory of only a few of them.
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

    def value(self, routed: RoutedNetwork, batches: Sequence[Tensor]) -> float:
        """Evaluate the objective on two views that depend on the seed alone.

        Args:
            routed: Network before or after the steps.
            batches: Network inputs, in batches (B, C_in, *spatial).

        Returns:
            The mean of the objective over views and inputs.
        """
        objective, generator = self._objective(), torch.Generator().manual_seed(self.seed + 1)
        views = [self.views.draw(generator, is_square(batches[0])) for _ in range(2)]
        values = [objective(routed, batch, view) * len(batch) for view in views for batch in batches]
        return sum(torch.stack(values).tolist()) / (len(views) * sum(map(len, batches)))

    def guarded(
        self,
        routed: RoutedNetwork,
        images: Tensor,
        batches: Sequence[Tensor],
        start: Tensor,
        predict: Callable[[], tuple[Tensor, dict[str, Any]]],
    ) -> tuple[Tensor, dict[str, Any]]:
        """Take the steps, and reset the network if the result is rejected.

        The result is accepted if it is finite, the objective improved, and the mask has at least the Dice
        ``settings.agreement`` with that at the start.

        Args:
            routed: Network to adapt, which is changed in place.
            images: Network inputs (N, C_in, *spatial) of the scan.
            batches: The same inputs, in batches that a forward without gradient can take.
            start: Logits at the starting routes.
            predict: Function that returns the logits at the current routes, of the shape of `start`, and a report.

        Returns:
            The logits after adaptation, or those at the start if the result is rejected; and a report with
            ``objective_start``, ``objective_end``, ``agreement`` and ``reason``, and if the result is accepted also
            ``decision``, ``routes`` and the report of `predict`.
        """
        before = self.value(routed, batches)
        self.adapt(routed, images)
        after = self.value(routed, batches)
        logits, predicted = predict()
        agreement = mask_agreement(start, logits, self.output)
        report = {"objective_start": before, "objective_end": after, "agreement": agreement}
        objection = ""
        if not (torch.isfinite(logits).all() and math.isfinite(after)):
            objection = "adaptation became non-finite"
        elif after >= before:
            objection = "adaptation did not improve its objective"
        elif agreement < self.settings.agreement:
            objection = f"the adapted mask differs too much from the start (Dice {agreement:.3f})"
        if objection:
            routed.reset()
            return start, {**report, "reason": objection}
        accepted = {"decision": "adapted", "reason": "objective improved", "routes": routed.last_routes().tolist()}
        return logits, {**report, **predicted, **accepted}

    def _objective(self) -> Objective:
        if self.objective is not None:
            return self.objective
        terms = self.settings.objective
        return RoutingObjective(self.output, terms.consistency, terms.entropy, terms.shape, terms.window)


def descend(
    routed: RoutedNetwork,
    images: Tensor,
    backward: Callable[[Tensor], None],
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Optimise all parameters that a routed network can learn from a scan, by Adam.

    Args:
        routed: Network to optimise, which is changed in place.
        images: Network inputs (N, C_in, *spatial); each step uses the next batch of them.
        backward: Function that adds the gradient of the objective on a batch (B, C_in, *spatial).
        steps: Number of steps.
        batch_size: Number of network inputs in each step.
        learning_rate: Learning rate of Adam.
    """
    optimizer = torch.optim.Adam(routed.trainable(), lr=learning_rate)
    # in full precision, because half-precision gradients of a mean over a volume vanish
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        for step in range(steps):
            # `roll` makes a copy, because autograd does not accept inference tensors
            batch = images.roll(-(step * batch_size % len(images)), 0)[:batch_size]
            optimizer.zero_grad(set_to_none=True)
            backward(batch)
            optimizer.step()


def _terms(objective: Objective, routed: RoutedNetwork, images: Tensor, view: View) -> Iterable[Tensor]:
    """The terms of a `RoutingObjective`, one at a time because each needs the memory of a forward; else the whole."""
    if isinstance(objective, RoutingObjective):
        return objective.terms(routed, images, view)
    return (objective(routed, images, view),)


def mask_agreement(one: Tensor, other: Tensor, output: Output) -> float:
    """Compute the Dice of two masks, in which all targets are joined.

    Args:
        one: Logits (N, C, *spatial) of the first mask.
        other: Logits (N, C, *spatial) of the second mask.
        output: Kind of the network's output.

    Returns:
        The Dice, in [0, 1]; 1 if both masks are empty.
    """
    first, second = (logits.argmax(1) > 0 if output == "softmax" else logits > 0 for logits in (one, other))
    total, shared = torch.stack([first.sum() + second.sum(), (first & second).sum()]).tolist()
    return 2 * shared / total if total else 1.0
