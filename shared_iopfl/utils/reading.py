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
"""Reading files of unknown origin with limits: regular files only, of limited size, JSON of limited depth."""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from typing import Any

from shared_iopfl.utils.errors import InputError

LARGEST_JSON = 64 * 2**20
DEEPEST = 100
BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


def read_bounded(path: str | os.PathLike, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Pipes could block, and devices may have no end.

    Raises:
        InputError: If it is not a regular file, is too large, or cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path} is not a regular file but a folder, a pipe or a device: put a file there.")
        # the path may have been replaced since the check
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            about = os.fstat(file.fileno())
            content = file.read(limit + 1) if stat.S_ISREG(about.st_mode) and about.st_size <= limit else b""
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    if not stat.S_ISREG(about.st_mode) or max(about.st_size, len(content)) > limit:
        raise InputError(f"{path} is too large to be what it is called: {about.st_size} bytes, at most {limit}.")
    return content


def read_json(path: str | os.PathLike, limit: int = LARGEST_JSON) -> Any:
    """Return the content of a JSON file.

    Raises:
        InputError: For the reasons of `read_bounded` and `parse_json`.
    """
    return parse_json(read_bounded(path, limit), path)


def parse_json(content: bytes, path: str | os.PathLike) -> Any:
    """Parse JSON in UTF-8 or, with a byte-order mark, UTF-16. A byte-order mark before UTF-8 is accepted.

    Args:
        content: Content of the file.
        path: Path of the file, for the message.

    Raises:
        InputError: If it is not JSON, is nested more than 100 levels deep, or has the same key twice.
    """
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
        _check_depth(text)
        return json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:  # of decoding, too
        raise InputError(f"{path} cannot be read as JSON: {str(error)[:160]}; correct or replace it.") from error


def _check_depth(text: str) -> None:
    """Raise `ValueError` before Python's recursive parser runs out of stack."""
    depth = 0
    for match in BRACKETS.finditer(text):
        if match[0][0] in "[{":
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} deep")
        elif match[0][0] in "]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return content
