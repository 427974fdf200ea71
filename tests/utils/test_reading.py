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
"""Files of others: what hangs, has no end or no bottom is refused in one line, by everything that reads JSON."""

from __future__ import annotations

import codecs
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared_iopfl.comparison.tables import choices_table
from shared_iopfl.data.layouts import known_sites, published_parts
from shared_iopfl.evaluation.scores import read_json as read_own_json
from shared_iopfl.models.files import load_scores
from shared_iopfl.models.manifest import read_manifest
from shared_iopfl.models.packaging import publish
from shared_iopfl.utils import reading
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.reading import read_json


def deep(path: Path) -> None:
    path.write_text("[" * 100_000 + "]" * 100_000)


def deep_and_cut(path: Path) -> None:
    path.write_text('{"a":' * 100_000)


def folder(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(reading.LARGEST_JSON + 1)


def text(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


BAD = {
    "pipe": os.mkfifo,
    "device": device,
    "folder": folder,
    "deep": deep,
    "deep and cut": deep_and_cut,
    "huge": huge,
    "cut": text(b'{"a": '),
    "empty": text(b""),
    "binary": text(bytes(range(256))),
    "long number": text(b"[" + b"9" * 10_000 + b"]"),
    "one key twice": text(b'{"a": 1, "a": 2}'),
    "half of UTF-16": text(codecs.BOM_UTF16_LE + b"{"),
}
READERS = {
    "any": ("x.json", read_json),
    "report": ("routes.json", read_own_json),
    "manifest": ("manifest.json", lambda path: read_manifest(path.parent)),
    "datalist": ("notes.json", lambda path: published_parts(path.parent, "notes")),
    "choices": ("choices.json", lambda path: choices_table(path.parent)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", BAD)
def test_bad_json_is_one_line_at_once(tmp_path: Path, kind: str, reader: str) -> None:
    if kind == "device" and not os.path.exists("/dev/zero"):
        pytest.skip("no devices here")
    name, read = READERS[reader]
    BAD[kind](tmp_path / name)
    if reader == "choices" and not (tmp_path / name).is_file():
        assert read(tmp_path / name) is None  # nothing that a comparison has left
        return
    began = time.monotonic()
    with pytest.raises(InputError) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)
    assert Path(name).stem in str(error.value)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", ["deep", "cut", "long number"])
def test_bad_scores_and_runs_are_one_line(tmp_path: Path, kind: str) -> None:
    BAD[kind](tmp_path / "scores.json")
    with pytest.raises(InputError, match=r"scores\.json"):
        load_scores(str(tmp_path))


def test_a_pipe_among_the_sites_is_listed_and_waits_for_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "notes.json")
    assert known_sites(tmp_path) == ["notes"]
    with pytest.raises(InputError, match="not a regular file"):
        published_parts(tmp_path, "notes")


def test_a_run_without_settings_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        publish(str(tmp_path / "models"), str(tmp_path / "to"), "research only")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_editors_put_before_text_is_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "x.json").write_bytes('{"a": ["é", "]\\"["]}'.encode(encoding))
    assert read_json(tmp_path / "x.json") == {"a": ["é", ']"[']}


def test_a_hundred_brackets_are_not_too_deep(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[" * 100 + "]" * 100)
    assert read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[" + "[]," * 1000 + '"[[[["]')  # wide, and brackets in text
    assert len(read_json(tmp_path / "x.json")) == 1001
