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
"""The architecture of the models of a folder: their network and settings, written by training and compared before use.

A network runs without an error on images of another size or normalisation, but its masks are wrong. The
``architecture`` in ``manifest.json`` therefore records the settings that must be the same (network, image size,
channels, normalisation, crop), and others for information, such as the coding of the masks.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import monai
import torch
from monai.bundle import ConfigComponent, ConfigParser

from shared_iopfl import __version__
from shared_iopfl.models.manifest import FORMAT, MANIFEST, MODEL_FILE, published_files, read_manifest
from shared_iopfl.utils.config_values import STEPS, running_workflow
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import write_json

logger = logging.getLogger(__name__)
NETWORK = "network_def"
# settings that are recorded but not compared, because the masks of other sites may be coded differently
FREE = ("coding", "codings")
BY_SITE = "auto"  # value of a setting that depends on the pictures of each site; it agrees with any other
WIDTHS = (1, 2, 4, 8, 16, 1)  # of the levels of a U-Net, in units of the first


def unet_features(features: int | Sequence[int]) -> list[int]:
    """Return the six widths of a `BasicUNet`.

    Args:
        features: The six widths, or the first of them, which doubles at each of the four levels below.
    """
    return [features * width for width in WIDTHS] if isinstance(features, int) else list(features)


def describe_architecture(values: Mapping[str, Any], network_def: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the architecture in the form in which a manifest records it.

    Args:
        values: Settings such as ``image_size``, ``features``, ``normalise``.
        network_def: Definition of the network; None takes that of the config in which this is evaluated.
    """
    if network_def is None:
        workflow: Any = running_workflow()
        network_def = network_of(workflow.parser.config) if workflow is not None else {}
    network = {NETWORK: dict(network_def)} if network_def else {}
    return json.loads(json.dumps({**network, **values}, default=str))


def network_of(config: Any) -> dict[str, Any]:
    """Return the ``network_def`` of a config with references resolved; empty if the config has none."""
    # in a new parser, because a parser that has resolved a component without building it never builds it
    parser = ConfigParser({key: value for key, value in config.items() if key not in STEPS or key == "imports"})
    item = parser.get_parsed_content(NETWORK, instantiate=False) if NETWORK in parser else None
    return dict(item.get_config()) if isinstance(item, ConfigComponent) else {}


def write_architecture(ckpt_dir: str | os.PathLike, architecture: Mapping[str, Any]) -> None:
    """Write the manifest of a folder before training; a published set keeps its own.

    Args:
        ckpt_dir: Folder of the models.
        architecture: Result of :func:`describe_architecture`.
    """
    if published_files(ckpt_dir) is not None:
        return
    versions = {"shared_iopfl": __version__, "torch": torch.__version__, "monai": monai.__version__}
    content = {"format": FORMAT, "architecture": dict(architecture), "versions": versions}
    if read_manifest(ckpt_dir) != content:
        write_json(Path(ckpt_dir) / MANIFEST, content)


def check_architecture(
    ckpt_dir: str | os.PathLike, values: Mapping[str, Any], match: bool = True, network_def: Any = None
) -> None:
    """Compare the settings of a run with those that its models were trained with.

    If the models have no manifest, a warning says that nothing could be compared.

    Args:
        ckpt_dir: Folder of the models.
        values: Settings of the run, as for :func:`describe_architecture`.
        match: Whether to compare; False if a difference is intended.
        network_def: Definition of the network, as for :func:`describe_architecture`.

    Raises:
        InputError: If a setting differs; the message names the first one, both values, and what to do.
    """
    manifest = read_manifest(ckpt_dir)
    if not match:
        return
    if manifest is None:
        if any(MODEL_FILE.fullmatch(path.name) for path in Path(ckpt_dir).glob("*.pt")):
            given = ", ".join(f"{name} {value}" for name, value in values.items())
            logger.warning(
                "%s has no %s, so that its models cannot be compared with the settings of this run: %s",
                ckpt_dir,
                MANIFEST,
                given,
            )
        return
    if difference := next(_differences(manifest["architecture"], describe_architecture(values, network_def)), None):
        name, trained, asked = difference
        raise InputError(
            f"--{name} {asked} contradicts {Path(ckpt_dir) / MANIFEST}: these models were trained with {trained}; "
            "omit the setting, or use it nevertheless with --match_manifest False."
        )


def check_training(ckpt_dir: str | os.PathLike, architecture: Mapping[str, Any], names: Sequence[str]) -> None:
    """Check that training does not mix models of different architectures in a folder.

    Args:
        ckpt_dir: Folder of the models.
        architecture: Result of :func:`describe_architecture`.
        names: Names of the files that training writes.

    Raises:
        InputError: If the folder has other models, and they were trained with a different architecture.
    """
    manifest = read_manifest(ckpt_dir)
    present = sorted(path.name for path in Path(ckpt_dir).glob("*.pt") if MODEL_FILE.fullmatch(path.name))
    others = [name for name in present if name not in names]
    if manifest is None or not others:
        return
    if difference := next(_differences(manifest["architecture"], architecture), None):
        name, trained, asked = difference
        raise InputError(
            f"{Path(ckpt_dir) / others[0]} was trained with {name} {trained}, and would lie beside models of {name} "
            f"{asked}: choose another --ckpt_dir (or --output_dir), or move it away."
        )


def _differences(trained: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The settings that both name and that differ, with both values; the network comes last."""
    same_network = NETWORK in trained and trained[NETWORK] == asked.get(NETWORK)
    for name in sorted(trained.keys() & asked.keys(), key=lambda name: name == NETWORK):
        one, other = trained[name], asked[name]
        # the same network can be described by two forms of its features
        if one in (other, BY_SITE) or name in FREE or (name == "features" and same_network):
            continue
        yield from _parts(one, other) if name == NETWORK else [(name, one, other)]


def _parts(trained: Any, asked: Any) -> Iterator[tuple[str, Any, Any]]:
    """The arguments of a network that differ; an argument of only one side may be the default of the other."""
    if not isinstance(trained, Mapping) or not isinstance(asked, Mapping):
        yield NETWORK, trained, asked
        return
    if trained.get("_target_") != asked.get("_target_"):
        yield f"{NETWORK}#_target_", trained.get("_target_"), asked.get("_target_")
    for name in sorted(trained.keys() & asked.keys()):
        if trained[name] != asked[name]:
            yield f"{NETWORK}#{name}", trained[name], asked[name]
