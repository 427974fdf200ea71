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
"""What the models of a folder were trained with: network, size, channels; written by training, checked at use.

A network runs without an error on images of another size or normalisation, but its masks are wrong. The
``architecture`` of ``manifest.json`` holds the settings that must be the same: network, image size, channels,
normalisation, crop; and others for information, such as the coding of the masks.
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
# for information: masks of other sites may be coded in another way
FREE = ("coding", "codings")
# a setting that each site's pictures decide agrees with any value
BY_SITE = "auto"
WIDTHS = (1, 2, 4, 8, 16, 1)  # of the levels of a U-Net, in units of the first


def unet_features(features: int | Sequence[int]) -> list[int]:
    """The six widths of a `BasicUNet`: as they are given, or from the width of its first level.

    Args:
        features: the six widths; or the first, which doubles at each of the four levels below.
    """
    return [features * width for width in WIDTHS] if isinstance(features, int) else list(features)


def describe_architecture(values: Mapping[str, Any], network_def: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a manifest says of the models that are trained with these settings.

    Args:
        values: such as ``image_size``, ``features``, ``normalise``.
        network_def: how the network is built; None: as in the config in which this is evaluated.
    """
    if network_def is None:
        workflow: Any = running_workflow()
        network_def = network_of(workflow.parser.config) if workflow is not None else {}
    network = dict(network_def)
    whole = {**({NETWORK: network} if network else {}), **values}
    return json.loads(json.dumps(whole, default=str))


def network_of(config: Any) -> dict[str, Any]:
    """How the network of a config would be built, references as values; none where it has no ``network_def``."""
    # a parser of its own: one that has resolved a component without building it would never build it
    parser = ConfigParser({key: value for key, value in config.items() if key not in STEPS or key == "imports"})
    item = parser.get_parsed_content(NETWORK, instantiate=False) if NETWORK in parser else None
    return dict(item.get_config()) if isinstance(item, ConfigComponent) else {}


def write_architecture(ckpt_dir: str | os.PathLike, architecture: Mapping[str, Any]) -> None:
    """Write into a folder what the models that come there are trained with; a published set keeps its manifest."""
    if published_files(ckpt_dir) is not None:
        return
    versions = {"shared_iopfl": __version__, "torch": torch.__version__, "monai": monai.__version__}
    content = {"format": FORMAT, "architecture": dict(architecture), "versions": versions}
    if read_manifest(ckpt_dir) != content:
        write_json(Path(ckpt_dir) / MANIFEST, content)


def check_architecture(
    ckpt_dir: str | os.PathLike, values: Mapping[str, Any], match: bool = True, network_def: Any = None
) -> None:
    """Compare the settings with which models are run with those with which they were trained.

    For models without a manifest, a warning says that nothing could be compared.

    Args:
        ckpt_dir: folder of the models.
        values, network_def: as for :func:`describe_architecture`.
        match: False: differences are intended and not reported.

    Raises:
        InputError: naming the first setting that differs, both values, and what to do.
    """
    manifest = read_manifest(ckpt_dir)
    if manifest is None:
        if match and any(MODEL_FILE.fullmatch(path.name) for path in Path(ckpt_dir).glob("*.pt")):
            given = ", ".join(f"{name} {value}" for name, value in values.items())
            logger.warning(
                "%s has no %s: its models are run with %s, whatever they were trained with", ckpt_dir, MANIFEST, given
            )
        return
    difference = _difference(manifest["architecture"], describe_architecture(values, network_def)) if match else None
    if difference is not None:
        name, trained, asked = difference
        raise InputError(
            f"--{name} {asked} contradicts {Path(ckpt_dir) / MANIFEST}: these models were trained with {trained}; "
            "leave it out, or run them so all the same with --match_manifest False."
        )


def check_training(ckpt_dir: str | os.PathLike, architecture: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise `InputError` where training would put models among others that were trained with something else.

    Args:
        ckpt_dir: the folder.
        architecture: as of :func:`describe_architecture`.
        names: of the files that training writes.
    """
    manifest = read_manifest(ckpt_dir)
    there = sorted(path.name for path in Path(ckpt_dir).glob("*.pt") if MODEL_FILE.fullmatch(path.name))
    others = [name for name in there if name not in names]
    if manifest is None or not others:
        return
    difference = _difference(manifest["architecture"], architecture)
    if difference is not None:
        name, trained, asked = difference
        raise InputError(
            f"{Path(ckpt_dir) / others[0]} was trained with {name} {trained}, and would lie beside models of {name} "
            f"{asked}: choose another --ckpt_dir (or --output_dir), or move it away."
        )


def _difference(trained: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that both name and that differs, with both values."""
    same_network = NETWORK in trained and trained[NETWORK] == asked.get(NETWORK)
    for name in sorted(trained.keys() & asked.keys(), key=lambda name: name == NETWORK):  # the network last
        one, other = trained[name], asked[name]
        # a network may be described by its features in two ways
        if one in (other, BY_SITE) or name in FREE or (name == "features" and same_network):
            continue
        if name != NETWORK:
            return name, one, other
        return next(_parts(one, other), None)
    return None


def _parts(trained: Any, asked: Any) -> Iterator[tuple[str, Any, Any]]:
    """What of a network's arguments differs; what one side leaves out is a default, which may be the same."""
    if not isinstance(trained, Mapping) or not isinstance(asked, Mapping):
        yield NETWORK, trained, asked
        return
    if trained.get("_target_") != asked.get("_target_"):
        yield f"{NETWORK}#_target_", trained.get("_target_"), asked.get("_target_")
    for name in sorted(trained.keys() & asked.keys()):
        if trained[name] != asked[name]:
            yield f"{NETWORK}#{name}", trained[name], asked[name]
