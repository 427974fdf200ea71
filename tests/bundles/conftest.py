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
"""What the tests of the bundles share: synthetic sites, models with random weights, and a way to run a config."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fl_bundles import BUNDLES, NAMES
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.utils import set_determinism

from shared_iopfl.data.phantoms.sites import make_fundus_sites, make_prostate_sites

TINY: dict[str, Any] = {"image_size": 32, "features": 4, "device": "cpu"}
CASES = 4


def make_sites(bundle: str, folder: Path) -> Path:
    """Two inside sites and one outside, in the layout that the bundle was made for."""
    if "fundus" in bundle:
        make_fundus_sites(folder, sites=("A", "B", "E"), cases=CASES, size=32)
    else:
        make_prostate_sites(folder, sites=("A", "B", "E"), cases=CASES, size=(32, 32, 8))
    return folder


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """A config may seed the process and change how it reports errors: the next test must not notice."""
    hook, path, benchmark = sys.excepthook, list(sys.path), torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        sys.excepthook, sys.path[:], torch.backends.cudnn.benchmark = hook, path, benchmark
        torch.use_deterministic_algorithms(False)
        set_determinism(None)


def run_config(config: str, bundle: str = "prostate_iopfl", **overrides: Any) -> ConfigWorkflow:
    """What ``python -m monai.bundle run`` does, in this process and on tiny networks."""
    root = BUNDLES / bundle
    options: dict[str, Any] = {"bundle_root": str(root), **TINY}
    if config == "inference":
        options["empty_masks"] = "allow"  # a tiny network may find nothing
    options.update({key: str(value) if isinstance(value, Path) else value for key, value in overrides.items()})
    with process_as_it_was():
        workflow = ConfigWorkflow(
            config_file=str(root / "configs" / f"{config}.json"),
            logging_file=False,
            **options,
        )
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    return workflow


def random_models(folder: Path, bundle: str = "prostate_iopfl", sites: tuple[str, ...] = ("A", "B")) -> Path:
    """A global model of random weights whose masks hold both classes, and personalised ones around it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = ConfigParser()
    config.read_config(str(BUNDLES / bundle / "configs" / "inference.json"))
    config.update(TINY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = config.get_parsed_content("network_def").eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, 32, 32, generator=generator) * 2 - 1
    with torch.no_grad():
        # running statistics as after training, and logits around zero: without them one class would win everywhere
        norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        network.train()(images)
        logits = network.eval()(images)
        network.final_conv.bias[1] += (logits[:, 0] - logits[:, 1]).median()
        torch.save(network.state_dict(), folder / "model.pt")
        for site in sites:
            weights = {key: tensor.clone() for key, tensor in network.state_dict().items()}
            for tensor in weights.values():
                if tensor.is_floating_point() and tensor.ndim > 1:
                    tensor += 0.2 * tensor.std() * torch.randn(tensor.shape, generator=generator)
            torch.save(weights, folder / f"model_{site}.pt")
    return folder


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    with process_as_it_was():
        yield


@pytest.fixture(scope="session", name="run_config")
def _run_config() -> Callable[..., ConfigWorkflow]:
    return run_config


@pytest.fixture(scope="session", name="random_models")
def _random_models() -> Callable[..., Path]:
    return random_models


@pytest.fixture(scope="session", name="make_sites")
def _make_sites() -> Callable[[str, Path], Path]:
    return make_sites


@pytest.fixture(scope="session")
def sites_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites("prostate_iopfl", tmp_path_factory.mktemp("sites"))


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Each bundle in turn."""
    return request.param


@pytest.fixture(scope="module")
def data(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its sites."""
    return make_sites(name, tmp_path_factory.mktemp("data"))


class OpenedFiles:
    """The files that this process opens while recording, however it opens them."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.recording = False
        sys.addaudithook(self._hook)  # stays for the life of the process: there is one, switched on and off

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.recording and event == "open" and isinstance(arguments[0], (str, bytes)):
            self.paths.add(os.path.abspath(os.fsdecode(arguments[0])))

    @contextmanager
    def record(self) -> Iterator[set[str]]:
        self.paths, self.recording = set(), True
        try:
            yield self.paths
        finally:
            self.recording = False


@pytest.fixture(scope="session")
def opened_files() -> OpenedFiles:
    return OpenedFiles()
