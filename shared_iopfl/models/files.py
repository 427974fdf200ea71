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
"""Model files: their paths, and functions to write, read and check them."""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from monai.handlers import CheckpointLoader
from torch import Tensor, nn

from shared_iopfl.models.manifest import (
    LIMIT,
    MODEL_FILE,
    SCORES,
    plain_name,
    published_files,
    read_checked,
    read_manifest,
)
from shared_iopfl.models.weights import all_finite, check_experts, equal_weights
from shared_iopfl.utils.checks import has_negative_variance, number
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import whole_file
from shared_iopfl.utils.names import PRESET_NAMES, check_site
from shared_iopfl.utils.reading import parse_json, read_json

GLOBAL = "global"
USUAL_SHIFT = "usual_shift"  # key in scores.json beside the names of the experts
HALF = {torch.float16, torch.bfloat16}
INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
DTYPES = HALF | INTEGERS | {torch.float32, torch.float64, torch.bool}  # all types that the networks here have


def model_path(ckpt_dir: str, model: str = GLOBAL, site: str = "") -> str:
    """Return the path of a model.

    Args:
        ckpt_dir: Folder of the models.
        model: "global", "routed" or the name of a preset, which routes from the global model, for ``model.pt``;
            "personalised" for ``model_<site>.pt``; any other name for ``model_<model>.pt``, such as the expert of
            another site.
        site: Site of the personalised model.

    Raises:
        InputError: If the name leads out of the folder.
    """
    if model in (GLOBAL, "routed", *PRESET_NAMES):
        return str(Path(ckpt_dir) / "model.pt")
    return str(Path(ckpt_dir) / plain_name(f"model_{site if model == 'personalised' else model}.pt"))


def trained_files(ckpt_dir: str, site: str, as_client: bool = False) -> list[str]:
    """Return the paths of the files that training at a site writes.

    Args:
        ckpt_dir: Folder of the models.
        site: Name of the site.
        as_client: Whether a MONAI FL client trains, which also writes its last model.
    """
    names = [plain_name(f"model_{site}.pt")]
    return [str(Path(ckpt_dir) / name) for name in ("model.pt", *names, *["model_final.pt"] * as_client)]


def save_atomically(content: Any, path: str | os.PathLike, previous: str | os.PathLike | None = None) -> None:
    """Save by `torch.save`, completely or not at all, so that after a crash the earlier file can still be loaded.

    Args:
        content: Object to save.
        path: Path of the file.
        previous: Path to which an earlier file is moved, as in `whole_file`.
    """
    with whole_file(path, previous) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch raises it for a full disk
            raise OSError(f"the disk is full or fails: {str(error).splitlines()[0]}") from error


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Load a plain state_dict on the CPU, without executing anything in the file.

    A file of a published set is first compared with its manifest. Half precision, in which a set may be stored, is
    converted to float32.

    Args:
        path: Path of the file.

    Raises:
        InputError: If there is no such file, it is not the published one, or it contains anything but finite, dense
            tensors by name; also for a negative variance.
    """
    content = read_checked(path)
    if content is None:
        raise InputError(
            f"no model at {path}: this folder has no trained weights; train them first (federate.json, train.json), "
            "or give the folder of the models with --ckpt_dir."
        )
    try:
        _check_archive(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):  # the message of torch recommends to trust the file
            reason = "it is damaged or contains more than tensors"
        raise InputError(f"cannot read the model {path}: {reason[:160]}; train or download it again.") from error
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise InputError(f"{path} is not a plain state_dict (name -> tensor); save the network's state_dict() alone.")
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > LIMIT:
        raise InputError(f"{path} has more than {LIMIT} bytes of tensors; train or download it again.")
    return {key: _checked(tensor, key, path) for key, tensor in state.items()}


def _check_archive(content: bytes) -> None:
    """Raise unless this is an archive as `torch.save` writes it, undamaged and not compressed."""
    if not content.startswith(b"PK\3\4"):  # torch has other formats only for files of before 2020
        raise zipfile.BadZipFile("it is not a file of torch.save, or damaged")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(member.file_size for member in archive.infolist()) > len(content):
            raise zipfile.BadZipFile("it unpacks to more than its size")
        if archive.testzip() is not None:  # torch does not notice a flipped bit
            raise zipfile.BadZipFile("it is damaged: a checksum is wrong")


def _checked(tensor: Tensor, key: str, path: str | os.PathLike) -> Tensor:
    is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in DTYPES
    # a tensor that repeats few numbers by its strides is small in the file and could fill the memory
    if not is_dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(f"{path} has something other than a plain tensor in '{key}'; save the state_dict() alone.")
    if not all_finite(tensor):
        raise InputError(f"{path} has NaN or infinite values in '{key}'; train or download it again.")
    if has_negative_variance(key, tensor):
        raise InputError(f"{path} has negative variances in '{key}'; train or download it again.")
    return tensor.float() if tensor.dtype in HALF else tensor


def load_experts(
    ckpt_dir: str, sites: Sequence[str] | None = None, equal_too: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Load the personalised models of a folder, ``model_<site>.pt``: site -> state_dict.

    Args:
        ckpt_dir: Folder of the models.
        sites: Names of the sites; None for all that the folder or its manifest has, in alphabetical order.
        equal_too: Whether to include models that are equal to the global one, which add nothing to a routing space.

    Raises:
        InputError: As for :func:`load_weights`, and for a model that the manifest does not list.
    """
    if sites is None:
        files = published_files(ckpt_dir) or {}
        published = {name for name, entry in files.items() if not entry.get("released")}
        names = published | {path.name for path in Path(ckpt_dir).glob("model_*.pt")}
        sites = [match[1] for name in sorted(names) if (match := MODEL_FILE.fullmatch(name)) and match[1]]
        if not files:
            _check_named(sites, Path(ckpt_dir))
    sites = [check_site(site) for site in ([sites] if isinstance(sites, str) else sites)]
    _check_times(ckpt_dir)
    models = {site: load_weights(model_path(ckpt_dir, "personalised", site)) for site in sites}
    if equal_too or not models or not os.path.isfile(model_path(ckpt_dir)):
        return models
    shared = load_weights(model_path(ckpt_dir))
    return {site: model for site, model in models.items() if not equal_weights(model, shared)}


