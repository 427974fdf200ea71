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
"""The configs of a bundle, generated from configs that all tasks have in common and the task's own ``task.json``.

``bundles/common/*.json`` are the configs of a bundle, with macros where tasks differ; ``task.json`` defines the values
of the macros. Its key ``base`` names a file of ``bundles/common/tasks`` with the values for tasks on volumes or on
pictures. ``task.json`` changes these as `monai.bundle.ConfigParser` merges config files: ``"a#b"`` replaces a part,
``"+a#b"`` extends it.

Macros have the form of MONAI's macros:

- ``"%task#a#b"`` is replaced by the value of the task at ``a#b``; in a list, the items of a list are inserted;
- in a longer text, ``%task#a#b`` is replaced by the value as text;
- the key ``"**"`` is replaced by the keys of the dictionary that is its value, as in Python.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import whole_file

COMMON = Path(__file__).parents[2] / "bundles" / "common"
MACRO = re.compile(r"%task#(\w+(?:#\w+)*)")
SPLICE = "**"
WIDTH = 100  # largest number of characters of a list in one line


def write_configs(task: str, output_dir: str | None = None, common_dir: str | None = None) -> list[str]:
    """Generate the configs of a bundle from its ``task.json``.

    Args:
        task: Folder of the bundle, or its ``task.json``.
        output_dir: Folder to write to; by default ``configs`` beside the ``task.json``.
        common_dir: Folder of the common configs; by default ``common`` beside the bundle, or else in the repository.

    Returns:
        The paths of the configs.

    Raises:
        InputError: If the task cannot be read, or lacks a value that a common config needs.
    """
    path = Path(task) / "task.json" if Path(task).is_dir() else Path(task)
    beside = path.absolute().parent.parent / "common"
    common = Path(common_dir) if common_dir else beside if beside.is_dir() else COMMON
    texts = generate_configs(path, common)
    target = Path(output_dir) if output_dir else path.parent / "configs"
    for name, text in texts.items():
        with whole_file(target / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [str(target / name) for name in texts]


def generate_configs(task: Path, common: Path = COMMON) -> dict[str, str]:
    """Generate the configs of a task: name of the file -> text.

    Args:
        task: Path of the ``task.json``.
        common: Folder of the common configs.

    Raises:
        InputError: As for :func:`write_configs`.
    """
    settings = ConfigParser(read_task(task, common))
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(common.glob("*.conf"))}
    for path in sorted(common.glob("*.json")):
        try:
            texts[path.name] = as_text(_filled(ConfigParser.load_config_file(path), settings))
        except KeyError as error:
            raise InputError(f"{task} lacks {error.args[0]}, which {path} needs: add it.") from error
    return texts


def read_task(task: Path, common: Path = COMMON) -> dict[str, Any]:
    """Read a ``task.json``, merged with its base; arguments as for :func:`generate_configs`."""
    own = _read(task)
    bases = sorted(path.stem for path in (common / "tasks").glob("*.json"))
    if own.get("base") not in bases:
        raise InputError(f"{task} has the base {own.get('base')!r}: set its key 'base' to one of {', '.join(bases)}.")
    return dict(ConfigParser.load_config_files([common / "tasks" / f"{own['base']}.json", task]))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = ConfigParser.load_config_file(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a task ({error}): correct the file.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a task: its content must be a JSON object.")
    return content


def _filled(config: Any, task: ConfigParser) -> Any:
    """A common config, or a part of it, with macros replaced by values of the task."""
    if isinstance(config, str):
        if MACRO.fullmatch(config):
            return _filled(_value(config, task), task)
        return MACRO.sub(lambda macro: str(_value(macro[0], task)), config)
    if isinstance(config, list):
        items: list[Any] = []
        for item in config:
            value = _filled(item, task)
            is_macro = isinstance(item, str) and MACRO.fullmatch(item)
            items += value if is_macro and isinstance(value, list) else [value]
        return items
    if isinstance(config, Mapping):
        filled: dict[str, Any] = {}
        for key, item in config.items():
            value = _filled(item, task)
            filled.update(value if key == SPLICE else {_filled(key, task): value})
        return filled
    return config


def _value(macro: str, task: ConfigParser) -> Any:
    name = macro.removeprefix("%task#")
    try:
        return deepcopy(task[name])
    except (KeyError, ValueError) as error:
        raise KeyError(name) from error


def as_text(config: Any) -> str:
    """Return a config as the text of a JSON file, with an indentation of four spaces and short lists in one line."""
    return _text(config, "") + "\n"


def _text(value: Any, indent: str) -> str:
    inner = indent + 4 * " "
    if isinstance(value, Mapping) and value:
        items = [f"{inner}{json.dumps(key, ensure_ascii=False)}: {_text(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and value:
        line = json.dumps(value, ensure_ascii=False)
        if len(line) <= WIDTH and not any(isinstance(item, list | Mapping) for item in value):
            return line
        return "[\n" + ",\n".join(inner + _text(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)
