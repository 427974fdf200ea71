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
"""Model files that training writes: the earlier model is kept if a new one cannot be written."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine

from shared_iopfl.handlers.checkpoints import ModelSaver
from shared_iopfl.utils.errors import InputError


def test_a_full_disk_keeps_the_earlier_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Linear(1, 1)
    saver = ModelSaver(
        save_dir=str(tmp_path), save_dict={"model": network}, save_key_metric=True, key_metric_filename="model.pt"
    )
    engine = Engine(lambda *_: None)
    engine.state.metrics, engine.state.key_metric_name = {"dice": 0.5}, "dice"  # type: ignore[attr-defined]
    saver.metrics_completed(engine)
    first = (tmp_path / "model.pt").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    engine.state.metrics["dice"] = 0.6
    with monkeypatch.context() as patch, torch.no_grad():
        network.weight.fill_(7)
        patch.setattr(torch, "save", full)
        with pytest.raises(InputError, match="No space left on device"):
            saver.metrics_completed(engine)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").read_bytes() == first
    engine.state.metrics["dice"] = 0.7
    saver.metrics_completed(engine)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["weight"].item() == 7
