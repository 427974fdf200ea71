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
INTERRUPTED = 130  # exit status of a process that was ended by Ctrl-C


class InputError(ValueError):
    """An error in the input, not in the program. The message has one line: what is wrong, where, and what to do."""


# worker processes of a data loader send their exceptions as the text of a traceback
_FROM_WORKER = re.compile(rf"^{re.escape(__name__)}\.InputError: (.+)$", re.MULTILINE)


def root_input_error(error: BaseException | None) -> InputError | None:
    """The `InputError` at the root of a chain of exceptions, or None.

    MONAI wraps exceptions of transforms and config expressions, often several times; users need the original message.
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
    """Log a warning only once per process, even if a run reads the same data repeatedly."""
    logger.warning(line)


_advice = ""


def when_interrupted(advice: str) -> None:
    """Set the advice that is printed when Ctrl-C ends the process: what has been kept, and how to continue."""
    global _advice
    _advice = advice


def one_line_errors(in_any_process: bool = False) -> None:
    """Make an uncaught `InputError` end the process with ``error: <message>`` and status 1, without a traceback.

    Ctrl-C also prints one line, with status 130. An input or file error that ends only a background thread, such as
    that of TensorBoard when the disk is full, is printed as a one-line warning. Other exceptions are shown as usual.
    The bundles call this in ``initialize``; in the process of another program, such as MONAI Label, a MONAI FL
    client or a notebook, it has no effect.

    Args:
        in_any_process: Also if the process was not started as ``python -m monai.bundle`` or ``shared_iopfl``.
    """
    started = getattr(sys.modules.get("__main__"), "__spec__", None)
    if not in_any_process and (started is None or started.name.partition(".")[0] not in ("monai", "shared_iopfl")):
        return

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            _say("interrupted", _advice or "nothing was written that a later run could continue from")
            raise SystemExit(INTERRUPTED)  # becomes the exit status of the interpreter
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
    for bar in list(getattr(tqdm, "_instances", ())):  # an unfinished progress bar leaves the cursor in its line
        bar.close()
    # a single write, so that the lines of two threads do not mix
    line = " ".join(str(error).split())
    # control characters in a quoted name must not reach the terminal
    sys.stderr.write(f"{kind}: " + re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", line) + "\n")
