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
"""A packed bundle runs where MONAI is and this project is not; published models run without a further argument."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typed import Programs

from shared_iopfl.models.packaging import package, publish
from shared_iopfl.utils.errors import root_input_error

BUNDLES = Path(__file__).parents[2] / "bundles"
NAMES = ("prostate_iopfl", "fundus_iopfl")
TINY = ("--image_size", "32", "--features", "4", "--device", "cpu")
# a client of MONAI's federated learning, written from its documentation
FL = """
import sys
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from monai.fl.utils.exchange_object import ExchangeObject

root, data, output = sys.argv[1:]
tiny = {"dataset_dir": data, "site": "A", "device": "cpu", "image_size": 32, "features": 4, "passes": 1}
tiny.update(output_dir=output, ckpt_dir=output)
algo = MonaiAlgo(bundle_root=root, local_epochs=1, send_weight_diff=True, train_kwargs=tiny,
                 config_evaluate_filename="configs/train.json", eval_kwargs=tiny,
                 config_filters_filename="configs/fl_filters.json")
algo.initialize({ExtraItems.CLIENT_NAME: "A"})
weights = {name: tensor for name, tensor in algo.trainer.network.state_dict().items()}
algo.train(ExchangeObject(weights=weights))
metrics = algo.evaluate(ExchangeObject(weights=weights)).metrics
sent = algo.get_weights().weights
algo.finalize()
print(len(sent), metrics["val_mean_dice"])
"""
# how MONAI Label 0.8.5 reads bundles: their folder is on the path for that moment, `scripts` is loaded anew each time
LABEL = """
import sys
from monai.bundle import ConfigParser

for root in sys.argv[1:] * 2:
    sys.path.insert(0, root)
    for module in [name for name in sys.modules if name == "scripts" or name.startswith("scripts.")]:
        del sys.modules[module]
    config = ConfigParser()
    config.read_config(root + "/configs/inference.json")
    config.config.update({"bundle_root": root})
    parts = [config.get_parsed_content("network_def", instantiate=True)]
    sys.path.remove(root)
    for key in ("preprocessing", "inferer", "postprocessing"):
        sys.path.insert(0, root)
        for module in [name for name in sys.modules if name == "scripts" or name.startswith("scripts.")]:
            del sys.modules[module]
        config.config.update({"device": "cpu"})
        parts.append(config.get_parsed_content(key, instantiate=True))
        sys.path.remove(root)
    print(*(type(part).__name__ for part in parts), list(parts[2].experts))
"""

# the steps of the model zoo's verification, in a folder that holds `models/NAME`
ZOO = """
import os, sys, json
import torch
from monai.bundle import ckpt_export, create_workflow, verify_metadata, verify_net_in_out

root = os.path.join("models", sys.argv[1])
sys.path.insert(0, root)
files = {"meta_file": root + "/configs/metadata.json", "config_file": root + "/configs/inference.json"}
for file in ("LICENSE", "configs/metadata.json", "configs/inference.json", "models/model.pt"):
    assert os.path.isfile(os.path.join(root, file)), file
with open(files["meta_file"]) as file:
    metadata = json.load(file)
