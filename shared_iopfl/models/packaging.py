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
"""Functions that publish the models of a run, and pack a bundle into a zip archive."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor

from shared_iopfl.models.architecture import describe_architecture
from shared_iopfl.models.bundles import METADATA, find_bundle
from shared_iopfl.models.files import (
    GLOBAL,
    USUAL_SHIFT,
    load_experts,
    load_scores,
    load_weights,
    model_path,
    save_atomically,
)
from shared_iopfl.models.manifest import (
    CALIBRATION,
    MANIFEST,
    SCORES,
    check_manifest,
    check_setting,
    is_published,
    published_files,
    read_checked,
    read_manifest,
    write_manifest,
)
from shared_iopfl.models.weights import check_experts
from shared_iopfl.utils.config_values import as_values
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import whole_file
from shared_iopfl.utils.names import check_file_name
from shared_iopfl.utils.reading import parse_json, read_json
from shared_iopfl.utils.tables import read_rows, write_json

# settings in run.json that describe the architecture of models without a manifest
ARCHITECTURE = ("features", "image_size", "slices")
# settings of a run that concern the machine and not the models
OF_THE_MACHINE = {"dataset_dir", "output_dir", "ckpt_dir", "initial_model", "device"}
OF_THE_MACHINE |= {"verbose", "save_checkpoints", "val_interval"}
# the package is packed into the folder `scripts`, where MONAI looks for the code of a bundle
SCRIPTS = """\
# Importing `scripts` makes the package beside this file importable, whether it is installed or not. MONAI finds
# `scripts` when it runs in the bundle's folder, or with that folder on PYTHONPATH.
import sys
from pathlib import Path

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))
"""
IMPORTS = '"imports": ['


def publish(
    from_dir: str,
    to_dir: str,
    terms: str,
    half: bool = False,
    sites: Sequence[str] | None = None,
    bundle: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> str:
    """Copy the models of a run to the folder of a bundle, with a manifest that describes them.

    Args:
        from_dir: Folder ``models`` of the run, beside its ``run.json`` and ``summary.csv``. If the folder has a
            manifest, as after ``train.json``, ``run.json`` may be missing.
        to_dir: Folder to write to, such as ``bundles/prostate_iopfl/models``.
        terms: Terms of use in one line, as the training data require them.
        half: Whether to store weights in half precision (norms and biases are not); they are loaded as float32.
        sites: Names of the sites whose personalised models are published; None for all.
        bundle: Folder of the bundle that the models belong to; by default the one that contains `to_dir`.
        metrics: Figures to add to the mean scores of the run.
        overwrite: Whether to replace a published set.

    Returns:
        The path of the manifest.

    Raises:
        InputError: If something of the run is missing, a model does not fit the network of the bundle, or `to_dir`
            already has models.
    """
    target, run_dir = Path(to_dir), Path(from_dir).absolute().parent
    models = load_experts(from_dir, sites, equal_too=True)
    models[GLOBAL] = load_weights(model_path(from_dir))
    trained = read_manifest(from_dir) or {}
    run = {} if trained and not (run_dir / "run.json").is_file() else _read_run(run_dir / "run.json")
    settings = run.get("settings", {})
    root = Path(bundle) if bundle else target.absolute().parent
    own = {name: check_setting(name, settings[name], run_dir / "run.json") for name in ARCHITECTURE if name in settings}
    found = _architecture(root, {**({} if trained else own), "ckpt_dir": from_dir}, models)
    architecture = {**trained.get("architecture", {}), **found}
    if half:
        models = {name: _halved(weights, name) for name, weights in models.items()}
    scores = load_scores(from_dir)

    _make_room(target, overwrite)
    if scores is not None:
        write_json(target / SCORES, {name: scores[name] for name in (*models, USUAL_SHIFT) if name in scores})
    if sites is None and (calibration := read_checked(Path(from_dir) / CALIBRATION)) is not None:
        write_json(target / CALIBRATION, parse_json(calibration, from_dir))
    for name, weights in models.items():  # the global model is the last, as an incomplete set does not run without it
        save_atomically(weights, model_path(to_dir, GLOBAL if name == GLOBAL else "personalised", name))
    training = {name: value for name, value in settings.items() if name not in OF_THE_MACHINE}
    figures = {**_mean_scores(run_dir / "summary.csv"), **(metrics or {})}
    versions = {**trained.get("versions", {}), **run.get("versions", {})}
    write_manifest(target, architecture, terms, figures, training, versions)
    return str(target / MANIFEST)


def _read_run(path: Path) -> dict[str, Any]:
    try:
        run = read_json(path)
    except InputError as error:
        raise InputError(f"{error} {path.name} has the settings that the models were trained with.") from error
    parts = [run, *(run.get(name, {}) for name in ("settings", "versions"))] if isinstance(run, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{path} is not the file of a run, with settings and versions: give the models of a run.")
    return run


def _architecture(
    root: Path, settings: Mapping[str, Any], models: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """The architecture of the bundle's inference with the settings of a run, after a check that the models fit it."""
    config = ConfigParser()
    path = root / "configs" / "inference.json"
    if not path.is_file():
        raise InputError(f"no bundle at {root}: give the bundle that the models belong to with --bundle.")
    config.read_config(str(path))
    known = list(config.get("architecture") or [name for name in ARCHITECTURE if name in config])
    config.update(as_values({name: settings[name] for name in (*known, "ckpt_dir") if name in settings}))
    network_def = config.get_parsed_content("network_def", instantiate=False)
    check_experts(network_def.instantiate(), models)
    return describe_architecture({name: config.get_parsed_content(name) for name in known}, network_def.get_config())


