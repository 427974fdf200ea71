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
"""Checks of the sites' updates, and the tables of a run: the metrics of each round, and the sites that failed in it."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shared_iopfl.models.weights import Weights, all_finite, is_weight
from shared_iopfl.utils.checks import has_negative_variance
from shared_iopfl.utils.errors import InputError, root_input_error
from shared_iopfl.utils.tables import write_rows

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)
PROGRAM_FAULTS = (TypeError, AttributeError, NameError)  # programming errors end the run: no site has failed
HISTORY = ("round", "site", "model", "metric", "value")  # columns of history.csv
FAILURES, FAILED = "failures.csv", ("round", "site", "reason")  # the table of failures and its columns
UPDATE_NORM = "update_norm"  # metric in the history: the distance of an accepted update from the global model


def check_update(site: str, update: Weights, reference: Weights) -> dict[str, Tensor]:
    """Return a site's weights in the types of the global model if they can be averaged with those of other sites.

    The weights are cast before they are checked, because a number that is finite in double precision may be infinite in
    single precision.

    Args:
        site: Name of the site that sent the weights.
        update: The weights.
        reference: The weights of the global model; the update must have the same keys, kinds of numbers and shapes.

    Returns:
        The weights, in the order of the global model.

    Raises:
        InputError: If the weights differ from the global model in one of these, are not finite, or contain a negative
            variance. The message names the site and the key.
    """
    if not isinstance(update, Mapping):
        raise InputError(f"site '{site}' sent a {type(update).__name__} instead of weights by name.")
    if difference := set(update) ^ set(reference):
        key = min(difference, key=str)
        raise InputError(f"site '{site}' sent other keys than the global model: only one of them has '{key}'.")
    checked = {}
    for key, like in reference.items():
        tensor = update[key]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            kind = "sparse tensor" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"site '{site}' sent a {kind} as '{key}' instead of a dense tensor.")
        if tensor.shape != like.shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(like.shape)}"
            raise InputError(f"site '{site}' sent '{key}' of shape {shapes}, the shape in the global model.")
        # the precision may differ, since a filter may lower it; another kind of number is an error
        if tensor.is_floating_point() != like.is_floating_point() or tensor.is_complex() != like.is_complex():
            types = f"{tensor.dtype} instead of {like.dtype}"
            raise InputError(f"site '{site}' sent '{key}' of type {types}, the type in the global model.")
        cast = tensor.detach().to(like)
        if not all_finite(cast):
            raise InputError(f"site '{site}' sent NaN or infinite values in '{key}', as {like.dtype}.")
        if has_negative_variance(key, cast):
            raise InputError(f"site '{site}' sent a negative variance in '{key}'.")
        checked[key] = cast
    return checked


def far_off(
    norms: Mapping[str, float], reference: Weights, factor: float, earlier: Sequence[float] = ()
) -> dict[str, InputError]:
    """Find the sites whose update is more than `factor` times as long as usual.

    The usual length is the norm of the global model or, if that is larger, the median norm of the updates that were
    accepted in earlier rounds. This limits even a single site from its first round on. With three sites or more, the
    median norm of the other sites' updates in this round is a second limit; with two sites it could not tell which of
    them is wrong. If the other sites did not move at all, their median of 0 sets no limit.

    Args:
        norms: site -> :func:`update_norm` of the weights that :func:`check_update` has accepted.
        reference: The global weights at the start of the round.
        factor: Largest accepted multiple of the usual length; 0 accepts any length.
        earlier: Norms of the updates that were accepted in earlier rounds (see :func:`accepted_norms`).

    Returns:
        site -> error that describes its update.
    """
    if factor <= 0:
        return {}
    usual = ("the global model's own norm", update_norm(reference))
    if earlier and (of_rounds := statistics.median(earlier)) > usual[1]:
        usual = ("the median norm of earlier rounds", of_rounds)
    refused = {}
    for site, norm in norms.items():
        limits, others = [usual], [other for name, other in norms.items() if name != site]
        if len(others) > 1:
            limits.append(("the other sites' median norm", statistics.median(others)))
        for name, length in limits:
            if norm > factor * length > 0:
                refused[site] = InputError(
                    f"site '{site}' sent an update of norm {norm:.4g}, more than {factor:g} times {name}, "
                    f"{length:.4g}; if it is correct, raise max_update_norm (0: no limit)."
                )
    return refused


def update_norm(update: Weights, reference: Weights | None = None) -> float:
    """Compute the Euclidean distance between weights and a reference over all real and complex entries.

    It is computed in double precision.

    Args:
        update: The weights.
        reference: The weights to compare with; None stands for zero.

    Returns:
        The distance.
    """

    def square(key: str, tensor: Tensor) -> float:
        moved = in_double_precision(tensor)
        if reference:
            moved -= reference[key]
        return float((moved.abs() if moved.is_complex() else moved).square_().sum())

    return math.sqrt(math.fsum(square(key, tensor) for key, tensor in update.items() if is_weight(tensor)))


def in_double_precision(tensor: Tensor) -> Tensor:
    """Return a copy of a real tensor as float64, and of a complex one as complex128."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def figures(number: int, site: str, model: str, metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the rows of a run's history for the metrics of a site in one round.

    Args:
        number: Number of the round, from 1.
        site: Name of the site.
        model: "local" for the training, or the model that was scored: "global" or "personalised".
        metrics: Name of a metric -> its value.

    Returns:
        One row per metric, with the columns `HISTORY`.
    """
    row = {"round": number, "site": site, "model": model}
    return [{**row, "metric": metric, "value": float(value)} for metric, value in metrics.items()]


def last_rounds(history: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the last round in which each site's update was averaged, site -> round; other sites are left out."""
    return {row["site"]: row["round"] for row in history if row["model"] == "local" and row["metric"] != "failed"}


