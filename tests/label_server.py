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
"""A MONAI Label server that runs while a test asks it, and what the bundles themselves make of its scans."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import set_determinism
from networks import make
from PIL import Image
from torch import nn

from shared_iopfl.data.phantoms.sites import make_fundus_sites, make_prostate_sites
from shared_iopfl.models.manifest import write_manifest
from shared_iopfl.utils.stacks import to_stack

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy" / "monailabel"
VENV = Path(os.environ.get("MONAILABEL_VENV", ROOT / ".venv-monailabel"))
PYTHON = str(VENV / "bin" / "python")
BUNDLES = ("prostate_iopfl", "fundus_iopfl")
SITES = ("A", "B")
ARCHITECTURE = {"features": 4, "image_size": 32}
# seconds; a busy machine may take minutes to import what the server needs
PATIENCE = 1800

needs_monailabel = pytest.mark.skipif(
    not (VENV / ".stamp").is_file(), reason="no MONAI Label here: deploy/monailabel/test.sh"
)


def ending(bundle: str) -> str:
    """Of the files of a bundle's scans and masks."""
    return ".png" if "fundus" in bundle else ".nii.gz"


@contextmanager
def serving(command: Sequence[str | Path], log: Path, **environment: str) -> Iterator[str]:
    """A server, until the test is done with it; its address.

    Args:
        command: starts it; ``--port`` is added.
        log: where what it prints goes.
        environment: more variables for it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what a client sends to stay there goes where the test's other files are, not into the user's home
    private = {"MONAI_LABEL_SESSION_PATH": str(log.parent / "sessions")}
    # sums in the order of `own_mask`, which also lets a busy machine get on
    alike = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*map(str, command), "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **private, **alike, **environment},
            cwd=log.parent,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(url, process, log)
            yield url
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{url}/info/").read()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")


def own_mask(root: Path, scan: Path, folder: Path, **overrides: Any) -> np.ndarray:
    """The mask that a bundle itself makes of a scan, as ``python -m monai.bundle run`` does.

    Args:
        root: the bundle, with the models to be used.
        scan: the file.
        folder: where it may write.
        overrides: of the bundle's settings.
    """
    folder = folder / f"own{time.monotonic_ns()}"
    own, out = folder / "scan", folder / "out"
    own.mkdir(parents=True)
    (own / scan.name).symlink_to(scan)
    options = {"dataset_dir": str(own), "output_dir": str(out), "overlays": False, "device": "cpu"}
    hook, benchmark, threads = sys.excepthook, torch.backends.cudnn.benchmark, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        workflow = ConfigWorkflow(
            config_file=str(root / "configs" / "inference.json"),
            bundle_root=str(root),
            logging_file=False,
            **options,
            **overrides,
        )
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    finally:  # a config may seed the process and change how it reports errors
        sys.excepthook, torch.backends.cudnn.benchmark = hook, benchmark
        torch.set_num_threads(threads)
        set_determinism(None)
    return read(out / scan.name)


def read(file: Path) -> np.ndarray:
    """A scan's or mask's values."""
    return np.asarray(Image.open(file)) if file.suffix == ".png" else np.asarray(nib.load(file).dataobj)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make_models(folder: Path, bundle: str, studies: Path) -> Path:
    """A published set of tiny random networks, near each other and made to see some organ in the scans."""

    def parser() -> ConfigParser:
        config = ConfigParser()
        config.read_config(str(ROOT / "bundles" / bundle / "configs" / "inference.json"))
        config.update({**ARCHITECTURE, "dataset_dir": str(studies)})
        return config

    folder.mkdir(parents=True)
    scans = [case["image"].as_tensor() for case in parser().get_parsed_content("dataset")]
    inputs = torch.cat([scan[None] if scan.ndim == 3 else to_stack(scan) for scan in scans])
    networks = [make(lambda: parser().get_parsed_content("network_def"), seed) for seed in range(1 + len(SITES))]
    for name, network in zip(("model", *(f"model_{site}" for site in SITES)), networks):
        with torch.no_grad():
            for weight, common in zip(network.parameters(), networks[0].parameters()):
                weight.lerp_(common, 0.8)
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1.0
            network.train()(inputs)
            last = [module for module in network.modules() if isinstance(module, nn.Conv2d)][-1]
            last.bias -= network.eval()(inputs).movedim(1, 0).flatten(1).median(1).values
        torch.save(network.state_dict(), folder / f"{name}.pt")
    write_manifest(folder, ARCHITECTURE, terms="random weights, for a test")
    return folder


def make_studies(folder: Path, bundle: str) -> Path:
    """Scans for the server, none as wide as high; beside the folder, in ``masks``, what a person would draw."""
    sites, masks = folder.parent / "sites", folder.parent / "masks"
    folder.mkdir(parents=True)
    masks.mkdir()
    if "fundus" in bundle:
        make_fundus_sites(sites, sites=("E",), cases=3, size=128, photographs=True)
        drawn = {path: sites / "E" / "masks" / path.name for path in (sites / "E" / "images").glob("*.png")}
    else:
        make_prostate_sites(sites, sites=("E",), cases=3, size=(40, 32, 8))
        found = [path for path in (sites / "E").glob("*.nii.gz") if "_segmentation" not in path.name]
        drawn = {path: path.with_name(path.name.replace(".nii.gz", "_segmentation.nii.gz")) for path in found}
    for scan, mask in drawn.items():
        scan.rename(folder / scan.name)
        mask.rename(masks / scan.name)
    return masks
