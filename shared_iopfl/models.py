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
"""Model files: where they lie, written whole or not at all, and read with care."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from monai.handlers import CheckpointLoader
from torch import Tensor, nn

from shared_iopfl.errors import InputError
from shared_iopfl.files import whole_file
from shared_iopfl.routing import check_experts
from shared_iopfl.settings import PRESETS

__all__ = ["CheckedCheckpointLoader", "load_experts", "load_scores", "load_weights", "model_path", "save_atomically"]

GLOBAL = "global"


def model_path(ckpt_dir: str, model: str = GLOBAL, site: str = "") -> str:
    """Where a model lies.

    Args:
        ckpt_dir: the folder.
        model: "global", or what routes from it ("routed" or a preset's name): ``model.pt``. "personalised":
            ``model_<site>.pt``. Any other: ``model_<model>.pt``, such as another site's expert.
        site: whose personalised model.
    """
    if model in (GLOBAL, "routed", *PRESETS):
        return str(Path(ckpt_dir) / "model.pt")
    return str(Path(ckpt_dir) / f"model_{site if model == 'personalised' else model}.pt")


def save_atomically(content: Any, path: str | os.PathLike) -> None:
    """`torch.save`, whole or not at all: after a crash the last good file still loads."""
    with whole_file(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            raise OSError(str(error).splitlines()[0]) from error


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """A plain state_dict from a file, on the CPU; nothing in the file is executed.

    Raises:
        InputError: where there is no file, or it holds anything but named tensors.
    """
    if not os.path.isfile(path):
        raise InputError(f"no model at {path}: train it first, or give the folder that holds it with --ckpt_dir.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to trust the file
            reason = "it is damaged or holds more than tensors"
        raise InputError(f"cannot read the model {path}: {reason[:160]}; train or download it again.") from error
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise InputError(f"{path} is no plain state_dict (name -> tensor); save the network's state_dict() alone.")
    return dict(state)


def load_experts(ckpt_dir: str, sites: Sequence[str] | None = None) -> dict[str, dict[str, Tensor]]:
    """The personalised models of a folder, site -> state_dict, from ``model_<site>.pt``.

    Args:
        ckpt_dir: the folder.
        sites: which; None: all that are there, in alphabetical order (none at all gives an empty routing space).
    """
    if sites is None:
        names = sorted(path.name for path in Path(ckpt_dir).glob("model_*.pt"))
        sites = [match.group(1) for name in names if (match := re.fullmatch(r"model_(.+)\.pt", name))]
    sites = [sites] if isinstance(sites, str) else sites
    return {site: load_weights(Path(ckpt_dir) / f"model_{site}.pt") for site in sites}


def load_scores(ckpt_dir: str) -> dict[str, float] | None:
    """The published ``scores.json`` of a folder, expert -> mean Dice at the other sites; None where there is none."""
    path = Path(ckpt_dir) / "scores.json"
    if not path.is_file():
        return None
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(value) for name, value in scores.items() if value is not None}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read {path}: {error}; it maps each expert's name to its Dice.") from error


class CheckedCheckpointLoader(CheckpointLoader):
    """MONAI's `CheckpointLoader` for one network, with errors of one line that name the file and the difference."""

    def __init__(self, load_path: str, network: nn.Module) -> None:
        super().__init__(load_path, {"model": network})
        self.network = network

    def __call__(self, engine: Engine) -> None:
        state = load_weights(self.load_path)
        check_experts(self.network, {self.load_path: state})
        self.network.load_state_dict(state)
