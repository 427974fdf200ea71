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
"""Checks of the sites' updates, and the tables of a run: figures of each round, and the sites that failed it."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shared_iopfl.models.weights import Weights, is_weight
from shared_iopfl.utils.checks import has_negative_variance
from shared_iopfl.utils.errors import InputError, root_input_error
from shared_iopfl.utils.tables import write_rows

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)
PROGRAM_FAULTS = (TypeError, AttributeError, NameError)  # errors of the code end the run; they are not a site's
HISTORY = ("round", "site", "model", "metric", "value")  # columns of history.csv
FAILURES, FAILED = "failures.csv", ("round", "site", "reason")  # the file and its columns
UPDATE_NORM = "update_norm"  # in the history: how far an accepted update moved the global model


def check_update(site: str, update: Weights, reference: Weights) -> dict[str, Tensor]:
    """A site's weights in the types of the global model, if they can be averaged with those of the others.

    They are cast before they are checked: a number that is finite in double precision may be infinite in single.

    Args:
        site: name of the sender.
        update: the weights.
        reference: the global model, which they must be like in keys, kinds and shapes.

    Raises:
        InputError: naming site and key, where they differ from it, are not finite, or hold a negative variance.
    """
    if not isinstance(update, Mapping):
        raise InputError(f"site '{site}' sent a {type(update).__name__}, not weights by name.")
    if difference := set(update) ^ set(reference):
        key = min(difference, key=str)
        raise InputError(f"site '{site}' sent other keys than the global model: '{key}' is in one of them only.")
    checked = {}
    for key, like in reference.items():
        tensor = update[key]
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            kind = type(tensor).__name__ if not isinstance(tensor, Tensor) else "sparse tensor"
            raise InputError(f"site '{site}' sent a {kind} as '{key}', not a plain tensor as the global model.")
        if tensor.shape != like.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(like.shape)} as the global model"
            raise InputError(f"site '{site}' sent '{key}' of shape {shapes}.")
        # precision may differ, as a filter on the way may lower it; a complex or an integer weight is a mistake
        if tensor.is_floating_point() != like.is_floating_point() or tensor.is_complex() != like.is_complex():
            raise InputError(
                f"site '{site}' sent '{key}' of type {tensor.dtype}, not {like.dtype} as the global model."
            )
        cast = tensor.detach().to(like)
        if not torch.isfinite(cast).all():
            raise InputError(f"site '{site}' sent NaN or infinite values in '{key}', as {like.dtype}.")
        if has_negative_variance(key, cast):
            raise InputError(f"site '{site}' sent a negative variance in '{key}'.")
        checked[key] = cast
    return checked


def far_off(
    updates: Mapping[str, Weights], reference: Weights, factor: float, earlier: Sequence[float] = ()
) -> dict[str, InputError]:
    """The sites whose update is more than `factor` times as long as usual.

    The usual length is the norm of the global model or, if larger, the median of the accepted updates of earlier
    rounds; so a single site is bounded as well, from its first round on. With three sites or more, the median of the
    other updates of the round is a second bound; with two sites it could not tell which of them is wrong. A bound of 0,
    when the other sites did not move at all, is ignored.

    The norm is Euclidean, of all floating-point entries, in double precision.

    Args:
        updates: site -> weights, checked (see :func:`check_update`).
        reference: the global weights that the round began with.
        factor: largest accepted multiple of the usual length; 0: any length is accepted.
        earlier: norms of the updates that were accepted in earlier rounds (see :func:`accepted_norms`).

    Returns:
        site -> the error that describes its update.
    """
    if factor <= 0:
        return {}
    norms = {site: update_norm(update, reference) for site, update in updates.items()}
    of_model, of_rounds = update_norm(reference), statistics.median(earlier) if earlier else 0.0
    usual = (
        {"the median of earlier rounds'": of_rounds} if of_rounds > of_model else {"the global model's own": of_model}
    )
    refused = {}
    for site, norm in norms.items():
        others = [other for name, other in norms.items() if name != site]
        measures = {**usual, **({"the others' median": statistics.median(others)} if len(others) > 1 else {})}
        for name, length in measures.items():
            if norm > factor * length > 0:
                refused[site] = InputError(
                    f"site '{site}' sent an update of norm {norm:.4g}, more than {factor:g} times {name} {length:.4g}; "
                    "if it is as it should be, raise max_update_norm (0: no bound)."
                )
    return refused


def update_norm(update: Weights, reference: Weights | None = None) -> float:
    """The Euclidean distance of weights from a reference (None: zero), over all real and complex entries."""
    squares = (
        float((_wide(tensor) - (_wide(reference[key]) if reference is not None else 0)).abs().square().sum())
        for key, tensor in update.items()
        if is_weight(tensor)
    )
    return math.sqrt(math.fsum(squares))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def figures(number: int, site: str, model: str, metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Rows of a run's history: a site's figures of round `number`; `model` is "local", "global" or "personalised"."""
    row = {"round": number, "site": site, "model": model}
    return [{**row, "metric": metric, "value": float(value)} for metric, value in metrics.items()]


def last_rounds(history: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The last round in which a site's update was averaged, site -> round; of sites that have delivered one."""
    return {row["site"]: row["round"] for row in history if row["model"] == "local" and row["metric"] != "failed"}


def draw(board: SummaryWriter, history: Iterable[Mapping[str, Any]]) -> None:
    """TensorBoard events of rows of a history."""
    for row in history:
        board.add_scalar(f"{row['metric']}/{row['model']}_{row['site']}", float(row["value"]), int(row["round"]))
    board.flush()


def accepted_norms(history: Iterable[Mapping[str, Any]]) -> list[float]:
    """The norms of all accepted updates, from the rows of a run's history, with which they are kept and resumed."""
    return [row["value"] for row in history if row["model"] == "local" and row["metric"] == UPDATE_NORM]


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
        """Record that a site failed round `number`; at most once per round.

        Raises:
            Exception: the given `error`, if all sites have to deliver, or if it is an error of the program.
            InputError: if too few sites are left.
        """
        if self.min_sites == self.sites or isinstance(error, PROGRAM_FAULTS):
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
        """Take over the failures of a checkpoint."""
        self.rows = [dict(row) for row in rows]

    def write(self, folder: Path) -> None:
        """Write the table if there is a failure, or to replace the table of an earlier run."""
        path = folder / FAILURES
        if self.rows or path.exists():
            write_rows(path, FAILED, self.rows)
