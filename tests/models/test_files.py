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
"""Model files: written completely or not at all, read without executing anything, and refused by one line if faulty."""

from __future__ import annotations

import os
import pickle
import stat
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from networks import unet

from shared_iopfl.models.files import (
    CheckedCheckpointLoader,
    load_experts,
    load_scores,
    load_weights,
    model_path,
    save_atomically,
    trained_files,
)
from shared_iopfl.models.manifest import LIMIT
from shared_iopfl.utils.errors import InputError

STATE = {"weight": torch.arange(3.0), "count": torch.tensor(2)}


class Hostile:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def one_line(path: Path) -> str:
    """The message of the `InputError` that reading raises; one line, with the file in it."""
    with pytest.raises(InputError) as error:
        load_weights(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_weights_come_back_as_they_were_saved(tmp_path):
    save_atomically(STATE, tmp_path / "new" / "model.pt")
    loaded = load_weights(tmp_path / "new" / "model.pt")
    assert list(loaded) == list(STATE)
    assert all(torch.equal(loaded[key], STATE[key]) and loaded[key].dtype == STATE[key].dtype for key in STATE)


def test_the_umask_decides_who_may_read_a_model(tmp_path):
    """A temporary file has mode 0600, which a published model must not keep."""
    old = os.umask(0o022)
    try:
        save_atomically(STATE, tmp_path / "model.pt")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "model.pt").stat().st_mode) == 0o644


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("disk\nfull"), OSError(28, "No space left")])
def test_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure):
    save_atomically(STATE, tmp_path / "model.pt")

    def fail(content: Any, path: Path) -> None:
        Path(path).write_bytes(b"half a fi")
        raise failure

    monkeypatch.setattr(torch, "save", fail)
    kind = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else InputError
    with pytest.raises(kind) as error:
        save_atomically({"weight": torch.zeros(3)}, tmp_path / "model.pt")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert torch.equal(load_weights(tmp_path / "model.pt")["weight"], STATE["weight"])


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        save_atomically(STATE, tmp_path / "file" / "model.pt")


