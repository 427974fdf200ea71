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
"""Input errors, shown as one line."""

from __future__ import annotations

import logging
import re
import sys
import threading
from functools import cache
from types import TracebackType

from tqdm import tqdm

logger = logging.getLogger(__name__)
INTERRUPTED = 130  # a shell's status of what Ctrl-C ended


class InputError(ValueError):
    """The input is at fault, not the program: the message says in one line what is wrong, where, and what to do."""


# a data loader's worker process sends home what was raised there as the text of its traceback
_FROM_WORKER = re.compile(rf"^{re.escape(__name__)}\.InputError: (.+)$", re.MULTILINE)


def root_input_error(error: BaseException | None) -> InputError | None:
    """The `InputError` at the bottom of a chain of exceptions, or None.

    MONAI wraps what a transform or a config expression raises, often several times over; what the user needs is the
    line that started it.
    """
    found, seen = None, set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, InputError):
            found = error
        if text := _FROM_WORKER.search(str(error)):
            found = InputError(text[1])
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found


@cache
def warn_once(line: str) -> None:
    """Log a warning once in a process, however often a run asks for the same data."""
    logger.warning(line)


_advice = ""


def when_interrupted(advice: str) -> None:
    """Set what is said when Ctrl-C ends the process: what is left, and how to go on."""
    global _advice
    _advice = advice


def one_line_errors(in_any_process: bool = False) -> None:
    """Make an uncaught `InputError` end the process with ``error: <its line>`` and status 1, without a traceback.

    Ctrl-C is one line too, with status 130. What ends a thread only, such as TensorBoard's where the disk is full, is a
    warning of one line. Every other exception is shown as before. Called by the bundles' ``initialize``: in the process
    of another program, such as MONAI Label, a client of MONAI FL or a notebook, it changes nothing.

    Args:
        in_any_process: also where the process was not started as ``python -m monai.bundle`` or ``shared_iopfl``.
    """
    started = getattr(sys.modules.get("__main__"), "__spec__", None)
    if not in_any_process and (started is None or started.name.partition(".")[0] not in ("monai", "shared_iopfl")):
        return

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            _say("interrupted", _advice or "nothing was written that could be gone on from")
            raise SystemExit(INTERRUPTED)  # the interpreter takes it for its status
        cause = root_input_error(error)
        if cause is None:
            sys.__excepthook__(kind, error, trace)
        else:
            _say("error", cause)

    def thread_hook(ended: threading.ExceptHookArgs) -> None:
        cause = root_input_error(ended.exc_value)
        if cause is None and not isinstance(ended.exc_value, OSError):
            threading.__excepthook__(ended)
        else:
            _say("warning: in the background", cause or ended.exc_value)

    sys.excepthook, threading.excepthook = excepthook, thread_hook


def _say(kind: str, error: BaseException | str | None) -> None:
    for bar in list(getattr(tqdm, "_instances", ())):  # an unfinished bar leaves the cursor in its line
        bar.close()
    # written at once: line by line, or word by word, two threads would write into each other's lines
    line = " ".join(str(error).split())
    # a name that is quoted must not steer the terminal
    sys.stderr.write(f"{kind}: " + re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", line) + "\n")
