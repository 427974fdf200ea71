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
"""A published set is what its manifest says, to the byte, or one line says what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shared_iopfl.models.files import load_experts, load_scores, load_weights, save_atomically
from shared_iopfl.models.manifest import (
    LIMIT,
    check_manifest,
    plain_name,
    read_checked,
    read_manifest,
    release,
    setting,
    write_manifest,
)
from shared_iopfl.utils.errors import InputError

ARCHITECTURE = {"network_def": {"_target_": "BasicUNet"}, "features": 8, "image_size": 64}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A published set: the global model, two personalised ones, and their scores."""
    folder = tmp_path / "models"
    for number, name in enumerate(("model", "model_A", "model_ISBI_1.5")):
        save_atomically({"weight": torch.full((50,), float(number))}, folder / f"{name}.pt")
    (folder / "scores.json").write_text('{"global": 0.8, "A": 0.7}')
    write_manifest(folder, ARCHITECTURE, "research only", {"A": 0.9}, {"rounds": 3}, {"torch": "2"})
    return folder


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def refused(action: Callable[[], Any], *words: str) -> None:
    """The action raises an `InputError` of one line that contains the words."""
    with pytest.raises(InputError) as error:
        action()
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []


def test_the_manifest_of_a_set_is_complete(models: Path) -> None:
    manifest = check_manifest(models)
    assert manifest["sites"] == ["A", "ISBI_1.5"]
    assert (manifest["terms"], manifest["training"], manifest["metrics"]) == (
        "research only",
        {"rounds": 3},
        {"A": 0.9},
    )
    assert manifest["architecture"] == ARCHITECTURE
    assert manifest["versions"].keys() == {"torch", "shared_iopfl"}
    roles = {name: (entry["role"], entry.get("site")) for name, entry in manifest["files"].items()}
    assert roles == {
        "model.pt": ("global", None),
        "model_A.pt": ("personalised", "A"),
        "model_ISBI_1.5.pt": ("personalised", "ISBI_1.5"),
        "scores.json": ("scores", None),
    }


def test_a_whole_set_loads(models: Path) -> None:
    assert float(load_weights(models / "model.pt")["weight"][0]) == 0
    assert list(load_experts(str(models))) == ["A", "ISBI_1.5"]
    assert load_scores(str(models)) == {"global": 0.8, "A": 0.7}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.pt", "model_A.pt", "scores.json"])
@pytest.mark.parametrize(
    "harm, word",
    [
        (flip_a_bit, "changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut short"),
        (lambda path: path.write_bytes(b""), "cut short"),
        (lambda path: path.write_bytes(path.read_bytes() + b"0"), "longer"),
        (lambda path: os.truncate(path, LIMIT + 1), "longer"),
        (lambda path: path.unlink(), "missing"),
    ],
    ids=["changed", "truncated", "emptied", "lengthened", "oversize", "removed"],
)
def test_a_file_that_is_not_the_published_one_is_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch, name: str, harm: Callable[[Path], Any], word: str
) -> None:
    """By the check of the set and by the functions that load it, before the file is unpickled."""
    harm(models / name)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    refused(lambda: check_manifest(models), name, word)
    load = {"model.pt": lambda: load_weights(models / name), "scores.json": lambda: load_scores(str(models))}
    refused(load.get(name, lambda: load_experts(str(models))), name, word)


def test_a_model_that_is_not_listed_is_refused(models: Path) -> None:
    """It would become an expert. Other files in the folder are not loaded and need not be listed."""
    for name in ("site.pt", "model.ts", "notes.txt"):
        (models / name).write_bytes(b"x")
    check_manifest(models)
    save_atomically({"weight": torch.ones(50)}, models / "model_B.pt")
    refused(lambda: check_manifest(models), "model_B.pt", "not in manifest.json")
    refused(lambda: load_experts(str(models)), "model_B.pt")
    refused(lambda: load_experts(str(models), ["B"]), "model_B.pt")
    assert list(load_experts(str(models), ["A"])) == ["A"]


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("name", ["model.pt", "model_A.pt", "scores.json"])
def test_links_that_lead_out_of_the_folder_are_refused(models: Path, published: bool, name: str) -> None:
    """Even if they lead to the published bytes; links within the folder and to the folder are allowed."""
    elsewhere = models.parent / "elsewhere"
    (models / name).rename(elsewhere)
    (models / name).symlink_to(elsewhere)
    if not published:
        (models / "manifest.json").unlink()
    refused(lambda: read_checked(models / name), name, "link")
    (models / name).unlink()
    elsewhere.rename(models / "kept")
    (models / name).symlink_to("kept")
    (models.parent / "linked").symlink_to(models)
    assert read_checked(models.parent / "linked" / name) == (models / "kept").read_bytes()


@pytest.mark.parametrize("target", ["out", "nowhere", "manifest.json"])
def test_a_manifest_that_is_a_link_is_refused(models: Path, target: str) -> None:
    """A broken link, or one that leads out of the folder or to itself."""
    (models / "manifest.json").rename(models.parent / "out")
    (models / "manifest.json").symlink_to(models.parent / "out" if target == "out" else target)
    refused(lambda: load_weights(models / "model.pt"), "manifest.json")


