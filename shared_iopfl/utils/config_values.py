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
"""Values that enter a MONAI config as data, never as code.

MONAI's `ConfigParser` evaluates every string that begins with ``$``, resolves references in strings that begin with
``@`` or ``%``, instantiates dictionaries with a ``_target_``, and replaces ``#`` in strings. It also does so for values
that a program sets or a user types. Text that comes with data, weights, a run or a federation must not be treated like
this: `as_value` protects it, and `check_settings`, the first step of every bundle's ``initialize``, checks settings.

There is one exception: **a bundle's own configs are code.** Running a bundle runs the code of its author, as with any
MONAI bundle (see MONAI's security advisory GHSA-873f-pvrv-4x83), so use bundles only from sources that you trust. The
same holds for a config file named on the command line, and for a typed setting that is neither a path nor a name
(``--device "$torch.device('cuda:1')"``).
"""

from __future__ import annotations

import ast
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fire.parser import DefaultParseValue
from monai.bundle import ConfigWorkflow
from monai.bundle.reference_resolver import ReferenceResolver

from shared_iopfl.utils.checks import RULES, check_values
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import check_writable
from shared_iopfl.utils.names import check_sites, nearest, parse_names
from shared_iopfl.utils.reading import read_json

PATHS = (
    *("bundle_root", "dataset_dir", "output_dir", "ckpt_dir", "mask_dir"),
    *("ckpt", "site_model", "initial_model", "pseudonyms"),
)
WORDS = (
    *("site", "role", "model", "split", "mode", "preset", "filters", "run_name", "coding", "crop", "grey"),
    *("norm_statistics", "averaging", "empty_masks", "output_format", "patient"),
)
NAMES = ("sites", "outside_sites")  # lists
STEPS = ("imports", "initialize", "run", "finalize")


class Expression(str):
    """Text for MONAI to evaluate. It is written in this package and contains nothing from outside but numbers."""


def as_value(value: Any) -> Any:
    """The form of a value that a config parser returns unchanged.

    Args:
        value: Text, numbers, lists and dictionaries of them, or objects. An `Expression` is returned as it is.

    Returns:
        The value, in which text that MONAI would change is replaced by an expression of a string literal.

    Raises:
        InputError: If a dictionary would be instantiated as an object.
    """
    if isinstance(value, Expression):
        return value
    if isinstance(value, str):
        return value if _is_plain(value) else _literal(value)
    if isinstance(value, Mapping):
        if "_target_" in value:
            raise InputError(f"a dictionary with _target_ {value['_target_']!r:.80} would be built: give plain values.")
        return {key: as_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_value(item) for item in value]
    return value


def as_values(pairs: Mapping[str, Any]) -> dict[str, Any]:
    """Apply `as_value` to several overrides, id -> value; an id such as ``loss#_target_`` is refused as well.

    An `Expression` is allowed at any id, because it comes from the program itself.
    """
    return {n if isinstance(value, Expression) else check_key(n): as_value(value) for n, value in pairs.items()}


def check_key(name: Any) -> str:
    """Return the id of an override; refuse one that decides what MONAI instantiates or disables (``loss#_target_``)."""
    if not isinstance(name, str) or any(part.startswith("_") for part in re.split("#|::", name)):
        raise InputError(f"{name!r:.80} is not a setting but would change what is built: leave it out.")
    return name


def is_data(value: Any) -> bool:
    """Whether a value is plain data, with nothing that a config would evaluate, instantiate or look up."""
    if isinstance(value, str):
        return _is_plain(value)
    if isinstance(value, (list, tuple)):
        return all(is_data(item) for item in value)
    if isinstance(value, Mapping):
        return "_target_" not in value and all(isinstance(key, str) and is_data(v) for key, v in value.items())
    return value is None or isinstance(value, (bool, int, float))


def _is_plain(text: str) -> bool:
    return not text.startswith(("$", "@", "%")) and "#" not in text


def _literal(text: str) -> str:
    return "$" + ascii(text).replace("@", r"\x40").replace("#", r"\x23")


