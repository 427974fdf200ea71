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
"""Checkpoints during training: a model file is replaced whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.handlers import CheckpointSaver

from shared_iopfl.models.files import save_atomically


class ModelSaver(CheckpointSaver):
    """MONAI's `CheckpointSaver`, by which a disk that is full costs no model that was there before.

    MONAI's own removes the best model so far, then writes the next in its place. Here each goes to a temporary file
    first, which takes the model's name once it is complete.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for checkpoint in (self._final_checkpoint, self._key_metric_checkpoint, self._interval_checkpoint):
            if checkpoint is not None:
                saver: Any = checkpoint.save_handler
                whole: Any = _WholeFile(Path(saver.dirname), saver.filename, saver.save_on_rank)
                checkpoint.save_handler = whole


class _WholeFile:
    """What ignite's `Checkpoint` saves with; a callable, and `remove` for a model that is no longer among the best."""

    def __init__(self, folder: Path, name: str | None, rank: int) -> None:
        self.folder = folder
        self.name = name  # of a file that is replaced by the next model
        self.rank = rank

    def _is_ours(self) -> bool:
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        return not ready or torch.distributed.get_rank() == self.rank

    def __call__(self, checkpoint: Mapping, filename: str, metadata: Mapping | None = None) -> None:
        if self._is_ours():
            save_atomically(checkpoint, self.folder / (self.name or filename))

    def remove(self, filename: str) -> None:
        if self.name is None and self._is_ours():
            (self.folder / filename).unlink()
