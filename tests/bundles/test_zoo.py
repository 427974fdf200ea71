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
"""Each bundle holds to MONAI's bundle specification and to what the model zoo's verification asks for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from monai.bundle import (
    ConfigParser,
    ConfigWorkflow,
    ckpt_export,
    onnx_export,
    verify_metadata,
    verify_net_in_out,
)

BUNDLES = Path(__file__).parents[2] / "bundles"
NAMES = sorted(path.parents[1].name for path in BUNDLES.glob("*/configs/metadata.json"))
SCHEMA = Path(__file__).with_name("metadata_schema.json")
INFERENCE_IDS = ("bundle_root", "device", "network_def", "inferer", "output_dir")
TRAIN_IDS = (
    "bundle_root",
    "device",
    "dataset_dir",
    "val_interval",
    "train#trainer",
    "train#dataset",
    "train#dataset#data",
    "train#handlers",
    "validate#evaluator",
    "validate#handlers",
    "validate#dataset",
    "validate#dataset#data",
)

pytestmark = pytest.mark.parametrize("name", NAMES)


def parser_of(name: str, config: str, **overrides: Any) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(str(BUNDLES / name / "configs" / f"{config}.json"))
    parser.read_meta(str(BUNDLES / name / "configs" / "metadata.json"))
    parser.update({"bundle_root": str(BUNDLES / name), "device": "cpu", **overrides})
    return parser


def files_of(name: str) -> dict[str, Any]:
    """What the command-line functions of `monai.bundle` want to know of a bundle."""
    configs = BUNDLES / name / "configs"
    return {"meta_file": str(configs / "metadata.json"), "config_file": str(configs / "inference.json")}


def random_checkpoint(name: str, path: Path) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = parser_of(name, "inference").get_parsed_content("network_def").eval()
    torch.save(network.state_dict(), path)
    return network


def test_rooms(name: str) -> None:
    """Licence, configs and documentation are where the zoo looks for them, and no weights lie about."""
    root = BUNDLES / name
    configs = ("metadata", "train", "evaluate", "inference", "federate", "multi_gpu_train")
    expected = ["LICENSE", "docs/README.md", "docs/data_license.txt", "configs/logging.conf"]
    missing = [file for file in (*expected, *(f"configs/{c}.json" for c in configs)) if not (root / file).is_file()]
    assert missing == []
    licence = (root / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert (root / "LICENSE").read_bytes() == (BUNDLES.parent / "LICENSE").read_bytes()


def test_metadata_follows_the_schema(name: str, tmp_path: Path) -> None:
    """With the schema where `verify_metadata` would download it to, no network is needed; a wrong file is refused."""
    schema = tmp_path / "schema.json"
    schema.write_bytes(SCHEMA.read_bytes())
    meta_file = BUNDLES / name / "configs" / "metadata.json"
    verify_metadata(meta_file=str(meta_file), filepath=str(schema))

    wrong = {key: value for key, value in json.loads(meta_file.read_text()).items() if key != "authors"}
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="schema"):
        verify_metadata(meta_file=str(tmp_path / "wrong.json"), filepath=str(schema))


def test_version_stands_in_the_changelog(name: str) -> None:
    metadata = json.loads((BUNDLES / name / "configs" / "metadata.json").read_text())
    assert metadata["version"] == next(iter(metadata["changelog"]))
    assert metadata["schema"].endswith("/meta_schema_20240725.json")


def test_versions_are_those_of_the_requirements(name: str) -> None:
    """The metadata's versions are the ones that the project pins and tests."""
    lines = (BUNDLES.parent / "requirements.txt").read_text().splitlines()
    pins = [line.split(";")[0].strip().split("==") for line in lines if "==" in line and "< " not in line]
    pinned = dict(pins)
    metadata = json.loads((BUNDLES / name / "configs" / "metadata.json").read_text())
    core = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
    stated = {package: metadata[key] for package, key in core.items()} | metadata["required_packages_version"]
    assert stated == {package: pinned[package] for package in stated}


@pytest.mark.parametrize(("config", "ids"), [("inference", INFERENCE_IDS), ("train", TRAIN_IDS)])
def test_ids_that_the_zoo_asks_for(name: str, config: str, ids: tuple[str, ...]) -> None:
    parser = parser_of(name, config)
    assert [key for key in ids if key not in parser] == []


