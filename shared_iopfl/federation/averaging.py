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
"""The server's step of a round: the average of the sites' updates, plain or robust, and server momentum.

In FedAvg, every site takes a few steps in a round, and the average of the sites moves no further than a single site.
Training on pooled data takes as many steps in an epoch as all sites together. Server momentum compensates for much of
this difference, at no cost for the sites.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from shared_iopfl.federation.updates import in_double_precision
from shared_iopfl.models.weights import Weights, all_finite, is_weight
from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.errors import InputError

Averaging = Literal["mean", "equal_mean", "median", "trimmed_mean"]
ROBUST = ("median", "trimmed_mean")
TRIMMED = 0.2  # fraction of the sites that the trimmed mean leaves out at each end


def average_updates(
    updates: Mapping[str, Weights], counts: Mapping[str, float], averaging: Averaging = "mean"
) -> dict[str, Tensor]:
    """Average the sites' weights entry by entry, in double precision and in the order of `updates`.

    The median and the trimmed mean (Yin et al., Byzantine-Robust Distributed Learning, ICML 2018) limit the influence
    that a minority of hostile sites has on any entry. They give every site the same weight, because a hostile site may
    claim any number of cases. With fewer than three sites, both are the plain mean.

    Integer buffers, such as the counters of batch norm, are not averaged; they are copied from the first site.

    Args:
        updates: site -> state_dict. All have the same keys, types and shapes
            (see :func:`~shared_iopfl.federation.updates.check_update`).
        counts: site -> number of its training cases, which is positive.
        averaging: "mean" is FedAvg: each site is weighted by its number of cases. "equal_mean" gives every site the
            same weight. "median" is, for an even number of sites, the mean of the two values in the middle.
            "trimmed_mean" is the mean without the lowest and the highest fifth of the sites, but at least one each.

    Returns:
        The average as a state_dict with the keys, types and shapes of the updates.

    Raises:
        InputError: If there is no update, the numbers of cases give no weights, or the average is not finite.
    """
    if not updates:
        raise InputError("nothing to average: no site sent an update.")
    check_values({"averaging": averaging})
    total = float(sum(counts[site] for site in updates))
    if not (all(counts[site] > 0 for site in updates) and math.isfinite(total)):
        raise InputError(f"the sites' numbers of cases must be positive, but are {dict(counts)}.")
    shares = [1 / len(updates) if averaging == "equal_mean" else counts[site] / total for site in updates]
    average = {}
    for key, first in next(iter(updates.values())).items():
        if not is_weight(first):
            average[key] = first.clone()
            continue
        values = (in_double_precision(update[key]) for update in updates.values())
        if averaging in ROBUST:
            middle = _trimmed(list(values), averaging)
        else:  # in place, because new memory takes longer than the sum
            middle = reduce(Tensor.add_, (value.mul_(share) for value, share in zip(values, shares)))
        average[key] = middle.to(first.dtype)
        if not all_finite(average[key]):
            raise InputError(f"the average of '{key}' is not finite: the sites' weights or numbers of cases are wrong.")
    return average


def _trimmed(values: Sequence[Tensor], averaging: Averaging) -> Tensor:
    count = len(values)
    most = (count - 1) // 2  # leaves one value, or the two in the middle
    left_out = most if averaging == "median" else min(most, max(1, int(TRIMMED * count)))
    stacked = torch.stack(list(values))
    if stacked.is_complex():  # the real and the imaginary part are trimmed independently
        return torch.view_as_complex(_trimmed(torch.view_as_real(stacked).unbind(), averaging))
    return stacked.sort(dim=0).values[left_out : count - left_out].mean(0)


class ServerMomentum:
    r"""FedAvgM (Hsu et al. 2019, arXiv 1909.06335) in Nesterov's form.

    Let w be the global weights at the start of a round, and a the average of the sites' local weights. Then

    .. math:: v \leftarrow \beta \, v + (a - w), \qquad w \leftarrow a + \beta \, v

    for the parameters of the network. Its buffers, such as the running statistics of batch norm, are taken from the
    average: they describe a, and a step beyond it could make a variance negative.

    Args:
        momentum: The factor beta in [0, 1); 0 is plain FedAvg.

    Attributes:
        velocity: The vector v, parameter name -> tensor; empty before the first round.

    Raises:
        InputError: If the momentum is out of range.
    """

    def __init__(self, momentum: float = 0.0) -> None:
        check_values({"server_momentum": momentum})
        self.momentum = momentum
        self.velocity: dict[str, Tensor] = {}

    def step(
        self, weights: Mapping[str, Tensor], average: Mapping[str, Tensor], parameters: Iterable[str]
    ) -> dict[str, Tensor]:
        """Compute the global weights of the next round.

        Args:
            weights: The global weights at the start of the round.
            average: The average of the sites' local weights.
            parameters: The keys that are parameters of the network; all others are taken from the average.

        Returns:
            The new global weights.
        """
        following = dict(average)
        if not self.momentum:
            return following
        for name in parameters:
            moved = average[name] - weights[name].to(average[name])
            if name in self.velocity:
                moved = self.momentum * self.velocity[name] + moved
            self.velocity[name] = moved
            following[name] = average[name] + self.momentum * moved
        return following

    def state_dict(self) -> dict[str, Any]:
        """Return the state to keep in a checkpoint."""
        return {"velocity": dict(self.velocity)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        self.velocity = dict(state["velocity"])
