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
"""The checkpoint of a federation: it is written after each round, and read and checked when the run is resumed."""

from __future__ import annotations

import logging
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared_iopfl.evaluation.run.earlier_run import check_settings
from shared_iopfl.federation.state import FederationState
from shared_iopfl.federation.updates import FAILED, HISTORY
from shared_iopfl.models.files import save_atomically
from shared_iopfl.models.weights import all_finite
from shared_iopfl.utils.checks import whole
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import write_rows

logger = logging.getLogger(__name__)
FIELDS = ("settings", "round", "weights", "server", "clients", "history", "failures")


def save(run: FederationState) -> None:
    """Write the tables and the checkpoint of all rounds so far."""
    # the history comes first: a run that is interrupted in between repeats this round and writes its history again
    write_rows(run.output_dir / "history.csv", HISTORY, run.history)
    run.failures.write(run.output_dir)
    clients = {site: client.state_dict() for site, client in run.clients.items()}
    state = {"settings": run.settings(), "round": run.round, "weights": run.weights, "clients": clients}
    state |= {"server": run.server.state_dict(), "history": run.history, "failures": run.failures.rows}
    save_atomically(state, run.checkpoint, run.previous if run.round > 1 else None)
    if run.round == 1:
        run.previous.unlink(missing_ok=True)  # it belongs to an earlier run


def resume(run: FederationState) -> None:
    """Continue from the newest checkpoint that can be read; without any checkpoint, do nothing.

    Raises:
        InputError: If no checkpoint can be read, the checkpoint was altered, or its run had other settings.
    """
    state, path, unreadable = read_newest((run.checkpoint, run.previous))
    if state is None:
        return
    check_settings(state["settings"], run.settings(), str(path))
    check_checkpoint(state, path, run)
    run.round, run.weights, run.history = state["round"], state["weights"], list(state["history"])
    run.failures.resume(state["failures"])
    run.server.load_state_dict(state["server"])
    for site, client in run.clients.items():
        client.load_state_dict(state["clients"][site])
    if unreadable:
        run.checkpoint.unlink()  # otherwise it would replace the readable checkpoint when the next one is written
        logger.warning("cannot read %s: continuing from the round before", unreadable[0])
    logger.info("resumed after round %d", run.round)


def read_newest(paths: Sequence[Path]) -> tuple[dict[str, Any] | None, Path, list[str]]:
    """Read the first of several checkpoints that is intact.

    Args:
        paths: Paths of the checkpoints, the newest first.

    Returns:
        The checkpoint, or None if no file exists; its path; and descriptions of the earlier files in the sequence that
        could not be read.

    Raises:
        InputError: If files exist, but none of them can be read.
    """
    unreadable: list[str] = []
    for path in paths:
        if path.is_file():
            try:
                return _read(path), path, unreadable
            except Exception as error:
                unreadable.append(f"{path} ({type(error).__name__})")
    if unreadable:
        raise InputError(f"cannot read {' nor '.join(unreadable)}; remove what cannot be read to start a new run.")
    return None, paths[0], []


def check_checkpoint(state: Mapping[str, Any], path: Path, run: FederationState) -> None:
    """Raise `InputError`, naming file and field, for a checkpoint that was altered after it was written.

    Args:
        state: Content of the checkpoint.
        path: Path of the file, for the message.
        run: The run that continues, with its clients and their first weights.
    """
    allowed = whole(1, run.rounds)
    if not allowed.holds(state["round"]):
        raise _altered(path, f"round must be {allowed.allowed}, but is {state['round']!r:.60}")
    check_state(state["weights"], run.weights, path, "weights")
    clients = {site: client.state_dict() for site, client in run.clients.items()}
    check_state(state["clients"], clients, path, "clients")
    velocity = {name: tensor for name, tensor in run.weights.items() if name in state["server"]["velocity"]}
    check_state(state["server"], {"velocity": velocity}, path, "server")
    for field, columns in (("history", HISTORY), ("failures", FAILED)):
        rows, kinds = state[field], {"round": int, "value": float}
        known = isinstance(rows, list) and all(isinstance(row, Mapping) and {*columns} <= {*row} for row in rows)
        if not known or any(not isinstance(row[name], kinds[name]) for row in rows for name in {*kinds} & {*row}):
            raise _altered(path, f"{field} is not a table of a run")


def check_state(found: Any, like: Any, path: Path, field: str = "") -> None:
    """Compare a state that was read with the state of a new run: names, types and shapes; numbers must be finite.

    The state may have entries that a new run does not have yet, such as the moments of an optimiser, if they are
    finite.

    Args:
        found: The state that was read.
        like: The state of a new run.
        path: Path of the file, for the message.
        field: Field of the file that contains the state, for the message.

    Raises:
        InputError: If the states do not match; the message names file and field.
    """

    def wrong(what: str) -> InputError:
        return _altered(path, f"{field or 'its content'} {what}")

    if isinstance(like, Tensor) and not isinstance(found, Tensor):
        raise wrong(f"must be a tensor, but is {found!r:.60}")
    if isinstance(found, Tensor):
        if isinstance(like, Tensor) and (found.shape, found.dtype) != (like.shape, like.dtype):
            given, wanted = ((tuple(tensor.shape), str(tensor.dtype)[6:]) for tensor in (found, like))
            raise wrong(f"must have shape {wanted[0]} of {wanted[1]}, but has {given[0]} of {given[1]}")
        if not all_finite(found):
            raise wrong("has NaN or infinite values")
    elif isinstance(like, Mapping) or (like is None and isinstance(found, Mapping)):
        if not isinstance(found, Mapping):
            raise wrong(f"must be a dictionary, but is {found!r:.60}")
        missing = [key for key in like or () if key not in found]
        if missing:
            raise wrong(f"lacks {missing[0]!r}")
        for key, value in found.items():
            check_state(value, (like or {}).get(key), path, f"{field}.{key}".lstrip("."))
    elif isinstance(found, (list, tuple)):
        others = like if isinstance(like, (list, tuple)) and len(like) == len(found) else [None] * len(found)
        for number, (value, other) in enumerate(zip(found, others)):
            check_state(value, other, path, f"{field}.{number}".lstrip("."))
    elif isinstance(found, float) and not math.isfinite(found):
        raise wrong(f"must be finite, but is {found}")
    elif isinstance(like, int) and not (isinstance(found, int) and found >= 0):  # a count or a switch
        raise wrong(f"must be a whole number from 0, but is {found!r:.60}")
    elif isinstance(like, float) and not isinstance(found, (int, float)):
        raise wrong(f"must be a number, but is {found!r:.60}")


def _altered(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}; remove the file, or start a new run.")


def _read(path: Path) -> dict[str, Any]:
    """Read a checkpoint; any exception means that the file is not a checkpoint or not intact."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:  # torch would not notice a flipped bit
            raise zipfile.BadZipFile
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {key: state[key] for key in FIELDS}
