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
"""Checkpoints of training: a model file is replaced whole or not at all; a federation's state is checked when read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.handlers import CheckpointSaver
from torch import Tensor

from shared_iopfl.errors import InputError
from shared_iopfl.models import save_atomically

__all__ = ["ModelSaver", "check_state"]


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


def check_state(found: Any, like: Any, path: Path, field: str = "") -> None:
    """Hold what was read to the state of a run that begins: names, types, shapes, and numbers that are finite.

    What a run that begins has none of, such as the moments of an optimiser, may be there, of finite numbers.

    Args:
        found: what was read.
        like: the state of a run that begins.
        path: of the file, for the message.
        field: the place of it in the file.

    Raises:
        InputError: naming file and field.
    """

    def wrong(what: str) -> InputError:
        return InputError(f"{path}: {field or 'its content'} {what}; take the file away, or start afresh.")

    if isinstance(like, Tensor) and not isinstance(found, Tensor):
        raise wrong(f"must be a tensor, but is {found!r:.60}")
    if isinstance(found, Tensor):
        if isinstance(like, Tensor) and (found.shape, found.dtype) != (like.shape, like.dtype):
            given, wanted = ((tuple(tensor.shape), str(tensor.dtype)[6:]) for tensor in (found, like))
            raise wrong(f"must have shape {wanted[0]} of {wanted[1]}, but has {given[0]} of {given[1]}")
        if not torch.isfinite(found).all():
            raise wrong("has NaN or infinite values")
    elif isinstance(like, Mapping) or (like is None and isinstance(found, Mapping)):
        if not isinstance(found, Mapping):
            raise wrong(f"must be a dictionary, but is {found!r:.60}")
        missing = [key for key in like or () if key not in found]
        if missing:
            raise wrong(f"lacks {missing[0]!r}")
        for key, value in found.items():
            check_state(value, (like or {}).get(key), path, f"{field}.{key}".lstrip("."))
    elif isinstance(found, (list, tuple)):
        pairs = zip(found, like) if isinstance(like, (list, tuple)) and len(like) == len(found) else None
        for number, (value, other) in enumerate(pairs or ((value, None) for value in found)):
            check_state(value, other, path, f"{field}.{number}".lstrip("."))
    elif isinstance(found, float) and not math.isfinite(found):
        raise wrong(f"must be finite, but is {found}")
    elif isinstance(like, int) and not (isinstance(found, int) and found >= 0):  # a count, or a switch
        raise wrong(f"must be a whole number from 0, but is {found!r:.60}")
    elif isinstance(like, float) and not isinstance(found, (int, float)):
        raise wrong(f"must be a number, but is {found!r:.60}")
