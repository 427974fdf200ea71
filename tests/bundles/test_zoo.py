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
import re
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
from typed import as_options, typed

from shared_iopfl.models.files import load_experts, load_weights
from shared_iopfl.models.manifest import check_manifest
from shared_iopfl.models.weights import check_experts
from shared_iopfl.utils.errors import root_input_error

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
    "train#trainer#max_epochs",
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
    files = {"meta_file": configs / "metadata.json", "config_file": configs / "inference.json"}
    return {**{key: str(path) for key, path in files.items()}, "bundle_root": str(BUNDLES / name)}


def random_checkpoint(name: str, path: Path) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = parser_of(name, "inference").get_parsed_content("network_def").eval()
    torch.save(network.state_dict(), path)
    return network


def test_rooms(name: str) -> None:
    """Licence, configs, documentation and models are where the zoo looks for them."""
    root = BUNDLES / name
    configs = ("metadata", "train", "evaluate", "inference", "federate", "multi_gpu_train")
    expected = ["LICENSE", "models/model.pt", "docs/README.md", "docs/data_license.txt", "configs/logging.conf"]
    missing = [file for file in (*expected, *(f"configs/{c}.json" for c in configs)) if not (root / file).is_file()]
    assert missing == []
    licence = (root / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert (root / "LICENSE").read_bytes() == (BUNDLES.parent / "LICENSE").read_bytes()


def test_shipped_models_are_the_published_ones(name: str) -> None:
    """To the byte, of the network that the configs build, and with terms; the data's own terms lie in the docs."""
    models = BUNDLES / name / "models"
    manifest = check_manifest(models)
    assert "not for diagnosis" in manifest["terms"]
    for config in ("train", "evaluate", "inference"):
        network = parser_of(name, config).get_parsed_content("network_def")
        network.load_state_dict(load_weights(models / "model.pt"))
    check_experts(network, load_experts(str(models)))
    assert [path.name for path in models.glob("*.pt") if path.name not in manifest["files"]] == []


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


def test_nothing_is_too_large_for_the_zoo(name: str, tmp_path: Path) -> None:
    """25 MB a file, so also the models, which in half precision are half of 31 MB."""
    files = [path for path in (BUNDLES / name).rglob("*") if path.is_file() and "eval" not in path.parts]
    assert [path.name for path in files if path.stat().st_size > 25 * 2**20] == []
    network = parser_of(name, "inference", ckpt_dir=str(tmp_path)).get_parsed_content("network_def")
    torch.save({key: tensor.half() for key, tensor in network.state_dict().items()}, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 25 * 2**20


def test_no_path_of_a_machine(name: str) -> None:
    """A bundle runs where it lies: configs name no folder but their own."""
    for path in (BUNDLES / name / "configs").iterdir():
        assert (
            re.findall(r"(?:/(?:home|root|mnt|media|tmp|usr|var|opt|work\w*|Users)|~|[A-Z]:\\)/", path.read_text())
            == []
        ), path.name


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


def test_inference_is_looked_at_without_scans(name: str, tmp_path: Path, run_config: Callable[..., Any]) -> None:
    """The zoo checks properties where there is no data; a run without any still ends in one line."""
    workflow = ConfigWorkflow(
        workflow_type="infer",
        config_file=str(BUNDLES / name / "configs" / "inference.json"),
        logging_file=False,
        bundle_root=str(BUNDLES / name),
        dataset_dir=str(tmp_path / "data"),
        output_dir=str(tmp_path / "eval"),
        ckpt_dir=str(tmp_path / "models"),
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    with pytest.raises(Exception) as error:
        run_config("inference", name, dataset_dir=tmp_path / "data", output_dir=tmp_path, ckpt_dir=tmp_path)
    assert "no such file or folder" in str(root_input_error(error.value))


def test_network_takes_and_gives_what_the_metadata_says(name: str) -> None:
    verify_net_in_out(net_id="network_def", device="cpu", **files_of(name))
    wrong: dict[str, Any] = {"_meta_#network_data_format#outputs#pred#num_channels": 7}
    with pytest.raises(ValueError, match="channel"):
        verify_net_in_out(net_id="network_def", device="cpu", **files_of(name), **wrong)


def test_size_of_the_network(name: str, tmp_path: Path) -> None:
    """As large as the method's U-Net, 7.77 million parameters, to half a per cent, where no models say otherwise."""
    network = parser_of(name, "inference", ckpt_dir=str(tmp_path)).get_parsed_content("network_def")
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


@pytest.mark.slow
@pytest.mark.parametrize("scans", ["a scan", "a site"])
def test_routed_model_exports(
    name: str,
    scans: str,
    tmp_path: Path,
    make_sites: Callable[[str, Path], Path],
    random_models: Callable[..., Path],
    run_config: Callable[..., ConfigWorkflow],
) -> None:
    """The one network that a scan, or all of a site's, is routed to is plain: it exports, and gives the same masks."""
    folder = make_sites(name, tmp_path / "sites") / "E"
    scan = next(path for path in folder.rglob("*09.*") if "masks" not in path.parts)
    models = random_models(tmp_path / "models", name)
    common: dict[str, Any] = {
        "dataset_dir": scan if scans == "a scan" else folder,
        "ckpt_dir": models,
        "overlays": False,
    }
    file = tmp_path / "site.pt"
    run_config("inference", name, mode="site", site_model=file, output_dir=tmp_path / "made", **common)
    size: dict[str, Any] = {"features": 4}
    ckpt_export(
        net_id="network_def", filepath=str(file.with_suffix(".ts")), ckpt_file=str(file), **files_of(name), **size
    )
    run_config("inference", name, mode="off", ckpt=file, output_dir=tmp_path / "plain", **common)
    exported = {"network_def": f"$torch.jit.load('{file.with_suffix('.ts')}')", "handlers#0#_disabled_": True}
    run_config("inference", name, mode="off", output_dir=tmp_path / "exported", **exported, **common)
    masks = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir() if path.suffix in (".gz", ".png")}
    assert masks
    assert {name: (tmp_path / "exported" / name).read_bytes() for name in masks} == masks

    onnx = {"input_shape": [1, 3, 32, 48], "use_trace": True, **files_of(name), **size}
    onnx_export(net_id="network_def", filepath=str(file.with_suffix(".onnx")), ckpt_file=str(file), **onnx)
    network = parser_of(name, "inference", **size).get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(file, weights_only=True))
    images = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(str(file.with_suffix(".onnx")))
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, network(images).numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_published_models_export(name: str, half: bool, tmp_path: Path) -> None:
    """Also those stored in half precision, which the exported model computes with in single."""
    network = parser_of(name, "inference", features=4).get_parsed_content("network_def").eval()
    state = {key: tensor.half() if half and tensor.ndim > 1 else tensor for key, tensor in network.state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    exported = str(tmp_path / "model.ts")
    ckpt_export("network_def", exported, ckpt_file=str(tmp_path / "model.pt"), features=4, **files_of(name))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = torch.jit.load(exported)(images)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, network(images), atol=1e-2 if half else 1e-5, rtol=1e-2 if half else 1e-5)


@pytest.mark.slow
def test_commands_on_the_shipped_weights(name: str, tmp_path: Path, make_sites: Callable[[str, Path], Path]) -> None:
    """The zoo's checks and exports as commands; then a site's scans are routed with nothing set but their folder."""
    (tmp_path / "schema.json").write_bytes(SCHEMA.read_bytes())
    files = files_of(name)
    shipped = {"net_id": "network_def", "ckpt_file": BUNDLES / name / "models" / "model.pt", **files}
    serve = {"config_file": files["config_file"], "bundle_root": files["bundle_root"], "output_dir": tmp_path / "masks"}
    onnx = {"filepath": tmp_path / "model.onnx", "input_shape": [1, 3, 96, 96], "use_trace": True}
    commands: list[tuple[str, dict[str, Any]]] = [
        ("verify_metadata", {"meta_file": files["meta_file"], "filepath": tmp_path / "schema.json"}),
        ("verify_net_in_out", {"net_id": "network_def", "device": "cpu", **files}),
        ("ckpt_export", {"filepath": tmp_path / "model.ts", **shipped}),
        ("onnx_export", {**onnx, **shipped}),
        ("run", {"dataset_dir": make_sites(name, tmp_path / "sites") / "E", **serve}),
    ]
    for command, options in commands:
        process = typed("-m", "monai.bundle", command, *as_options(options), cwd=tmp_path)
        assert process.returncode == 0, f"{command}: {process.stderr[-2000:]}"

    network = parser_of(name, "inference").get_parsed_content("network_def").eval()
    network.load_state_dict(load_weights(shipped["ckpt_file"]))
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    with torch.no_grad():
        logits = network(images)
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(images), logits, rtol=1e-4, atol=1e-4)
    (exported,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(exported, logits.numpy(), rtol=1e-3, atol=1e-3)
    routes = json.loads((tmp_path / "masks" / "routes.json").read_text())
    assert set(routes["experts"]) == {"global", *load_experts(str(BUNDLES / name / "models"))}


def test_logging_is_quiet_where_progress_bars_run(name: str) -> None:
    """What engines and clients say in every round is not shown, clients' warnings and what handlers say are.

    An engine's errors are exceptions too, which are shown as such, or in one line where a user can correct them.
    """
    quiet = ("ignite.engine.engine.SupervisedTrainer", "monai.fl.client.monai_algo", "monai.networks.utils")
    code = (
        "import logging.config, sys; logging.config.fileConfig(sys.argv[1]); "
        "print(*(logging.getLevelName(logging.getLogger(n).getEffectiveLevel()) for n in sys.argv[2:]))"
    )
    levels = typed("-c", code, BUNDLES / name / "configs" / "logging.conf", "StatsHandler", *quiet).stdout.split()
    assert levels == ["INFO", "CRITICAL", "WARNING", "WARNING"]


def test_processes_meet_before_one_of_them_writes(name: str) -> None:
    """Ignite's first question for the rank is a collective call: asked by the checkpoint's process alone, it hangs."""
    steps = json.loads((BUNDLES / name / "configs" / "multi_gpu_train.json").read_text())["initialize"]
    joined = next(number for number, step in enumerate(steps) if "init_process_group" in step)
    assert "$idist.sync()" in steps[joined:]
