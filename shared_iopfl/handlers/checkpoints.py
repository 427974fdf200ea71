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
"""Model files that training writes; each is replaced completely or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from monai.handlers import CheckpointSaver

from shared_iopfl.models.files import save_atomically


class ModelSaver(CheckpointSaver):
    """MONAI's `CheckpointSaver`, which keeps the earlier model if a new one cannot be written, as on a full disk.

    MONAI's own class removes the best model before it writes the next one. Here each model is written to a temporary
    file, which takes the name of the model once it is complete.

    Args:
        args: Arguments of `CheckpointSaver`.
        kwargs: Arguments of `CheckpointSaver`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for checkpoint in (self._final_checkpoint, self._key_metric_checkpoint, self._interval_checkpoint):
            if checkpoint is not None:
                saver: Any = checkpoint.save_handler
                whole: Any = _WholeFile(Path(saver.dirname), saver.filename, saver.save_on_rank)
                checkpoint.save_handler = whole


class _WholeFile:
    """The save handler of an ignite `Checkpoint`.

    Args:
        folder: Folder to write to.
        name: Name of the only file, which each model replaces; None if each model has its own name.
        rank: Rank of the process that writes.
    """

    def __init__(self, folder: Path, name: str | None, rank: int) -> None:
        self.folder = folder
        self.name = name
        self.rank = rank

    def __call__(self, checkpoint: Mapping, filename: str, metadata: Mapping | None = None) -> None:
        if idist.get_rank() == self.rank:
            save_atomically(checkpoint, self.folder / (self.name or filename))

    def remove(self, filename: str) -> None:
        """Remove a model that is no longer among the best."""
        if self.name is None and idist.get_rank() == self.rank:
            (self.folder / filename).unlink()