assert metadata["version"] in metadata["changelog"]
verify_metadata(meta_file=files["meta_file"], filepath=root + "/eval/schema.json")
logs = root + "/configs/logging.conf"
workflow = create_workflow(workflow_type="inference", bundle_root=root, logging_file=logs, **files)
assert workflow.check_properties() == [], workflow.check_properties()
verify_net_in_out(net_id="network_def", bundle_root=root, **files)
exported = root + "/models/verify_model.ts"
ckpt_export(net_id="network_def", filepath=exported, ckpt_file=root + "/models/model.pt", bundle_root=root, **files)
print(tuple(torch.jit.load(exported, map_location="cpu")(torch.zeros(1, 3, 32, 32)).shape))
"""


def make_published(bundle: str, folder: Path, random_models: Callable[..., Path]) -> Path:
    """A copy of a bundle with published models of random weights."""
    root = Path(shutil.copytree(BUNDLES / bundle, folder / bundle, ignore=shutil.ignore_patterns("models", "eval")))
    models = random_models(folder / "run" / bundle / "models", bundle)
    (models.parent / "run.json").write_text(json.dumps({"settings": {"image_size": 32, "features": 4}}))
    (models / "scores.json").write_text('{"global": 0.8, "A": 0.7, "B": 0.6}')
    publish(str(models), str(root / "models"), "synthetic weights, for tests alone", half=True)
    return root


@pytest.mark.parametrize("bundle", NAMES)
def test_published_models_need_no_further_argument(
    bundle: str,
    tmp_path: Path,
    make_sites: Callable[[str, Path], Path],
    random_models: Callable[..., Path],
    run_config: Callable,
) -> None:
    """Architecture and experts come from the manifest; a model that is not the published one ends the run."""
    root = make_published(bundle, tmp_path, random_models)
    scans = make_sites(bundle, tmp_path / "sites") / "E"
    published = {"image_size": "$manifest.setting(@ckpt_dir, 'image_size', 384)", "bundle_root": root}
    published["features"] = "$manifest.setting(@ckpt_dir, 'features', 32)"  # as the config has it
    config = json.loads((BUNDLES / bundle / "configs" / "inference.json").read_text())
    assert {key: config[key] for key in ("image_size", "features")} == {
        key: published[key] for key in ("image_size", "features")
    }
    run_config("inference", bundle, dataset_dir=scans, output_dir=tmp_path / "masks", **published)
    assert {row["expert"] for row in routes(tmp_path / "masks")} == {"A", "B", "global"}
    (root / "models" / "model_B.pt").write_bytes(b"x")
    with pytest.raises(Exception) as error:
        run_config("inference", bundle, dataset_dir=scans, output_dir=tmp_path / "more", **published)
    assert "model_B.pt is cut short" in str(root_input_error(error.value))


def routes(folder: Path) -> list[dict[str, str]]:
    with (folder / "routes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class Machine:
    """A fresh environment with the packages of this one, but without this project; bundles unpacked in it."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", symlinks=True)
        self.programs = Programs(folder / "venv" / "bin" / "python", paths=())
        (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (site_packages / "packages.pth").write_text("\n".join(paths))  # .pth files that lie there are not followed
        self.folder = folder

    def run(self, *command: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
        return self.programs.run(*command, cwd=cwd, environment={"PYTHONPATH": str(path)} if path else {})

    def bundle(self, config: str, root: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
        """``python -m monai.bundle run`` in the bundle's folder."""
        if config == "inference":
            options = (*options, "--empty_masks", "allow")  # a tiny network may find nothing
        return self.run("-m", "monai.bundle", "run", "--config_file", f"configs/{config}.json", *options, cwd=root)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, random_models: Callable[..., Path]) -> Machine:
    folder = tmp_path_factory.mktemp("machine")
    for bundle in NAMES:
        published = make_published(bundle, tmp_path_factory.mktemp("published"), random_models)
        with zipfile.ZipFile(package(str(published), str(tmp_path_factory.mktemp("dist")))) as archive:
            archive.extractall(folder)
    machine = Machine(folder)
    lonely = machine.run("-c", "import monai, ignite, shared_iopfl", cwd=folder)
    assert "No module named 'shared_iopfl'" in lonely.stderr, "the environment must not know this project"
    return machine


def succeeded(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("bundle", NAMES)
def test_packed_bundle_infers_and_trains(
    bundle: str, machine: Machine, make_sites: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    """With the models that travelled along, then one site trained, scored and served, then its code's own commands."""
    root = machine.folder / bundle
    sites = make_sites(bundle, tmp_path / "sites")
    succeeded(machine.bundle("inference", root, "--dataset_dir", sites / "E", "--output_dir", tmp_path / "masks"))
    assert {row["expert"] for row in routes(tmp_path / "masks")} == {"A", "B", "global"}

    own = ("--ckpt_dir", str(tmp_path / "models"), *TINY)
    data = ("--dataset_dir", str(sites), "--site", "A")
    # an average of two epochs: of one, the personalised model would be the global one, and no second expert
    short = ("--epochs", "2", "--start_epoch", "0", "--passes", "1", "--val_interval", "1")
    succeeded(machine.bundle("train", root, *data, *short, *own, "--output_dir", tmp_path / "training"))
    succeeded(machine.bundle("evaluate", root, *data, *own, "--output_dir", tmp_path / "eval"))
    assert (tmp_path / "eval" / "metrics.csv").is_file()
    succeeded(
        machine.bundle("inference", root, "--dataset_dir", sites / "E", *own, "--output_dir", tmp_path / "routed")
    )
    assert {row["expert"] for row in routes(tmp_path / "routed")} == {"A", "global"}

    checked = machine.run("-m", "shared_iopfl", "check", root / "models", cwd=tmp_path, path=root / "scripts")
    assert "4 files as published" in succeeded(checked)


@pytest.mark.slow
@pytest.mark.parametrize("bundle", NAMES)
def test_packed_bundle_federates(
    bundle: str, machine: Machine, make_sites: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    """As a whole run in one process, and as one client of somebody else's federation."""
    root, sites = machine.folder / bundle, make_sites(bundle, tmp_path / "sites")
    settings = ("--rounds", "1", "--passes", "1", "--sites", "['A','B']", "--outside_sites", "['E']")
    federated = ("--dataset_dir", sites, "--output_dir", tmp_path / "run", *settings, *TINY)
    succeeded(machine.bundle("federate", root, *federated))
    assert (tmp_path / "run" / "report.html").is_file()
    client = machine.run("-c", FL, root, sites, tmp_path / "client", cwd=tmp_path, path=root)
    tensors, dice = succeeded(client).split()[-2:]
    assert int(tensors) > 50
    assert 0 <= float(dice) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("bundle", NAMES)
def test_packed_bundle_passes_the_zoo(bundle: str, machine: Machine, tmp_path: Path) -> None:
    """Files, version, metadata, properties without any data, network in and out, and TorchScript, as it lies."""
    root = Path(shutil.copytree(machine.folder / bundle, tmp_path / "models" / bundle))
    (root / "eval").mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("metadata_schema.json"), root / "eval" / "schema.json")
    assert succeeded(machine.run("-c", ZOO, bundle, cwd=tmp_path)).splitlines()[-1] == "(1, 2, 32, 32)"


@pytest.mark.slow
def test_packed_bundles_share_a_process(machine: Machine, tmp_path: Path) -> None:
    """Both in one server, read as MONAI Label reads them, twice."""
    lines = succeeded(
        machine.run("-c", LABEL, *(machine.folder / bundle for bundle in NAMES), cwd=tmp_path)
    ).splitlines()
    expected = "BasicUNet Compose TestTimeRoutingInferer Compose ['A', 'B']"
    assert [line for line in lines if line.startswith("BasicUNet")] == [expected] * 4


@pytest.mark.slow
@pytest.mark.parametrize("bundle", NAMES)
def test_a_bundle_without_models_says_so(
    bundle: str, machine: Machine, make_sites: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    """In one line, and a failure."""
    scans = make_sites(bundle, tmp_path / "sites") / "E"
    options = ("--dataset_dir", scans, "--output_dir", tmp_path / "masks", "--ckpt_dir", tmp_path / "models", *TINY)
    process = machine.bundle("inference", machine.folder / bundle, *options)
    assert process.returncode == 1
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error:")]
    assert "has no trained weights" in line
    assert "Traceback" not in process.stderr
