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
"""What is handed on: models published with what it takes to run them, a bundle packed with the code it needs."""

from __future__ import annotations

import json
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from shared_iopfl.__main__ import main
from shared_iopfl.models import packaging
from shared_iopfl.models.files import load_experts, load_scores, load_weights, save_atomically
from shared_iopfl.models.manifest import check_manifest, release
from shared_iopfl.models.packaging import package, publish
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import write_rows

ROOT = Path(__file__).parents[2]
SETTINGS = {"features": 4, "image_size": 64, "rounds": 3, "alpha": 0.5}
MACHINE = {"dataset_dir": "/hospital/scans", "device": "cpu"}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the bundle in the repository, without models."""
    ignore = shutil.ignore_patterns("models", "eval")
    return Path(shutil.copytree(ROOT / "bundles" / "prostate_iopfl", tmp_path / "prostate_iopfl", ignore=ignore))


@pytest.fixture
def run(tmp_path: Path, bundle: Path) -> Path:
    """The files of a federation of two sites that publishing reads."""
    config = ConfigParser()
    config.read_config(str(bundle / "configs" / "inference.json"))
    config["features"] = 4
    network = config.get_parsed_content("network_def")
    for number, name in enumerate(("model", "model_A", "model_B")):
        state = {key: tensor + 0.125 * number for key, tensor in network.state_dict().items()}
        save_atomically(state, tmp_path / "out" / "models" / f"{name}.pt")
    (tmp_path / "out" / "models" / "scores.json").write_text('{"global": 0.8, "A": 0.7, "B": null}')
    content = {"settings": {**SETTINGS, **MACHINE}, "versions": {"torch": "2.13.0"}}
    (tmp_path / "out" / "run.json").write_text(json.dumps(content))
    row = {"site": "A", "model": "personalised", "metric": "dice", "mean": "0.75", "cases": "3"}
    undefined = {**row, "metric": "hd95_mm", "mean": ""}
    write_rows(tmp_path / "out" / "summary.csv", tuple(row), [row, undefined])
    return tmp_path / "out" / "models"


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def refused(action: Callable[[], Any], *words: str) -> None:
    with pytest.raises(InputError) as error:
        action()
    assert "\n" not in str(error.value)
    assert [word for word in words if word not in str(error.value)] == []


def test_published_models_are_those_of_the_run(run: Path, bundle: Path) -> None:
    publish(str(run), str(bundle / "models"), "research only")
    assert equal(load_weights(bundle / "models" / "model.pt"), load_weights(run / "model.pt"))
    experts, own = load_experts(str(bundle / "models")), load_experts(str(run))
    assert list(experts) == ["A", "B"]
    assert all(equal(experts[site], own[site]) for site in own)
    assert load_scores(str(bundle / "models")) == {"global": 0.8, "A": 0.7}


def test_the_manifest_tells_how_they_were_made_and_are_run(run: Path, bundle: Path) -> None:
    """The manifest has nothing about the machine of the training."""
    publish(str(run), str(bundle / "models"), "research only", metrics={"note": "one split"})
    manifest = check_manifest(bundle / "models")
    architecture = manifest["architecture"]
    assert (architecture["features"], architecture["image_size"], architecture["slices"]) == (4, 64, 3)
    assert architecture["network_def"]["features"] == [4, 8, 16, 32, 64, 4]
    assert manifest["training"] == SETTINGS
    figures = {"A": {"personalised": {"dice": {"mean": 0.75, "cases": 3}}}, "note": "one split"}
    assert manifest["metrics"] == figures
    assert manifest["versions"]["torch"] == "2.13.0"
    text = (bundle / "models" / "manifest.json").read_text()
    assert [word for word in ("hospital", "cpu", str(run)) if word in text] == []


@pytest.mark.parametrize("config", ["inference", "evaluate"])
def test_the_bundle_runs_published_models_as_they_are(run: Path, bundle: Path, config: str) -> None:
    """Their size becomes the default of the bundle, and can still be set."""
    publish(str(run), str(bundle / "models"), "research only")
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / f"{config}.json"))
    parser["bundle_root"] = str(bundle)
    parser.get_parsed_content("network_def").load_state_dict(load_weights(bundle / "models" / "model.pt"))
    assert parser.get_parsed_content("image_size") == 64
    parser.update({"image_size": 32, "features": 2})
    parser.parse(reset=True)
    assert (parser.get_parsed_content("image_size"), parser.get_parsed_content("features")) == (32, 2)


def test_half_precision_takes_half_the_room(run: Path, bundle: Path) -> None:
    """Weights are read to 1 in 1000; vectors, and thus the norms and their statistics, exactly."""
    publish(str(run), str(bundle / "models"), "research only", half=True)
    one, other = load_weights(run / "model.pt"), load_weights(bundle / "models" / "model.pt")
    for key, tensor in one.items():
        assert other[key].dtype == tensor.dtype
        torch.testing.assert_close(other[key], tensor, rtol=1e-3 if tensor.ndim > 1 else 0, atol=1e-7)
    stored = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert {tensor.dtype for tensor in stored.values() if tensor.ndim > 1} == {torch.float16}


def test_weights_too_large_for_half_precision_are_named(run: Path, bundle: Path) -> None:
    state = load_weights(run / "model_A.pt")
    key = next(key for key, tensor in state.items() if tensor.ndim > 1)
    save_atomically({**state, key: state[key] + 1e5}, run / "model_A.pt")
    refused(lambda: publish(str(run), str(bundle / "models"), "research", half=True), "A", key, "half")
    assert not (bundle / "models").exists()


def test_only_the_named_sites_are_published(run: Path, bundle: Path) -> None:
    """Neither the model nor the score of another site is published."""
    publish(str(run), str(bundle / "models"), "research only", sites=["B"])
    names = {path.name for path in (bundle / "models").iterdir()}
    assert names == {"model.pt", "model_B.pt", "scores.json", "manifest.json"}
    assert load_scores(str(bundle / "models")) == {"global": 0.8}


def test_a_published_set_is_replaced_on_request_only(run: Path, bundle: Path) -> None:
    """The whole set is replaced: no model of the earlier set stays."""
    target = bundle / "models"
    publish(str(run), str(target), "research only")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    refused(lambda: publish(str(run), str(target), "all", sites=["A"]), "overwrite")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    publish(str(run), str(target), "all", sites=["A"], overwrite=True)
    assert check_manifest(target)["sites"] == ["A"]
    assert not (target / "model_B.pt").exists()


@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_publication_cannot_be_used(
    run: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    """There is no global model yet, or the manifest of the earlier set does not agree with it."""
    target = bundle / "models"
    if earlier:
        publish(str(run), str(target), "research only")
    monkeypatch.setattr(packaging, "save_atomically", _failing_at("model_B.pt"))
    with pytest.raises(OSError, match="full"):
        publish(str(run), str(target), "research only", overwrite=True, half=True)
    assert (target / "model_A.pt").exists()
    refused(lambda: load_weights(target / "model.pt"), "model.pt")


def _failing_at(name: str) -> Callable[[Any, str], None]:
    def save(content: Any, path: str) -> None:
        if Path(path).name == name:
            raise OSError("disk full")
        save_atomically(content, path)

    return save


def test_models_of_another_network_are_not_published(run: Path, bundle: Path) -> None:
    (run.parent / "run.json").write_text(json.dumps({"settings": {**SETTINGS, "features": 8}}))
    refused(lambda: publish(str(run), str(bundle / "models"), "research"), "does not fit the network")
    assert not (bundle / "models").exists()


@pytest.mark.parametrize("content", [None, "[]", "{"])
def test_models_without_a_valid_run_json_are_not_published(run: Path, bundle: Path, content: str | None) -> None:
    (run.parent / "run.json").unlink() if content is None else (run.parent / "run.json").write_text(content)
    refused(lambda: publish(str(run), str(bundle / "models"), "research"), "run.json")


def test_models_may_be_published_anywhere_if_the_bundle_is_named(run: Path, bundle: Path, tmp_path: Path) -> None:
    refused(lambda: publish(str(run), str(tmp_path / "x" / "models"), "research"), "--bundle")
    publish(str(run), str(tmp_path / "x" / "models"), "research", bundle=str(bundle))
    check_manifest(tmp_path / "x" / "models")


def unpacked(archive: str, folder: Path) -> Path:
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    (root,) = folder.iterdir()
    return root


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", ["prostate_iopfl", "fundus_iopfl"])
def test_a_packed_bundle_is_the_bundle_and_its_code(name: str, tmp_path: Path) -> None:
    """Configs differ by one import, and no weights, caches or results are packed."""
    source = ROOT / "bundles" / name
    archive = package(str(source), str(tmp_path))
    assert re.fullmatch(rf"{name}_v\d+\.\d+\.\d+\.zip", Path(archive).name)
    root = unpacked(archive, tmp_path / "new")
    assert root.name == name
    assert {path.name for path in root.iterdir()} - {"models"} == {"LICENSE", "configs", "docs", "scripts"}
    for path in (source / "configs").iterdir():
        before, after = path.read_text(), (root / "configs" / path.name).read_text()
        if path.suffix != ".json" or "imports" not in json.loads(before):
            assert after == before
            continue
        assert json.loads(after).pop("imports") == ["$import scripts", *json.loads(before).pop("imports")]
        assert [line for line in after.splitlines() if '"$import scripts"' not in line] == before.splitlines()
    code = {n: content for n, content in contents(ROOT / "shared_iopfl").items() if n.endswith((".py", ".jinja"))}
    assert "report/templates/page.html.jinja" in code
    assert contents(root / "scripts" / "shared_iopfl") == code
    assert (root / "scripts" / "__init__.py").read_text().startswith("# Copyright (c) MONAI Consortium")


def test_configs_that_name_the_code_import_it(bundle: Path, tmp_path: Path) -> None:
    """Configs without imports are overlays of one that has them."""
    root = unpacked(package(str(bundle), str(tmp_path / "dist")), tmp_path / "new")
    for path in (root / "configs").glob("*.json"):
        config = json.loads(path.read_text())
        assert config.get("imports", ["$import scripts"])[0] == "$import scripts", path.name


def test_packing_twice_gives_the_same_archive(bundle: Path, tmp_path: Path) -> None:
    one, other = (Path(package(str(bundle), str(tmp_path / folder))).read_bytes() for folder in "ab")
    assert one == other


def test_each_packed_file_has_a_time_of_its_own(bundle: Path, tmp_path: Path) -> None:
    """MONAI Label distinguishes models by their modification times, which unzip restores."""
    with zipfile.ZipFile(package(str(bundle), str(tmp_path))) as packed:
        times = [entry.date_time for entry in packed.infolist()]
    assert len(set(times)) == len(times) > 60, "at least two minutes must occur"


def test_published_models_are_packed(run: Path, bundle: Path, tmp_path: Path) -> None:
    """With their manifest, and without other files in the folder."""
    publish(str(run), str(bundle / "models"), "research only")
    (bundle / "models" / "site.pt").write_bytes(b"mine")
    root = unpacked(package(str(bundle), str(tmp_path / "dist")), tmp_path / "new")
    check_manifest(root / "models")
    names = {path.name for path in (root / "models").iterdir()}
    assert names == {"model.pt", "model_A.pt", "model_B.pt", "scores.json", "manifest.json"}


def test_models_that_were_not_published_are_not_packed(run: Path, bundle: Path, tmp_path: Path) -> None:
    """Models that a training wrote to the bundle's folder, or changed there, are not given away by mistake."""
    shutil.copytree(run, bundle / "models")
    refused(lambda: package(str(bundle), str(tmp_path / "dist")), "never published")
    shutil.rmtree(bundle / "models")
    publish(str(run), str(bundle / "models"), "research only")
    shutil.copy(run / "model_A.pt", bundle / "models" / "model_B.pt")
    refused(lambda: package(str(bundle), str(tmp_path / "dist")), "model_B.pt")
    release(bundle / "models", ["model_B.pt"])
    refused(lambda: package(str(bundle), str(tmp_path / "dist")), "model_B.pt", "never published")
    assert not (tmp_path / "dist").exists()


