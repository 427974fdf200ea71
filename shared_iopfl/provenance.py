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
"""What a run was: settings, versions, machine and the data it saw, in ``run.json``."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from shared_iopfl.sites import find_cases, fingerprint
from shared_iopfl.tables import write_json

__all__ = ["write_run"]

PACKAGES = ("shared_iopfl", "torch", "monai", "pytorch-ignite", "numpy", "nibabel", "itk")


def write_run(output_dir: str, settings: Mapping[str, Any], dataset_dir: str, sites: Sequence[str]) -> None:
    """Write ``run.json``.

    Args:
        output_dir: of the run.
        settings: what was asked for, name -> value.
        dataset_dir, sites: the data; of each site its number of cases and a fingerprint of names and sizes.
    """
    data = {}
    for site in sites:
        cases = find_cases(dataset_dir, site)
        data[site] = {"cases": len(cases), "fingerprint": fingerprint(cases)[:16]}
    write_json(
        Path(output_dir) / "run.json",
        {
            "settings": dict(settings),
            "sites": data,
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
            "revision": _revision(),
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
            "threads": torch.get_num_threads(),
        },
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _revision() -> str:
    """The git revision of this code, where it is a checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return result.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