def test_missing_and_broken_files_end_in_one_line(tmp_path):
    assert "no model" in one_line(tmp_path / "model.pt")
    (tmp_path / "folder.pt").mkdir()
    assert "no model" in one_line(tmp_path / "folder.pt")
    save_atomically(STATE, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    broken = {"empty": b"", "text": b"hello", "half": content[: len(content) // 2], "zip": b"PK\3\4" * 9}
    for name, wrong in broken.items():
        (tmp_path / f"{name}.pt").write_bytes(wrong)
        assert "cannot read" in one_line(tmp_path / f"{name}.pt")


@pytest.mark.parametrize("content", [[torch.ones(1)], {"model": STATE}, {"w": 3.0}, torch.ones(2), {1: torch.ones(1)}])
def test_anything_but_a_plain_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    assert "state_dict" in one_line(tmp_path / "model.pt")


def test_nothing_in_a_file_is_executed(tmp_path):
    """A pickle that would run code, plain or in torch's own format, is refused and does not run."""
    proof = tmp_path / "executed"
    Hostile(proof).__reduce__()[0](str(proof))
    proof.rmdir()  # it would work
    torch.save({"weight": Hostile(proof)}, tmp_path / "new.pt")
    torch.save({"weight": Hostile(proof)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(proof)))
    for name in ("new", "legacy", "plain"):
        message = one_line(tmp_path / f"{name}.pt")
        assert "weights_only" not in message, "the message must not recommend to trust the file"
    assert not proof.exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_single(tmp_path, dtype):
    """Integers keep their type, and the values are exactly those of half precision."""
    state = {"weight": torch.tensor([0.1, -3.0]).to(dtype), "count": torch.tensor(2)}
    save_atomically(state, tmp_path / "model.pt")
    loaded = load_weights(tmp_path / "model.pt")
    assert {key: tensor.dtype for key, tensor in loaded.items()} == {"weight": torch.float32, "count": torch.int64}
    assert torch.equal(loaded["weight"], state["weight"].float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(tmp_path, value):
    save_atomically({"fine": torch.ones(2), "broken": torch.tensor([1.0, value])}, tmp_path / "model.pt")
    assert "'broken'" in one_line(tmp_path / "model.pt")


def test_negative_variances_are_refused(tmp_path):
    save_atomically({"norm.running_var": torch.tensor([1.0, -1.0])}, tmp_path / "model.pt")
    assert "'norm.running_var'" in one_line(tmp_path / "model.pt")


def test_a_flipped_bit_is_noticed(tmp_path):
    """In the numbers of a tensor, where the file can still be loaded by torch."""
    save_atomically({"weight": torch.zeros(10**4)}, tmp_path / "model.pt")
    content = bytearray((tmp_path / "model.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.pt").write_bytes(content)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["weight"].count_nonzero() == 1
    assert "checksum" in one_line(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, device="meta"),
        torch.ones(1).expand(10**8),
    ],
    ids=["sparse", "complex", "meta", "expanded"],
)
def test_tensors_of_other_kinds_are_refused(tmp_path, tensor):
    torch.save({"odd": tensor}, tmp_path / "model.pt")
    assert "'odd'" in one_line(tmp_path / "model.pt") or "cannot read" in one_line(tmp_path / "model.pt")


def test_a_small_file_of_huge_tensors_is_refused(tmp_path):
    """The tensors repeat their numbers, the archive is compressed, or the file is large: no memory is filled."""
    many = torch.ones(1).expand(LIMIT // 8)
    torch.save({"one": many, "two": many, "three": many}, tmp_path / "strides.pt")
    assert "bytes of tensors" in one_line(tmp_path / "strides.pt")
    save_atomically({"weight": torch.zeros(10**6)}, tmp_path / "model.pt")
    with (
        zipfile.ZipFile(tmp_path / "model.pt") as plain,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "packed.pt").stat().st_size < 10**5
    assert "unpacks" in one_line(tmp_path / "packed.pt")
    os.truncate(tmp_path / "model.pt", LIMIT + 1)  # a hole: it takes no room
    assert "too large" in one_line(tmp_path / "model.pt")


def test_formats_before_the_archive_are_refused(tmp_path):
    """Torch reads them by other code, which no file of today needs."""
    torch.save(STATE, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    assert "not a file of torch.save" in one_line(tmp_path / "model.pt")
    save_atomically(STATE, tmp_path / "whole.pt")
    (tmp_path / "both.pt").write_bytes((tmp_path / "model.pt").read_bytes() + (tmp_path / "whole.pt").read_bytes())
    assert "not a file of torch.save" in one_line(tmp_path / "both.pt")


def test_experts_of_a_folder(tmp_path):
    """Every model_<site>.pt, in order, but neither the global model nor other files; or those of the given sites."""
    assert load_experts(str(tmp_path)) == {}
    assert load_experts(str(tmp_path / "missing")) == {}
    for name in ("model_UCL", "model_BIDMC", "model_ISBI_1.5", "model_final", ".model_half", "other"):
        save_atomically(STATE, tmp_path / f"{name}.pt")
    assert list(load_experts(str(tmp_path))) == ["BIDMC", "ISBI_1.5", "UCL"]
    assert list(load_experts(str(tmp_path), ["UCL", "BIDMC"])) == ["UCL", "BIDMC"]
    assert list(load_experts(str(tmp_path), "UCL")) == ["UCL"]
    with pytest.raises(InputError, match=r"model_HK\.pt"):
        load_experts(str(tmp_path), ["HK"])


def test_site_that_kept_the_global_model_adds_no_expert(tmp_path):
    """Otherwise the routing space would contain the global model twice."""
    for name in ("model", "model_A"):
        save_atomically(STATE, tmp_path / f"{name}.pt")
    own = {key: tensor + 1 for key, tensor in STATE.items()}
    save_atomically(own, tmp_path / "model_B.pt")
    assert list(load_experts(str(tmp_path))) == ["B"]
    assert list(load_experts(str(tmp_path), equal_too=True)) == ["A", "B"]


def test_models_with_equal_modification_times_are_refused_in_monai_label(tmp_path, monkeypatch):
    """MONAI Label distinguishes models by this time; elsewhere it does not matter, and it is never changed."""
    names = ("model.pt", "model_A.pt", "model_B.pt")
    for name, time in zip(names, (50, 49, 50)):
        save_atomically(STATE, tmp_path / name)
        os.utime(tmp_path / name, (time, time))
    load_experts(str(tmp_path))
    monkeypatch.setitem(sys.modules, "monailabel", ModuleType("monailabel"))
    with pytest.raises(InputError, match=r"model\.pt and model_B\.pt"):
        load_experts(str(tmp_path))
    assert [(tmp_path / name).stat().st_mtime for name in names] == [50, 49, 50]
    os.utime(tmp_path / "model_B.pt", (51, 51))
    load_experts(str(tmp_path))


def test_paths_of_models():
    folder = "models"
    for name in ("global", "routed", "soup", "paper"):
        assert model_path(folder, name, "HK") == str(Path(folder, "model.pt"))
    assert model_path(folder, "personalised", "HK") == str(Path(folder, "model_HK.pt"))
    assert model_path(folder, "BIDMC", "HK") == str(Path(folder, "model_BIDMC.pt"))


@pytest.mark.parametrize("site", ["../elsewhere", "a/b", "/etc/passwd", "a\\b"])
def test_no_name_of_a_site_leads_out_of_the_folder(tmp_path, site):
    """For reading and for writing."""
    for action in (lambda: model_path("models", "personalised", site), lambda: load_experts(str(tmp_path), [site])):
        with pytest.raises(InputError, match=r"no name that a site may have|not a plain name"):
            action()


def test_scores_of_a_folder(tmp_path):
    """Published scores without unknown ones; None without a file; one line for a faulty file."""
    assert load_scores(str(tmp_path)) is None
    (tmp_path / "scores.json").write_text('{"global": 0.8, "A": null}')
    assert load_scores(str(tmp_path)) == {"global": 0.8}
    for content in ('{"global": 0.8', "[1]", '{"global": []}'):
        (tmp_path / "scores.json").write_text(content)
        with pytest.raises(InputError, match=r"scores\.json"):
            load_scores(str(tmp_path))


def test_checkpoint_loader_loads_at_the_start_of_a_run(tmp_path):
    network = unet(0)
    save_atomically(unet(1).state_dict(), tmp_path / "model.pt")
    engine = Engine(lambda engine, batch: None)
    CheckedCheckpointLoader(str(tmp_path / "model.pt"), network).attach(engine)
    engine.run([0])
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), unet(1).state_dict().values()))


def test_checkpoint_loader_names_file_and_key_and_leaves_the_network(tmp_path):
    network = unet(0)
    path = str(tmp_path / "model.pt")
    save_atomically(unet(1, outputs=3).state_dict(), path)
    with pytest.raises(InputError) as error:
        CheckedCheckpointLoader(path, network)(Engine(lambda engine, batch: None))
    assert path in str(error.value)
    assert "model.2.conv.weight" in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), unet(0).state_dict().values()))


def test_the_files_that_training_writes() -> None:
    assert trained_files("models", "A") == ["models/model.pt", "models/model_A.pt"]
    assert trained_files("models", "A", as_client=True)[2:] == ["models/model_final.pt"]
    with pytest.raises(InputError):
        trained_files("models", "../A")
