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
"""The server's step: the average of the sites' updates (by cases, by sites, robust), and momentum.

In FedAvg each site makes a few steps per round, and their average moves no further than one site does. Training on
pooled data makes as many steps per epoch as all sites together. Momentum at the server compensates for much of this
difference, at no cost for the sites.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from shared_iopfl.models.weights import Weights
from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.errors import InputError

Averaging = Literal["mean", "equal_mean", "median", "trimmed_mean"]
ROBUST = ("median", "trimmed_mean")
TRIMMED = 0.2  # of the sites, the share that the trimmed mean leaves out at each end


def average_updates(
    updates: Mapping[str, Weights], counts: Mapping[str, float], averaging: Averaging = "mean"
) -> dict[str, Tensor]:
    """One model of the sites' weights, entry by entry, in double precision and in the order of `updates`.

    The median and the trimmed mean (Yin et al., Byzantine-Robust Distributed Learning, ICML 2018) bound the influence
    of a minority of hostile sites on any entry. Every site has the same weight in them, because a hostile site may
    claim any number of cases. With fewer than three sites both are the plain mean.

    Integer buffers (batch-norm counters) stay integers and are the first site's.

    Args:
        updates: site -> state_dict, of equal keys, types and shapes
            (see :func:`~shared_iopfl.federation.updates.check_update`).
        counts: site -> positive number, its training cases.
        averaging: "mean": FedAvg, each site weighted by its number of cases. "equal_mean": every site has the same
            weight. "median": for an even number of sites, the mean of the two in the middle. "trimmed_mean": the mean
            without the lowest and the highest fifth of the sites, at least one each.

    Raises:
        InputError: where there is no update, numbers of cases give no weights, or the average is not finite.
    """
    if not updates:
        raise InputError("nothing to average: no site sent an update.")
    check_values({"averaging": averaging})
    total = float(sum(counts[site] for site in updates))
    if not (all(counts[site] > 0 for site in updates) and math.isfinite(total)):
        raise InputError(f"the sites' numbers of cases must be positive, but are {dict(counts)}.")
    shares = [1 / len(updates) if averaging == "equal_mean" else counts[site] / total for site in updates]
    average = {}
    for key, of_first in next(iter(updates.values())).items():
        if of_first.is_floating_point() or of_first.is_complex():
            wide = torch.complex128 if of_first.is_complex() else torch.float64
            values = [update[key].to(wide) for update in updates.values()]
            if averaging in ROBUST:
                middle = _trimmed(values, averaging)
            else:
                middle = torch.as_tensor(sum(value * share for value, share in zip(values, shares)))
            average[key] = middle.to(of_first.dtype)
        else:
            average[key] = of_first.clone()
        if not torch.isfinite(average[key]).all():
            raise InputError(f"the average of '{key}' is not finite: the sites' weights or numbers of cases are wrong.")
    return average


def _trimmed(values: Sequence[Tensor], averaging: Averaging) -> Tensor:
    count = len(values)
    most = (count - 1) // 2  # what leaves one value, or the two in the middle
    left_out = most if averaging == "median" else min(most, max(1, int(TRIMMED * count)))
    stacked = torch.stack(list(values))
    if stacked.is_complex():  # real and imaginary part, each entry on its own
        return torch.view_as_complex(_trimmed(torch.view_as_real(stacked).unbind(), averaging))
    return stacked.sort(dim=0).values[left_out : count - left_out].mean(0)


class ServerMomentum:
    r"""FedAvgM (Hsu et al. 2019, arXiv 1909.06335) in Nesterov's form.

    With w the global weights that a round began with and a the average of the sites' local ones,

    .. math:: v \leftarrow \beta \, v + (a - w), \qquad w \leftarrow a + \beta \, v

    for the network's parameters. Its buffers, such as the running statistics of batch norm, are as averaged: they
    describe a, and a step beyond it could make a variance negative.

    Args:
        momentum: beta, in [0, 1); 0 is plain FedAvg.

    Attributes:
        velocity: v, parameter name -> tensor; empty before the first round.
    """

    def __init__(self, momentum: float = 0.0) -> None:
        check_values({"server_momentum": momentum})
        self.momentum = momentum
        self.velocity: dict[str, Tensor] = {}

    def step(
        self, weights: Mapping[str, Tensor], average: Mapping[str, Tensor], parameters: Iterable[str]
    ) -> dict[str, Tensor]:
        """The next global weights.

        Args:
            weights: that the round began with.
            average: of the sites' local weights.
            parameters: names of the network's parameters among the keys; all else is taken from the average.
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
        """The state to be kept in a checkpoint."""
        return {"velocity": dict(self.velocity)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        self.velocity = dict(state["velocity"])