def accepted_norms(history: Iterable[Mapping[str, Any]]) -> list[float]:
    """Return the norms of all accepted updates; they are kept in the history, and so in checkpoints."""
    return [row["value"] for row in history if row["model"] == "local" and row["metric"] == UPDATE_NORM]


def draw(board: SummaryWriter, history: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of a history as TensorBoard events.

    Raises:
        InputError: If the events cannot be written, for example because the disk is full.
    """
    try:
        for row in history:
            board.add_scalar(f"{row['metric']}/{row['model']}_{row['site']}", float(row["value"]), int(row["round"]))
        board.flush()
    except OSError as error:
        raise InputError(f"cannot write to {board.log_dir} ({error}): free space, then resume.") from error


class Failures:
    """The sites that failed, by round, and whether enough sites are left to continue.

    Args:
        sites: Number of sites.
        min_sites: A round continues while at least this number of sites has not failed; 0 requires all sites.

    Attributes:
        rows: Round, site and reason of each failure.
        tolerated: Number of sites that may fail in a round.

    Raises:
        InputError: If `min_sites` is larger than the number of sites.
    """

    def __init__(self, sites: int, min_sites: int = 0) -> None:
        if min_sites > sites:
            raise InputError(f"min_sites must be 0 (all) to {sites}, the number of sites, but is {min_sites!r}.")
        self.sites = sites
        self.min_sites = min_sites or sites
        self.tolerated = sites - self.min_sites
        self.rows: list[dict[str, Any]] = []

    def add(self, number: int, site: str, error: Exception) -> None:
        """Record that a site failed in a round; to be called at most once per site and round.

        Args:
            number: Number of the round.
            site: Name of the site.
            error: What the site raised.

        Raises:
            Exception: The given `error`, if no site may fail or if it is a programming error.
            InputError: If too few sites are left.
        """
        if not self.tolerated or isinstance(error, PROGRAM_FAULTS):
            raise error
        known = root_input_error(error)
        reason = " ".join((str(known) if known else f"{type(error).__name__}: {error}").split())
        logger.warning("round %d continues without '%s': %s", number, site, reason, exc_info=None if known else error)
        self.rows.append({"round": number, "site": site, "reason": reason})
        failed = self.of(number)
        if (left := self.sites - len(failed)) < self.min_sites:
            reasons = "; ".join(f"'{name}': {text}" for name, text in failed.items())
            raise InputError(
                f"round {number}: {left} of {self.sites} sites are left, fewer than min_sites "
                f"{self.min_sites}; {reasons}"
            ) from None

    def of(self, number: int) -> dict[str, str]:
        """Return the sites that failed in a round, site -> reason."""
        return {row["site"]: row["reason"] for row in self.rows if row["round"] == number}

    def resume(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Continue with the failures of a checkpoint."""
        self.rows = [dict(row) for row in rows]

    def write(self, folder: Path) -> None:
        """Write ``failures.csv`` if a site has failed, or if the table of an earlier run has to be replaced."""
        path = folder / FAILURES
        if self.rows or path.exists():
            write_rows(path, FAILED, self.rows)