def test_commands(run: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """From a run to an archive, as on the command line; terms are always text."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    models, dist = str(bundle / "models"), str(bundle.parent / "dist")
    for command in (
        ["publish", "--from_dir", str(run), "--to_dir", models, "--half", "True", "--terms", "research, teaching"],
        ["check", models],
        ["package", str(bundle), "--output_dir", dist],
    ):
        monkeypatch.setattr(sys, "argv", ["shared_iopfl", *command])
        main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        str(bundle / "models" / "manifest.json"),
        "4 files as published, of the sites A, B",
        "terms: research, teaching",
    ]
    assert Path(lines[3]).is_file()


def test_a_bundle_is_found_by_name_or_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(package("fundus_iopfl", "dist")).is_file()
    refused(lambda: package("liver_iopfl"), "liver_iopfl")


EVIL = "$__import__('os').system('touch PWNED')"


@pytest.mark.parametrize("name", ["features", "image_size"])
@pytest.mark.parametrize(
    "value", [EVIL, [EVIL], "@seed", "%x", {"_target_": "os.getcwd"}, "4", 4.5, True, 0, 10**6, None]
)
def test_settings_of_a_run_are_checked_and_never_evaluated(
    run: Path, bundle: Path, name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = run.parent / "run.json"
    content = json.loads(path.read_text())
    content["settings"][name] = value
    path.write_text(json.dumps(content))
    refused(lambda: publish(str(run), str(bundle / "models"), "research only"), "run.json", name)
    assert not (tmp_path / "PWNED").exists()
    assert not (bundle / "models").exists()


def test_other_fields_of_a_run_stay_text(
    run: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not evaluated when the manifest is read, either."""
    monkeypatch.chdir(tmp_path)
    fields = dict.fromkeys(("preset", "network_def", "seed", "ckpt_dir", "bundle_root", EVIL), EVIL)
    content = {"settings": {**SETTINGS, **fields}, "versions": {"torch": EVIL, EVIL: "1"}, "config": EVIL}
    (run.parent / "run.json").write_text(json.dumps(content))
    publish(str(run), str(bundle / "models"), EVIL)
    assert check_manifest(bundle / "models")["training"]["preset"] == EVIL
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("content", ["[]", '{"settings": 1}', '{"settings": [1]}', '{"settings": {}, "versions": "x"}'])
def test_a_run_of_another_shape_is_named(run: Path, bundle: Path, content: str) -> None:
    (run.parent / "run.json").write_text(content)
    refused(lambda: publish(str(run), str(bundle / "models"), "research only"), "run.json")


@pytest.mark.parametrize("row", ["site,model\nA,global\n", "site,model,metric,mean,cases\nA,global,dice,x,3\n"])
def test_a_faulty_summary_is_named(run: Path, bundle: Path, row: str) -> None:
    (run.parent / "summary.csv").write_text(row)
    refused(lambda: publish(str(run), str(bundle / "models"), "research only"), "summary.csv")


@pytest.mark.parametrize("place", ["docs/notes.txt", "configs/more.json", "docs/more", "LICENSE", "models"])
def test_a_link_out_of_the_bundle_is_not_followed(bundle: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("secret")
    folder = place in ("docs/more", "models")
    (bundle / place).unlink(missing_ok=True)
    (bundle / place).symlink_to(tmp_path / "outside" / ("" if folder else "secret.txt"))
    refused(lambda: package(str(bundle), str(tmp_path / "dist")), place, "leads out of the bundle")
    assert not (tmp_path / "dist").exists()


def test_a_link_within_the_bundle_is_packed_as_the_file_itself(bundle: Path, tmp_path: Path) -> None:
    (bundle / "docs" / "again.md").symlink_to("README.md")
    with zipfile.ZipFile(package(str(bundle), str(tmp_path / "dist"))) as packed:
        assert packed.read("prostate_iopfl/docs/again.md") == (bundle / "docs" / "README.md").read_bytes()


@pytest.mark.parametrize("version", ["../../x", "", None, 1])
def test_a_version_is_a_plain_name(bundle: Path, tmp_path: Path, version: Any) -> None:
    path = bundle / "configs" / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": version}))
    refused(lambda: package(str(bundle), str(tmp_path / "dist")), "version")
