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
"""Tables that grow as scans are processed, so that an interrupted run has a row for each mask.

The rows of a scan are written before its mask is renamed to its final name, and removed if the mask cannot be written.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, EventEnum, Events
from monai.engines import Evaluator, IterationEvents

from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import write_text


class ServedEvents(EventEnum):
    """Events of an evaluator that continues after the failure of a scan."""

    SCAN_FAILED = "scan_failed"


class GrowingFile:
    """A text file to which entries are added, and which is complete at any time.

    Args:
        path: The file; the first entry overwrites it.
        head: Text at its beginning.
        tail: Text at its end.
        between: Text between two entries.
    """

    def __init__(self, path: Path, head: str, tail: str = "", between: str = "") -> None:
        self.path = path
        self.head, self.tail, self.between = head, tail, between
        self.ends: list[int] = []  # byte positions of the ends of the last two entries, at most

    def add(self, entry: str) -> None:
        """Append an entry."""
        if not self.ends:
            write_text(self.path, self.head + entry + self.tail)
            self.ends = [len(self.head.encode()), len((self.head + entry).encode())]
            return
        empty = self.ends[-1] == len(self.head.encode())
        content = (self.between * (not empty) + entry).encode()
        self._write(self.ends[-1], content)
        self.ends = [self.ends[-1], self.ends[-1] + len(content)]

    def take_back(self) -> None:
        """Remove the entry that was added last."""
        if len(self.ends) > 1:
            self.ends.pop()
            self._write(self.ends[-1], b"")

    def _write(self, at: int, content: bytes) -> None:
        content += self.tail.encode()
        try:
            with open(self.path, "rb+", buffering=0) as file:
                file.seek(at)
                if file.write(content) < len(content):  # a single write, which is not interrupted
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                file.truncate(at + len(content))
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write to {self.path} ({error.strerror or error}): choose another output_dir or free space"
            ) from error


def served_scans(engine: Engine) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the batch and the output of each scan of an evaluator's iteration."""
    state: Any = engine.state  # decollated lists, which are not in ignite's types
    return zip(state.batch, state.output)


class ServedRecorder:
    """A handler that writes the rows of scans as they are processed.

    An evaluator calls it before other handlers write the mask of the scan, another engine after an iteration.

    Attributes:
        newest: Cases of this iteration for which rows were written; `record` sets it.
    """

    newest: Sequence[str] = ()

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        served = IterationEvents.MODEL_COMPLETED if isinstance(engine, Evaluator) else Events.ITERATION_COMPLETED
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin)
        engine.add_event_handler(served, self.record)
        if engine.has_registered_events(ServedEvents.SCAN_FAILED):
            engine.add_event_handler(ServedEvents.SCAN_FAILED, self._fail)

    def start(self, engine: Engine) -> None:
        """Discard the rows of an earlier run of the engine."""
        raise NotImplementedError

    def record(self, engine: Engine) -> None:
        """Write the rows of the scans of this iteration."""
        raise NotImplementedError

    def take_back(self) -> None:
        """Remove the rows of the cases in `newest`, as their mask could not be written."""
        raise NotImplementedError

    def _begin(self, engine: Engine) -> None:
        self.newest = ()

    def _fail(self, engine: Engine) -> None:
        if self.newest:
            self.take_back()
