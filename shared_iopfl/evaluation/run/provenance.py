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
"""The provenance of a run, in ``run.json``: settings, versions, machine, models and data."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser

from shared_iopfl.data.patients import AUTO
from shared_iopfl.data.scan_files import Case
from shared_iopfl.data.scan_names import printable
from shared_iopfl.data.splits import find_cases, fingerprint
from shared_iopfl.evaluation.run.folder import describe
from shared_iopfl.models.manifest import MODEL_FILE
from shared_iopfl.utils.config_values import as_values
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import write_rows

PACKAGES = ("shared_iopfl", "torch", "monai", "pytorch-ignite", "numpy", "nibabel", "itk")


def report_to_nobody() -> None:
    """Disable MLflow's telemetry, unless its own environment variable is set.

    The bundles' ``initialize`` calls this before a run is tracked; importing this package changes nothing.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    telemetry = sys.modules.get("mlflow.telemetry")
    if telemetry is not None:  # MONAI has imported it, so it must read the variable again
        telemetry.set_telemetry_client()


def write_run(
    output_dir: str, settings: Mapping[str, Any], dataset_dir: str, sites: Sequence[str], bundle_root: str = ""
) -> None:
    """Write ``run.json`` of a training.

    Args:
        output_dir: Folder of the run.
        settings: Name -> value of the requested settings; ``client_config`` among them has the settings of
            ``train.json`` that differ between a site of a federation and a training of its own.
        dataset_dir, sites: The data; the number of cases of each site is written, and a fingerprint of names and sizes.
        bundle_root: If given, the bundle's ``train.json`` is written as it ran with these settings at the first site.
    """
    data = {}
    for site in sites:
        cases = find_cases(dataset_dir, site, settings.get("patient", AUTO))
        data[site] = {"cases": len(cases), "fingerprint": fingerprint(cases)[:16]}
    content = {"settings": dict(settings), "sites": data}
    if bundle_root:
        given = {**settings, **settings.get("client_config", {}), "site": sites[0], "output_dir": output_dir}
        content["config"] = _resolved(bundle_root, given)
    _write(output_dir, content)


class InferenceRecorder:
    """Write ``run.json`` of an inference, which names no scan, when all scans have been processed.

    ``scans.csv`` lists the file or folder of each case, relative to their common folder.

    Args:
        output_dir: Folder of the run.
        settings: Name -> value of the requested settings.
        scans: The scans; their number is written, and a fingerprint of names and sizes.
        ckpt_dir: Folder of the models, whose SHA-256 are written.
    """

    def __init__(self, output_dir: str, settings: Mapping[str, Any], scans: Sequence[Case], ckpt_dir: str) -> None:
        self.output_dir = output_dir
        self.settings = dict(settings)
        self.scans = list(scans)
        self.ckpt_dir = Path(ckpt_dir)

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        there = [scan for scan in self.scans if _is_there(scan)]
        data = {"cases": len(self.scans), "fingerprint": fingerprint(there)[:16]}
        names = sorted(path.name for path in self.ckpt_dir.glob("*") if MODEL_FILE.fullmatch(path.name))
        models = {name: hashlib.sha256((self.ckpt_dir / name).read_bytes()).hexdigest() for name in names}
        files = [os.path.abspath(scan["image"]) for scan in self.scans]
        top = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""
        rows = [
            {"case": scan["case"], "file": printable(os.path.relpath(file, top))}
            for scan, file in zip(self.scans, files)
        ]
        write_rows(Path(self.output_dir) / "scans.csv", ("case", "file"), rows)
        _write(self.output_dir, {"settings": self.settings, "scans": data, "models": models})


def _is_there(scan: Case) -> bool:
    """Return whether all files of a scan exist; a series may contain a broken link."""
    try:
        fingerprint([scan])
    except InputError:
        return False
    return True


def _write(output_dir: str, content: Mapping[str, Any]) -> None:
    machine = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "revision": _revision(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
    }
    describe(output_dir, {**content, **machine})


def _resolved(bundle_root: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``train.json`` with its settings as values, and objects (network, transforms) as defined in the file."""
    parser = ConfigParser()
    parser.read_config(str(Path(bundle_root) / "configs" / "train.json"))
    given = {"bundle_root": bundle_root, **settings}
    config: Any = parser.config
    parser.update(as_values({name: value for name, value in given.items() if name in config}))
    values = {
        name: parser.get_parsed_content(name) if isinstance(written, str) else written
        for name, written in config.items()
    }
    return {name: value if _is_data(value) else config[name] for name, value in values.items()}


def _is_data(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _revision() -> str:
    """Return the git revision of this code, if it is a checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return result.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