@pytest.mark.parametrize(("config", "kind"), [("train", "train"), ("evaluate", "infer"), ("inference", "infer")])
def test_properties(name: str, config: str, kind: str, tmp_path: Path, make_sites: Callable[[str, Path], Path]) -> None:
    """Every property of the bundle specification is there, the optional ones under their proper ids."""
    sites = make_sites(name, tmp_path / "sites")
    workflow = ConfigWorkflow(
        workflow_type=kind,
        config_file=str(BUNDLES / name / "configs" / f"{config}.json"),
        logging_file=False,
        bundle_root=str(BUNDLES / name),
        dataset_dir=str(sites / "E" if config == "inference" else sites),
        output_dir=str(tmp_path / "eval"),
        ckpt_dir=str(tmp_path / "models"),
        device="cpu",
        image_size=32,
        features=4,
        **({"site": "A"} if config != "inference" else {}),
        **({"mode": "off"} if kind == "infer" else {}),
    )
    workflow.initialize()
    assert workflow.check_properties() == []


def test_network_takes_and_gives_what_the_metadata_says(name: str) -> None:
    verify_net_in_out(net_id="network_def", device="cpu", bundle_root=str(BUNDLES / name), **files_of(name))
    wrong: dict[str, Any] = {"_meta_#network_data_format#outputs#pred#num_channels": 7}
    with pytest.raises(ValueError, match="channel"):
        verify_net_in_out(net_id="network_def", device="cpu", **files_of(name), **wrong)


def test_size_of_the_network(name: str) -> None:
    """As large as the method's U-Net, 7.77 million parameters, to half a per cent."""
    network = parser_of(name, "inference").get_parsed_content("network_def")
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(7.77e6, rel=5e-3)


def test_all_configs_build_one_network(name: str) -> None:
    """What train.json learns, evaluate.json and inference.json can load."""
    shapes = [
        {key: tuple(value.shape) for key, value in parsed.state_dict().items()}
        for config in ("train", "evaluate", "inference")
        for parsed in [parser_of(name, config, features=4).get_parsed_content("network_def")]
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_torchscript_export(name: str, tmp_path: Path) -> None:
    """The exported model predicts as the network, at another size than it was made with."""
    network = random_checkpoint(name, tmp_path / "model.pt")
    exported = tmp_path / "model.ts"
    checkpoint = str(tmp_path / "model.pt")
    ckpt_export(net_id="network_def", filepath=str(exported), ckpt_file=checkpoint, **files_of(name))
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(exported)(images), network(images))


def test_onnx_export(name: str, tmp_path: Path) -> None:
    """The exported model predicts as the network."""
    network = random_checkpoint(name, tmp_path / "model.pt")
    exported = tmp_path / "model.onnx"
    onnx_export(
        net_id="network_def",
        filepath=str(exported),
        ckpt_file=str(tmp_path / "model.pt"),
        input_shape=[1, 3, 32, 48],
        use_trace=True,
        **files_of(name),
    )
    images = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(str(exported))
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, network(images).numpy(), rtol=1e-3, atol=1e-4)


def test_logging_is_quiet_where_progress_bars_run(name: str) -> None:
    """What engines and clients say in every round is not shown, clients' warnings and what handlers say are.

    An engine's errors are exceptions too, which are shown as such, or in one line where a user can mend them.
    """
    quiet = ("ignite.engine.engine.SupervisedTrainer", "monai.fl.client.monai_algo", "monai.networks.utils")
    code = (
        "import logging.config, sys; logging.config.fileConfig(sys.argv[1]); "
        "print(*(logging.getLevelName(logging.getLogger(n).getEffectiveLevel()) for n in sys.argv[2:]))"
    )
    command = [sys.executable, "-c", code, str(BUNDLES / name / "configs" / "logging.conf"), "StatsHandler", *quiet]
    levels = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert levels == ["INFO", "CRITICAL", "WARNING", "WARNING"]


def test_processes_meet_before_one_of_them_writes(name: str) -> None:
    """Ignite's first question for the rank is a collective call: asked by the checkpoint's process alone, it hangs."""
    steps = json.loads((BUNDLES / name / "configs" / "multi_gpu_train.json").read_text())["initialize"]
    joined = next(number for number, step in enumerate(steps) if "init_process_group" in step)
    assert "$idist.sync()" in steps[joined:]
