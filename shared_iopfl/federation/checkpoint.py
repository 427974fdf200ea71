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
"""The checkpoint of a federation: written after each round; to go on, the newest valid one is read and checked."""

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
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import write_rows

logger = logging.getLogger(__name__)


def save(run: FederationState) -> None:
    """Write tables and checkpoint of the rounds so far."""
    # the history first: a run interrupted between the two does this round again, and writes it again
    write_rows(run.output_dir / "history.csv", HISTORY, run.history)
    run.failures.write(run.output_dir)
    save_atomically(
        {
            "settings": run.settings(),
            "round": run.round,
            "weights": run.weights,
            "server": run.server.state_dict(),
            "clients": {site: client.state_dict() for site, client in run.clients.items()},
            "history": run.history,
            "failures": run.failures.rows,
        },
        run.checkpoint,
        run.previous if run.round > 1 else None,
    )
    if run.round == 1:
        run.previous.unlink(missing_ok=True)  # another run's


def resume(run: FederationState) -> None:
    """Go on from the newest checkpoint that can be read, if there is any."""
    state, path, unreadable = read_newest((run.checkpoint, run.previous))
    if state is None:
        return
    check_settings(state["settings"], run.settings(), str(path))
    clients = {site: client.state_dict() for site, client in run.clients.items()}
    check_checkpoint(state, path, run.rounds, run.weights, clients)
    run.round, run.weights, run.history = state["round"], state["weights"], list(state["history"])
    run.failures.resume(state["failures"])
    run.server.load_state_dict(state["server"])
    for site, client in run.clients.items():
        client.load_state_dict(state["clients"][site])
    if unreadable:
        run.checkpoint.unlink()  # it must not take the place of the one that can be read
        logger.warning("cannot read %s: going on from the round before", unreadable[0])
    logger.info("resumed after round %d", run.round)


def read_newest(paths: Sequence[Path]) -> tuple[dict[str, Any] | None, Path, list[str]]:
    """The first checkpoint of several that is whole.

    Returns:
        The checkpoint (None where there is no file at all), its path, and those before it that cannot be read.

    Raises:
        InputError: where there are files, but none that can be read.
    """
    unreadable: list[str] = []
    for path in paths:
        if path.is_file():
            try:
                return _read(path), path, unreadable
            except Exception as error:
                unreadable.append(f"{path} ({type(error).__name__})")
    if unreadable:
        raise InputError(f"cannot read {' nor '.join(unreadable)}; remove what cannot be read to start anew.")
    return None, paths[0], []


def check_checkpoint(
    state: Mapping[str, Any],
    path: Path,
    rounds: int,
    weights: Mapping[str, Tensor],
    clients: Mapping[str, Any],
) -> None:
    """Raise `InputError`, naming file and field, for a checkpoint that was altered after it was written.

    Args:
        state: the checkpoint.
        path: of the file.
        rounds: of the whole run.
        weights, clients: global weights, and the clients' states, of a new run.
    """
    count, history = state["round"], state["history"]
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= rounds:
        raise InputError(
            f"{path}: round must be a whole number from 1 to {rounds}, but is {count!r:.60}; take the file away, or "
            "start afresh."
        )
    check_state(state["weights"], weights, path, "weights")
    check_state(state["clients"], clients, path, "clients")
    velocity = {name: tensor for name, tensor in weights.items() if name in state["server"]["velocity"]}
    check_state(state["server"], {"velocity": velocity}, path, "server")
    for field, rows, named in (("history", history, HISTORY), ("failures", state["failures"], FAILED)):
        known = isinstance(rows, list) and all(isinstance(row, Mapping) and {*named} <= {*row} for row in rows)
        numbers = {"round": int, "value": float}
        if not known or any(not isinstance(r[c], kind) for r in rows for c, kind in numbers.items() if c in r):
            raise InputError(f"{path}: {field} is not a table of a run; take the file away, or start afresh.")


def check_state(found: Any, like: Any, path: Path, field: str = "") -> None:
    """Compare a state that was read with the state of a new run: names, types, shapes, and finite numbers.

    It may have entries that a new run does not have yet, such as the moments of an optimiser, if they are finite.

    Args:
        found: the state that was read.
        like: the state of a new run.
        path: of the file, for the message.
        field: of the file that holds the state, for the message.

    Raises:
        InputError: naming file and field.
    """

    def wrong(what: str) -> InputError:
        return InputError(f"{path}: {field or 'its content'} {what}; take the file away, or start afresh.")

    if isinstance(like, Tensor) and not isinstance(found, Tensor):
        raise wrong(f"must be a tensor, but is {found!r:.60}")
    if isinstance(found, Tensor):
        if isinstance(like, Tensor) and (found.shape, found.dtype) != (like.shape, like.dtype):
            given, wanted = ((tuple(tensor.shape), str(tensor.dtype)[6:]) for tensor in (found, like))
            raise wrong(f"must have shape {wanted[0]} of {wanted[1]}, but has {given[0]} of {given[1]}")
        if not torch.isfinite(found).all():
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
        pairs = zip(found, like) if isinstance(like, (list, tuple)) and len(like) == len(found) else None
        for number, (value, other) in enumerate(pairs or ((value, None) for value in found)):
            check_state(value, other, path, f"{field}.{number}".lstrip("."))
    elif isinstance(found, float) and not math.isfinite(found):
        raise wrong(f"must be finite, but is {found}")
    elif isinstance(like, int) and not (isinstance(found, int) and found >= 0):  # a count, or a switch
        raise wrong(f"must be a whole number from 0, but is {found!r:.60}")
    elif isinstance(like, float) and not isinstance(found, (int, float)):
        raise wrong(f"must be a number, but is {found!r:.60}")


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint, or whatever is raised by what is none, or not a whole one."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:  # torch reads over a flipped bit
            raise zipfile.BadZipFile
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("settings", "round", "weights", "server", "clients", "history", "failures"):
        state[key]
    return state