def _halved(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Weights in half precision, except vectors: these are small, and a running variance may exceed its range."""
    halved = {}
    for key, tensor in weights.items():
        halved[key] = tensor.half() if tensor.ndim > 1 and tensor.is_floating_point() else tensor
        if not torch.isfinite(halved[key]).all():
            raise InputError(
                f"{name} has weights in '{key}' beyond the range of half precision: publish it without --half."
            )
    return halved


def _mean_scores(summary: Path) -> dict[str, Any]:
    """The mean scores and the numbers of cases from the ``summary.csv`` of a run: site -> model -> metric -> figure."""
    means: dict[str, Any] = {}
    try:
        for row in read_rows(summary):
            if not row["mean"]:  # undefined in all cases, as the distance from an empty mask
                continue
            figure = {"mean": float(row["mean"]), "cases": int(row["cases"])}
            means.setdefault(row["site"], {}).setdefault(row["model"], {})[row["metric"]] = figure
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{summary} is not a summary of a run ({error}): correct it or move it away.") from error
    return means


def _make_room(target: Path, overwrite: bool) -> None:
    """Remove an earlier set except its manifest, with which new files do not agree until the set is complete."""
    found = sorted(path for path in target.glob("*") if is_published(path.name) or path.name == MANIFEST)
    if found and not overwrite:
        raise InputError(f"{target} already has {found[0].name}: give another folder, or --overwrite True.")
    for path in found:
        if path.name != MANIFEST:
            path.unlink()


def package(bundle: str, output_dir: str = "dist") -> str:
    """Pack a bundle into a zip archive that runs with MONAI, without an installation of this package.

    The archive has one folder with the name of the bundle: configs, documentation, licence, published models if there
    are any, and in ``scripts`` the code that the configs refer to.

    Args:
        bundle: Folder of a bundle, or the name of one that comes with the package.
        output_dir: Folder in which ``<bundle>_v<version>.zip`` is written.

    Returns:
        The path of the archive.

    Raises:
        InputError: If there is no such bundle, a link leads out of it, or its models differ from their manifest or
            were never published.
    """
    root = Path(bundle).resolve() if (Path(bundle) / METADATA).is_file() else find_bundle(bundle)
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in _bundle_files(root)}
    for name in [name for name in files if name.startswith("configs/") and name.endswith(".json")]:
        # the first import, because the others need it
        files[name] = files[name].replace(IMPORTS.encode(), f'{IMPORTS}\n        "$import scripts",'.encode(), 1)
    code = Path(__file__).parents[1]
    files["scripts/__init__.py"] = (_header(code / "__init__.py") + SCRIPTS).encode()
    for path in (*code.rglob("*.py"), *code.rglob("*.jinja")):
        files[f"scripts/{path.relative_to(code.parent).as_posix()}"] = path.read_bytes()
    version = parse_json(files["configs/metadata.json"], root / "configs" / "metadata.json").get("version")
    archive = Path(output_dir) / f"{root.name}_v{check_file_name(version, 'version')}.zip"
    with whole_file(archive) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as packed:
        for number, name in enumerate(sorted(files)):
            # fixed times, so that the same files give the same archive; different ones (in the steps of two seconds of
            # a zip archive), because MONAI Label distinguishes models by them
            time = (2020, 1, 1, number // 1800, number // 30 % 60, number % 30 * 2)
            entry = zipfile.ZipInfo(f"{root.name}/{name}", time)
            entry.external_attr = 0o644 << 16
            packed.writestr(entry, files[name], zipfile.ZIP_DEFLATED)
    return str(archive)


def _bundle_files(root: Path) -> list[Path]:
    """The files of a bundle, with published models only."""
    files = [root / "LICENSE"]
    for folder in ("configs", "docs"):
        files += [path for path in (root / folder).rglob("*") if not path.name.startswith(".")]
    models = root / "models"
    for path in [*files, models]:
        if not path.resolve().is_relative_to(root):
            raise InputError(
                f"{path} is a link that leads out of the bundle: replace it by a copy of its target, or remove it."
            )
    files = [path for path in files if path.is_file()]
    listed = check_manifest(models)["files"] if published_files(models) is not None else {}
    present = sorted(path.name for path in models.glob("*.pt"))
    unpublished = [name for name, entry in listed.items() if entry.get("released")] if listed else present
    if unpublished:
        raise InputError(f"{models / unpublished[0]} was never published: publish the models, or move them away.")
    return files + [models / name for name in (MANIFEST, *listed) if listed]


def _header(path: Path) -> str:
    """The licence header of a file."""
    return "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