def _is_literal(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.startswith("$") and isinstance(ast.literal_eval(value[1:]), str)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def check_settings() -> None:
    """Check the settings of the config that evaluates this call, before any of them is used.

    Paths and names are restored as typed, since Python Fire reads ``2024`` and ``1e3`` as numbers and ``a,b`` as a
    tuple. Expressions among them, and settings that no part of the config reads, are refused. Every top-level
    hyper-parameter is checked against its range.

    Raises:
        InputError: If a setting is not allowed; the message names it.
    """
    workflow = running_workflow()
    if workflow is None:
        return
    parser: Any = workflow.parser
    written = _written(workflow.config_root_path, parser.config)
    _check_known(parser.config, written)
    changed = _as_typed(parser, written)
    if changed:
        parser.update(changed)
        parser.parse(reset=True)
    for name in [name for name in parser.config if name in RULES]:
        check_values({name: parser.get_parsed_content(name)})
    if "tracking_uri" in parser.config and parser.config.get("save_execute_config") is None:
        _save_executed(parser)


def _as_typed(parser: Any, written: Mapping[str, Any]) -> dict[str, Any]:
    """The paths and names that have to be set again, as values."""
    changed = {}
    for name in (*PATHS, *WORDS, *NAMES):
        given = parser.config.get(name)
        if given is None or _is_literal(given) or any(given == value for value in written.get(name, ())):
            continue
        value = _text(name, given) if name not in NAMES else _names(name, given)
        if name in NAMES or name == "site":
            check_sites([value] if isinstance(value, str) else value)
        if as_value(value) != given:
            changed[name] = as_value(value)
    return changed


def _save_executed(parser: Any) -> None:
    """Write the config as executed into `output_dir`, where experiment tracking looks for it.

    MONAI itself would do this while the workflow is created, and would evaluate a path before it has been checked.
    Therefore ``save_execute_config`` is false in the bundles.
    """
    path = Path(parser.get_parsed_content("output_dir")) / f"config_{time.strftime('%Y%m%d_%H%M%S')}.json"
    check_writable(path.parent)
    parser.export_config_file(parser.get(), str(path))
    parser.update({"save_execute_config": as_value(str(path))})
    parser.parse(reset=True)


def is_given(name: str) -> bool:
    """Whether a program passed a value in place of an expression of the bundle's files, as servers do with cases."""
    workflow = running_workflow()
    return workflow is not None and not isinstance(workflow.parser[name], str)


def handed_over(name: str) -> Any:
    """The value that a program passed, see `is_given`; an empty list if there is none."""
    workflow = running_workflow()
    return workflow.parser[name] if workflow is not None and is_given(name) else []


def running_workflow() -> ConfigWorkflow | None:
    """The workflow that evaluates the current expression; MONAI does not pass it to expressions."""
    frame = sys._getframe()
    while frame is not None:
        workflow = frame.f_locals.get("self")
        if isinstance(workflow, ConfigWorkflow):
            return workflow
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _written(folder: Path, config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Settings in the bundle's files, name -> values; only from files whose keys are all in the config."""
    written: dict[str, list[Any]] = {}
    for path in sorted(Path(folder).glob("*.json")):
        content = read_json(path)
        top = {key.lstrip("+").split("#")[0].split("::")[0] for key in content}
        if top <= config.keys():
            for key, value in content.items():
                value = ReferenceResolver.normalize_id(value) if isinstance(value, str) else value
                written.setdefault(key.lstrip("+").split("#")[0], []).append(value)
    return written


def _check_known(config: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    """Raise for a setting that is not in the bundle's files and that nothing refers to: it would have no effect."""
    added = [name for name in config if name not in written and not name.startswith("_")]
    if not added:
        return
    used = {match for text in _texts(config) for match in re.findall(r"[@%](\w+)", text)}
    for name in added:
        value = config[name]
        if name in used or (isinstance(value, (dict, list)) and not is_data(value)):  # a step, a component
            continue
        hint = nearest(name, [key for key in written if key not in STEPS])
        raise InputError(f"unknown setting '{name}'{hint or ': nothing in this config reads it.'}")


def _texts(config: Any) -> Iterator[str]:
    if isinstance(config, str):
        yield config
    elif isinstance(config, (Mapping, list, tuple)):
        for item in config.values() if isinstance(config, Mapping) else config:
            yield from _texts(item)


def _text(name: str, given: Any) -> Any:
    """A path or a name as typed."""
    given = _typed(name, given)
    given = str(given) if type(given) is int else given
    if isinstance(given, (bool, float, tuple, list, set)):
        raise InputError(f"{name} must be text, but is {given!r:.80}: put quotes of both kinds around it, \"'...'\".")
    if isinstance(given, str) and given.startswith(("$", "@", "%")):
        hint = "put ./ before it" if name in PATHS else "a name begins with a letter"
        raise InputError(f"{name} {given!r:.80} begins with '{given[0]}' and would be evaluated: {hint}.")
    return given


def _names(name: str, given: Any) -> Any:
    """A list of names as typed."""
    given = _typed(name, given)
    if isinstance(given, str):
        return parse_names(given)
    if isinstance(given, (list, tuple)):
        return [str(item) if type(item) is int else item for item in given]
    raise InputError(f"{name} must be a list of names, such as \"['A','B']\", but is {given!r:.80}.")


def _typed(name: str, given: Any) -> Any:
    """The text on the command line that `given` was made from, or `given` itself if it has another origin."""
    typed = None
    for word, following in zip(sys.argv, [*sys.argv[1:], ""]):
        option, equals, text = word.partition("=")
        if option.startswith("--") and option[2:].replace("-", "_") == name:
            typed = text if equals else following
    if typed is None:
        return given
    parsed = DefaultParseValue(typed)
    made = ReferenceResolver.normalize_id(parsed) if isinstance(parsed, str) else parsed
    if given not in (parsed, made) or type(given) is not type(parsed):
        return given
    # Fire removes quotes, which is correct, and also everything after a '#', as if it were a comment
    return parsed if isinstance(parsed, str) and typed[:1] in ("'", '"') else typed


def _check_before_tracking() -> None:
    """End the process if a tracked workflow is about to evaluate a path that was typed.

    With ``--tracking mlflow --save_execute_config True`` MONAI evaluates `output_dir` while it creates the workflow,
    before its first step but after the imports of the config. This check therefore runs when the module is imported.
    """
    workflow: Any = running_workflow()
    if workflow is None or hasattr(workflow, "_is_initialized"):
        return
    try:
        _as_typed(workflow.parser, _written(workflow.config_root_path, workflow.parser.config))
    except InputError as error:
        raise SystemExit(f"error: {error}") from None  # MONAI ignores any other exception of an import


_check_before_tracking()
