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
"""Whatever a run is told to write into, what was there stays; a run that is killed has a row for each mask."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigWorkflow

from shared_iopfl.data.masks import SaveMaskd
from shared_iopfl.evaluation.run.folder import release
from shared_iopfl.models.files import load_experts
from shared_iopfl.utils.errors import InputError, root_input_error
from shared_iopfl.utils.tables import read_rows

Run = Callable[..., ConfigWorkflow]
GLANCE: dict[str, Any] = {"rounds": 1, "passes": 1, "own_rounds": 0, "shares": [], "val_interval": 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, random_models: Callable[[Path], Path]) -> Path:
    return random_models(tmp_path_factory.mktemp("run") / "models")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(run_config: Run, config: str, **options: Any) -> str:
    with pytest.raises(Exception) as error:
        run_config(config, **options)
    cause = root_input_error(error.value)
    assert cause is not None, error.value
    assert "\n" not in str(cause)
    return str(cause)


@pytest.mark.parametrize("output", ["data/A", "data/B", "data", "data/B/masks", "."])
@pytest.mark.parametrize("config", ["inference", "evaluate", "federate"])
def test_scans_are_never_written_over(
    config: str, output: str, sites_dir: Path, models: Path, tmp_path: Path, run_config: Run
) -> None:
    """The folder of another site's scans, or one around or inside the data, is no output_dir."""
    shutil.copytree(sites_dir, tmp_path / "data")
    before = content(tmp_path)
    own = {"dataset_dir": tmp_path / "data" / "B" if config == "inference" else tmp_path / "data"}
    own |= {} if config == "federate" else {"ckpt_dir": models}
    own |= {"site": "B"} if config == "evaluate" else {}
    line = refusal(run_config, config, output_dir=tmp_path / output, overwrite=True, **own)
    assert "output_dir" in line
    assert content(tmp_path) == before


def test_scans_of_one_name_are_served_into_folders_of_their_own(
    sites_dir: Path, models: Path, tmp_path: Path, run_config: Run
) -> None:
    scan = next((sites_dir / "E").glob("Case??.nii.gz"))
    for site in ("one", "other"):
        (tmp_path / site).mkdir()
        shutil.copy(scan, tmp_path / site / "t2.nii.gz")
    options = {"ckpt_dir": models, "output_dir": tmp_path / "masks", "mode": "off", "overlays": False}
    run_config("inference", dataset_dir=tmp_path / "one", **options)
    before = content(tmp_path / "masks")
    line = refusal(run_config, "inference", dataset_dir=tmp_path / "other", **options)
    assert "holds an inference (finished" in line
    assert content(tmp_path / "masks") == before
    run_config("inference", dataset_dir=tmp_path / "other", overwrite=True, **options)


@pytest.mark.parametrize("config", ["inference", "evaluate"])
def test_a_wrong_model_or_setting_costs_nothing_of_the_run_that_it_was_to_replace(
    config: str, sites_dir: Path, models: Path, tmp_path: Path, run_config: Run
) -> None:
    out = tmp_path / "out"
    own: dict[str, Any] = {"dataset_dir": sites_dir / "E"} if config == "inference" else {"dataset_dir": sites_dir}
    own |= {"ckpt_dir": models, "output_dir": out} | ({} if config == "inference" else {"site": "E", "split": "all"})
    run_config(config, **own)
    before = content(out)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model.pt").write_bytes(b"PK")
    wrong = [{"ckpt_dir": tmp_path / "nowhere"}, {"ckpt_dir": tmp_path / "damaged"}, {"features": 3}]
    wrong += [{"mode": "episodic", "routing": {"tail": 1}}, {"device": "banana"}, {"dataset_dir": tmp_path / "nowhere"}]
    for change in wrong:
        assert refusal(run_config, config, overwrite=True, **{**own, **change})
        release(out)
        assert content(out) == before, change
    run_config(config, overwrite=True, **own)
    assert content(out).keys() == before.keys()


