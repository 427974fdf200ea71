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
"""Running a config of a bundle with settings from the command line, and showing more or less of its output."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Any

from fire.parser import DefaultParseValue

from shared_iopfl.models.bundles import find_bundle
from shared_iopfl.utils.errors import InputError, root_input_error
from shared_iopfl.utils.names import parse_names

AMOUNTS = ("quiet", "usual", "verbose")  # how much text is shown
# loggers that repeat an error with its traceback, or report what the user cannot act on
SILENCED = (
    *("ignite.engine.engine", "monai.bundle.workflows", "monai.data.nvimgcodec_pydicom_plugin"),
    # they log several lines per round and site; setting them up before MONAI does keeps it from adding handlers
    *("monai.fl.client.monai_algo", "monai.networks.utils"),
)


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """Read settings as typed on the command line, ``--key value`` or ``--key=value``. Nothing is evaluated as code.

    Numbers, ``True``, ``None``, lists and dictionaries are converted; paths and names stay as typed. A key without a
    value is ``True``.

    Args:
        words: The words after the folders.

    Returns:
        The settings by name.

    Raises:
        InputError: If a word does not follow a key.
    """
    from shared_iopfl.utils.config_values import NAMES, PATHS, WORDS

    settings: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise InputError(f"{word!r} belongs to no setting: settings are given as --key value.")
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            text = rest.pop(0) if rest and not rest[0].startswith("--") else "True"
        if key in NAMES:
            settings[key] = parse_names(text)
        elif key in (*PATHS, *WORDS):
            settings[key] = text
        else:
            settings[key] = DefaultParseValue(text)
    return settings


def _as_overrides(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as overrides for MONAI's config parser, protected from being evaluated."""
    from shared_iopfl.utils.config_values import NAMES, PATHS, WORDS, as_values, is_data

    for key, value in settings.items():
        if key not in (*NAMES, *PATHS, *WORDS) and isinstance(value, (str, list, tuple, dict)) and not is_data(value):
            raise InputError(
                f"{key} {value!r:.80} is not a plain value; expressions work only with python -m monai.bundle run."
            )
    return as_values(settings)


def run_config(
    task: str,
    config: str,
    settings: Mapping[str, Any],
    amount: str = "usual",
    at_end: Callable[[], None] | None = None,
) -> None:
    """Run a config of a bundle from ``initialize`` to ``finalize``.

    Args:
        task: A task or the folder of a bundle, see `find_bundle`.
        config: Name of the config, such as ``inference``.
        settings: Values that replace those of the config. Text stays text.
        amount: One of `AMOUNTS`. "quiet" shows only errors; "usual" shows progress, warnings and the config's own
            output; "verbose" shows everything that `python -m monai.bundle run` shows.
        at_end: Called when the run has finished or failed, before its folder is released; not called after Ctrl-C.

    Raises:
        InputError: If a step of the config raises it, or if a setting is text that the config would evaluate.
    """
    root = find_bundle(task)
    with ExitStack() as stack:
        _show(amount, stack)
        from monai.bundle import ConfigWorkflow

        path = root / "configs" / f"{config}.json"
        if not path.is_file():
            raise InputError(f"the bundle {root.name} has no {config}.json.")
        workflow = ConfigWorkflow(
            str(path),
            logging_file=None if amount == "verbose" else False,  # type: ignore[arg-type]
            **_as_overrides({"bundle_root": str(root), **settings}),
        )
        try:
            workflow.initialize()
            workflow.run()
        except KeyboardInterrupt:
            at_end = None
            raise
        except Exception as error:  # MONAI wraps the exceptions of config expressions
            cause = root_input_error(error)
            if cause is None:
                raise
            raise InputError(str(cause)) from error
        finally:
            if at_end is not None:
                at_end()
            workflow.finalize()


def _show(amount: str, stack: ExitStack) -> None:
    """Show as much text as requested; closing the stack restores logging, warnings and exception hooks."""
    for module in (sys, threading):
        stack.callback(setattr, module, "excepthook", module.excepthook)
    if amount == "verbose":
        return
    root = logging.getLogger()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    handler.setLevel(logging.CRITICAL if amount == "quiet" else logging.WARNING)
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    if amount == "quiet":
        nothing = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stack.enter_context(redirect_stdout(nothing))
        stack.enter_context(redirect_stderr(nothing))
    levels = {root: logging.WARNING, **{logging.getLogger(name): logging.CRITICAL + 1 for name in SILENCED}}
    for logger, level in levels.items():
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(level)
    stack.callback(setattr, root, "handlers", root.handlers)
    root.handlers = [handler]