def _check_named(sites: Sequence[str], folder: Path) -> None:
    """Raise `InputError` if the folder of a federation has the model of a site that took no part in it."""
    path = folder.absolute().parent / "run.json"
    run = read_json(path) if folder.absolute().name == "models" and path.is_file() else None
    settings = run.get("settings") if isinstance(run, dict) and run.get("kind") == "federate" else None
    named = settings.get("sites") if isinstance(settings, dict) else None
    strangers = [site for site in sites if site not in named] if isinstance(named, list) else []
    if strangers:
        raise InputError(
            f"{folder} holds model_{strangers[0]}.pt, of a site that {path} does not name: move the file away, or name "
            "the sites with --sites."
        )


def _check_times(ckpt_dir: str) -> None:
    """Raise `InputError` in a process of MONAI Label if models have the same modification time.

    MONAI Label keeps one network across requests and recognises another model file by this time alone. With equal
    times, as some archives unpack them, the first model would answer all requests.
    """
    if "monailabel" not in sys.modules:
        return
    times: dict[float, str] = {}
    for path in sorted(Path(ckpt_dir).glob("*.pt")):
        other = times.setdefault(path.stat().st_mtime, path.name)
        if other != path.name:
            raise InputError(
                f"{other} and {path.name} in {ckpt_dir} have the same modification time, by which alone MONAI Label "
                "distinguishes models: give each file a different time (touch)."
            )


def load_scores(ckpt_dir: str) -> dict[str, float] | None:
    """Load the published ``scores.json`` of a folder.

    Args:
        ckpt_dir: Folder of the models.

    Returns:
        Dice of each expert at the other sites, in [0, 1], and under `USUAL_SHIFT` the mean distance of the inside
        sites' validation cases from the global model, which has no unit. Unknown values (null) are left out. None if
        there is no such file.

    Raises:
        InputError: If a value is out of its range.
    """
    path = Path(ckpt_dir) / SCORES
    content = read_checked(path)
    if content is None:
        return None
    scores = parse_json(content, path)
    if not isinstance(scores, dict):
        raise InputError(f"{path} must be a JSON object, expert -> Dice; download the models again, or correct it.")
    known = {name: value for name, value in scores.items() if value is not None}
    for name, value in known.items():
        rule = number(0) if name == USUAL_SHIFT else number(0, 1)
        if not rule.holds(value):
            raise InputError(f"{path} has '{name}': {value!r:.80}; it must be {rule.allowed}, or null if unknown.")
    return {name: float(value) for name, value in known.items()}


def check_models(ckpt_dir: str) -> None:
    """Read everything that routing reads of a folder, and raise `InputError` for the first fault."""
    load_experts(ckpt_dir, equal_too=True)
    load_weights(model_path(ckpt_dir))
    load_scores(ckpt_dir)


class CheckedCheckpointLoader(CheckpointLoader):
    """MONAI's `CheckpointLoader` for one network, with messages of one line that name the file and the difference.

    Args:
        load_path: Path of the model file.
        network: Network to load it into.
    """

    def __init__(self, load_path: str, network: nn.Module) -> None:
        super().__init__(load_path, {"model": network})
        self.network = network

    def __call__(self, engine: Engine) -> None:
        state = load_weights(self.load_path)
        try:
            check_experts(self.network, {self.load_path: state})
        except InputError as error:
            if read_manifest(Path(self.load_path).parent) is not None:
                raise
            hint = "Its folder has no manifest.json: give --features and --image_size as in its training."
            raise InputError(f"{error} {hint}") from None  # without a cause, whose message would be shown instead
        self.network.load_state_dict(state)