@pytest.mark.parametrize("name", ["prostate_iopfl", "fundus_iopfl"])
def test_an_inference_that_is_cut_off_has_a_row_for_each_mask(
    name: str, tmp_path: Path, run_config: Run, random_models: Callable, make_sites: Callable, monkeypatch: Any
) -> None:
    """Cut off once the second mask is there, before anything that comes after it."""
    scans = make_sites(name, tmp_path / "data") / "E"
    options = {"ckpt_dir": random_models(tmp_path / "models", name), "output_dir": tmp_path / "masks"}
    written, save = [], SaveMaskd.__call__

    def cut_off(self: SaveMaskd, data: Any) -> Any:
        written.append(save(self, data)["pred_file"])
        if len(written) == 2:
            raise KeyboardInterrupt
        return {**data, "pred_file": written[-1]}

    monkeypatch.setattr(SaveMaskd, "__call__", cut_off)
    images = scans / "images" if "fundus" in name else scans
    with pytest.raises(KeyboardInterrupt):
        run_config("inference", name, dataset_dir=images, mode="episodic", **options)
    cases = {Path(path).name.removesuffix(".nii.gz").removesuffix(".png") for path in written}
    assert len(cases) == 2
    for table in ("routes.csv", "review.csv", "measures.csv"):
        assert {row["case"] for row in read_rows(tmp_path / "masks" / table)} == cases, table
    assert json.loads((tmp_path / "masks" / "routes.json").read_text())["cases"].keys() == cases
    assert json.loads((tmp_path / "masks" / "run.json").read_text())["status"] == "unfinished"


def test_training_keeps_the_models_that_are_there(sites_dir: Path, tmp_path: Path, run_config: Run) -> None:
    """Shipped ones too; a server that hands over the cases looks after its own folders."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.pt").write_bytes(b"shipped")
    common = {"site": "A", "ckpt_dir": tmp_path / "models", "output_dir": tmp_path / "out", "epochs": 1, "passes": 1}
    line = refusal(run_config, "train", dataset_dir=sites_dir, **common)
    assert "model.pt already exists" in line
    assert content(tmp_path / "models") == {"model.pt": b"shipped"}

    case = {
        "image": str(sites_dir / "A" / "Case00.nii.gz"),
        "label": str(sites_dir / "A" / "Case00_segmentation.nii.gz"),
    }
    own = {"train#dataset#data": [case], "validate#dataset#data": [case], "dataset_dir": tmp_path / "nowhere"}
    for _ in range(2):
        run_config("train", **common, **own)
    assert not (tmp_path / "out" / "run.json").exists()
    line = refusal(run_config, "train", dataset_dir=sites_dir, **common)
    run_config("train", dataset_dir=sites_dir, overwrite=True, **common)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "finished"


def test_a_federation_leaves_none_of_another_ones_models(sites_dir: Path, tmp_path: Path, run_config: Run) -> None:
    common = {"dataset_dir": sites_dir, "output_dir": tmp_path, **GLANCE}
    run_config("federate", sites=["A", "E"], **common)
    line = refusal(run_config, "federate", sites=["A", "B"], **common)
    assert "holds a federation (finished" in line
    assert "resume" in line
    assert "begun with sites" in refusal(run_config, "federate", sites=["A", "B"], resume=True, **common)
    old = (tmp_path / "models" / "model_E.pt").read_bytes()
    run_config("federate", sites=["A", "B"], overwrite=True, **common)
    models = tmp_path / "models"
    assert {path.name for path in models.glob("*.pt")} == {"model.pt", "model_A.pt", "model_B.pt"}
    assert not (tmp_path / "masks" / "E").exists()

    (models / "model_E.pt").write_bytes(old)  # nor are they used, however they came there
    with pytest.raises(InputError, match=r"model_E\.pt, of a site that .*run\.json does not name"):
        load_experts(str(models), equal_too=True)
    assert load_experts(str(models), ["A", "B"], equal_too=True).keys() == {"A", "B"}