@pytest.mark.parametrize("name", ["", ".", "..", "../model.pt", "a/model.pt", "/model.pt", "a\\b.pt", "a\0b"])
def test_names_that_are_paths_are_refused(models: Path, name: str) -> None:
    refused(lambda: plain_name(name), "plain name")
    change_manifest(models, lambda manifest: manifest["files"].update({name: manifest["files"]["model.pt"]}))
    refused(lambda: check_manifest(models), "manifest.json", "plain name")


GOOD = {"format": 1, "architecture": {}, "sites": [], "terms": "", "files": {}}
BROKEN = {
    "empty": "",
    "list": "[]",
    "nothing": "{}",
    "deep": "[" * 10**5,
    "other format": json.dumps({**GOOD, "format": 2}),
    "list of files": json.dumps({**GOOD, "files": []}),
    "no entry": json.dumps({**GOOD, "files": {"model.pt": 1}}),
    "size is text": json.dumps({**GOOD, "files": {"model.pt": {"size": "1", "sha256": "0"}}}),
    "no sum": json.dumps({**GOOD, "files": {"model.pt": {"size": 1}}}),
    "no architecture": json.dumps({**GOOD, "architecture": 3}),
    "no terms": json.dumps({**GOOD, "terms": None}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_manifest_is_named(models: Path, content: str) -> None:
    (models / "manifest.json").write_text(content)
    refused(lambda: load_weights(models / "model.pt"), "manifest.json")


def test_a_manifest_that_is_too_large_is_refused(models: Path) -> None:
    os.truncate(models / "manifest.json", 2**24 + 1)
    refused(lambda: read_manifest(models), "manifest.json", "too large")


def test_settings_come_from_the_manifest_if_there_is_one(models: Path) -> None:
    assert setting(models, "features", 32) == 8
    assert setting(models, "slices", 3) == 3
    assert setting(models.parent, "features", 32) == 32
    change_manifest(models, lambda manifest: manifest["architecture"].update(features=[4, 8, 16, 32, 64, 4]))
    assert setting(models, "features", 32) == [4, 8, 16, 32, 64, 4]


@pytest.mark.parametrize("value", [0, -1, 10**6, 1.5, True, "32", "$print()", None, [], [8, "x"], {"a": 1}])
def test_settings_that_are_not_widths_are_refused(models: Path, value: Any) -> None:
    """A value from a file reaches a config as a number or not at all."""
    change_manifest(models, lambda manifest: manifest["architecture"].update(features=value))
    refused(lambda: setting(models, "features", 32), "manifest.json", "features")


@pytest.mark.parametrize("value", [-1, True, "90", None, [90], float("inf")])
def test_a_field_of_view_that_is_not_a_number_from_0_is_refused(models: Path, value: Any) -> None:
    assert setting(models, "field_of_view", 0.0) == 0.0
    change_manifest(models, lambda manifest: manifest["architecture"].update(field_of_view=90))
    assert setting(models, "field_of_view", 0.0) == 90
    change_manifest(models, lambda manifest: manifest["architecture"].update(field_of_view=value))
    refused(lambda: setting(models, "field_of_view", 0.0), "manifest.json")


@pytest.mark.parametrize("value", [3, None, ["index"]])
def test_a_setting_of_another_type_than_its_default_is_refused(models: Path, value: Any) -> None:
    """A dictionary, with one text per site, is allowed in place of a text."""
    change_manifest(models, lambda manifest: manifest["architecture"].update(coding={"A": "index"}))
    assert setting(models, "coding", "auto") == {"A": "index"}
    change_manifest(models, lambda manifest: manifest["architecture"].update(coding=value))
    refused(lambda: setting(models, "coding", "auto"), "manifest.json", "coding")


def test_training_may_replace_the_files_that_it_writes(models: Path) -> None:
    """And only those: the other files must still be the published ones."""
    release(models, ["model.pt", "model_NEW.pt"])
    assert list(load_experts(str(models))) == ["A", "ISBI_1.5"]
    for name in ("model.pt", "model_NEW.pt"):
        save_atomically({"weight": torch.ones(50)}, models / name)
    check_manifest(models)
    assert float(load_weights(models / "model.pt")["weight"][0]) == 1
    assert list(load_experts(str(models), equal_too=True)) == ["A", "ISBI_1.5", "NEW"]
    assert setting(models, "features", 32) == 8
    flip_a_bit(models / "model_A.pt")
    refused(lambda: load_experts(str(models)), "model_A.pt", "changed")


def test_releasing_what_was_never_published_changes_nothing(tmp_path: Path) -> None:
    release(tmp_path, ["model.pt"])
    assert list(tmp_path.iterdir()) == []
    refused(lambda: check_manifest(tmp_path), "not published")


@pytest.mark.parametrize("terms", ["", "  ", "two\nlines", None])
def test_a_set_without_terms_is_not_written(models: Path, terms: Any) -> None:
    refused(lambda: write_manifest(models, {}, terms), "terms")


def test_a_set_without_a_global_model_is_not_written(models: Path) -> None:
    (models / "model.pt").unlink()
    refused(lambda: write_manifest(models, {}, "research"), "model.pt")
