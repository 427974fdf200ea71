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
"""What the sites send: whether it can be let in, the mean of it, and who failed to deliver."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared_iopfl.errors import InputError, root_input_error
from shared_iopfl.tables import write_rows

__all__ = ["Failures", "check_update", "far_off", "weighted_average"]

logger = logging.getLogger(__name__)
Weights = Mapping[str, Tensor]


def check_update(site: str, update: Weights, reference: Weights, whose: str = "the global model") -> None:
    """Raise `InputError`, naming site and key, unless its weights are finite and of the reference's kind and shape."""
    if difference := set(update) ^ set(reference):
        key = min(difference, key=str)
        raise InputError(f"site '{site}' sent other keys than {whose}: '{key}' is in one of them only.")
    for key, tensor in update.items():
        like = reference[key]
        if not isinstance(tensor, Tensor):
            raise InputError(f"site '{site}' sent a {type(tensor).__name__} as '{key}', not a tensor as {whose}.")
        if tensor.shape != like.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(like.shape)} as {whose}"
            raise InputError(f"site '{site}' sent '{key}' of shape {shapes}.")
        # precision may differ, as a filter on the way may lower it; a complex or an integer weight is a mistake
        if tensor.is_floating_point() != like.is_floating_point() or tensor.is_complex() != like.is_complex():
            raise InputError(f"site '{site}' sent '{key}' of type {tensor.dtype}, not {like.dtype} as {whose}.")
        if not torch.isfinite(tensor).all():
            raise InputError(f"site '{site}' sent NaN or infinite values in '{key}'.")


def far_off(updates: Mapping[str, Weights], reference: Weights, factor: float) -> dict[str, InputError]:
    """Which sites moved the global model more than `factor` times as far as the others' median did.

    The norm is Euclidean, of all floating-point entries, in double precision. Two sites cannot say which of them is
    off, so it takes three; and sites that all stood still are no measure for one that moved.

    Args:
        updates: site -> weights, checked (see :func:`check_update`).
        reference: the global weights that the round began with.
        factor: how many times as far is too far; 0: any distance is let in.

    Returns:
        site -> what is wrong with it.
    """
    if factor <= 0 or len(updates) < 3:
        return {}
    norms = {site: _distance(update, reference) for site, update in updates.items()}
    refused = {}
    for site, norm in norms.items():
        median = statistics.median(other for name, other in norms.items() if name != site)
        if norm > factor * median > 0:
            refused[site] = InputError(
                f"site '{site}' sent an update of norm {norm:.4g}, more than {factor:g} times the others' median "
                f"{median:.4g}; if it is as it should be, raise max_update_norm (0: no bound)."
            )
    return refused


def _distance(update: Weights, reference: Weights) -> float:
    squares = (
        float((update[key].double() - like.double()).square().sum())
        for key, like in reference.items()
        if like.is_floating_point()
    )
    return math.sqrt(math.fsum(squares))


def weighted_average(updates: Mapping[str, Weights], counts: Mapping[str, float]) -> dict[str, Tensor]:
    """FedAvg: the mean of the sites' weights, each weighed by its number of training cases.

    Summed in double precision in the order of `updates`; integer buffers (batch-norm counters) stay integers and are
    the first site's.

    Args:
        updates: site -> state_dict.
        counts: site -> positive number.

    Raises:
        InputError: naming the site whose update differs from the first one's in keys or shapes, or is not finite.
    """
    if not updates:
        raise InputError("nothing to average: no site sent an update.")
    total = float(sum(counts[site] for site in updates))
    if not all(counts[site] > 0 for site in updates):
        raise InputError(f"the sites' numbers of cases must be positive, but are {dict(counts)}.")
    first, reference = next(iter(updates.items()))
    for site, update in updates.items():
        check_update(site, update, reference, f"'{first}'")
    average = {}
    for key, like in reference.items():
        if like.is_floating_point():
            mean = sum(update[key].double() * (counts[site] / total) for site, update in updates.items())
            average[key] = torch.as_tensor(mean).to(like.dtype)
        else:
            average[key] = like.clone()
    return average


class Failures:
    """The sites that failed, round by round, and whether enough are left to go on.

    Args:
        sites: how many there are.
        min_sites: a round goes on while at least so many have not failed; 0: it takes all.

    Attributes:
        rows: round, site and reason of each failure.
    """

    def __init__(self, sites: int, min_sites: int = 0) -> None:
        if not isinstance(min_sites, int) or not 0 <= min_sites <= sites:
            raise InputError(f"min_sites must be 0 (all) to {sites}, the sites, but is {min_sites!r}.")
        self.sites = sites
        self.min_sites = min_sites or sites
        self.rows: list[dict[str, Any]] = []

    def add(self, number: int, site: str, error: Exception) -> None:
        """Note that a site failed round `number`; at most once a round.

        Raises:
            Exception: the site's own `error`, where all sites have to deliver.
            InputError: where too few are left.
        """
        if self.min_sites == self.sites:
            raise error
        known = root_input_error(error)
        reason = " ".join((str(known) if known else f"{type(error).__name__}: {error}").split())
        logger.warning("round %d goes on without '%s': %s", number, site, reason, exc_info=None if known else error)
        self.rows.append({"round": number, "site": site, "reason": reason})
        failed = self.of(number)
        if (left := self.sites - len(failed)) < self.min_sites:
            reasons = "; ".join(f"'{name}': {text}" for name, text in failed.items())
            raise InputError(
                f"round {number}: {left} of {self.sites} sites are left, fewer than min_sites "
                f"{self.min_sites}; {reasons}"
            ) from None

    def of(self, number: int) -> dict[str, str]:
        """The sites that failed a round, site -> reason."""
        return {row["site"]: row["reason"] for row in self.rows if row["round"] == number}

    def resume(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.rows = [dict(row) for row in rows]

    def write(self, path: Path) -> None:
        """Write the table, once there is a failure; what lies there from an earlier run does not stay."""
        if self.rows or path.exists():
            write_rows(path, ("round", "site", "reason"), self.rows)
