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

``bundles/common/*.json`` are the configs of a bundle, with macros in the places where tasks differ. ``task.json`` gives
the values of the macros. It names a file of ``bundles/common/tasks`` as its ``base``, which has the values of any task
on volumes or on pictures, and changes them as `monai.bundle.ConfigParser` merges config files: ``"a#b"`` replaces a
part, ``"+a#b"`` extends it.

A macro is written as MONAI's macros are:

- ``"%task#a#b"`` is replaced by what the task has at ``a#b``; in a list, a list's items take the macro's place;
- in longer text, ``%task#a#b`` is replaced by the value as text;
- the key ``"**"`` is replaced by the keys of the dictionary that it has, as in Python.
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
WIDTH = 100  # of a list that stands in one line


def write_configs(task: str, output_dir: str | None = None, common_dir: str | None = None) -> list[str]:
    """Generate the configs of a bundle from its ``task.json``.

    Args:
        task: the bundle's folder, or its ``task.json``.
        output_dir: folder of the configs; default: ``configs`` beside the ``task.json``.
        common_dir: folder of the common configs; default: ``common`` beside the bundle, else that of the repository.

    Returns:
        The paths of the configs.

    Raises:
        InputError: where the task cannot be read, or lacks something that a common config asks for.
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
    """The text of each config of a task, by the name of its file."""
    settings = ConfigParser(read_task(task, common))
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(common.glob("*.conf"))}
    for path in sorted(common.glob("*.json")):
        try:
            texts[path.name] = as_text(_filled(ConfigParser.load_config_file(path), settings))
        except KeyError as error:
            raise InputError(f"{task} lacks {error.args[0]}, which {path} asks for: add it.") from error
    return texts


def read_task(task: Path, common: Path = COMMON) -> dict[str, Any]:
    """A ``task.json`` merged over its base."""
    own = _read(task)
    bases = sorted(path.stem for path in (common / "tasks").glob("*.json"))
    if own.get("base") not in bases:
        raise InputError(f"{task} has the base {own.get('base')!r}: name one of {', '.join(bases)} in its key 'base'.")
    return dict(ConfigParser.load_config_files([common / "tasks" / f"{own['base']}.json", task]))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = ConfigParser.load_config_file(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a task ({error}): correct the file.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a task: it must be a JSON object.")
    return content


def _filled(config: Any, task: ConfigParser) -> Any:
    """A common config, or a part of it, with the task's values in the place of the macros."""
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
    """A config as the text of a file: four spaces of indentation, short lists in one line."""
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
