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
"""Provenance of a run; scans under pseudonyms; deterministic kernels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from interrupted import BUNDLE
from site_folders import saml
from tiny_scans import VALUES, dicom_series, nifti

from shared_iopfl.data.loading import LoadCased
from shared_iopfl.data.scan_files import find_scans
from shared_iopfl.evaluation.pseudonyms import under_pseudonyms
from shared_iopfl.evaluation.run.determinism import set_backends
from shared_iopfl.evaluation.run.provenance import InferenceRecorder, write_run
from shared_iopfl.evaluation.scores import read_json
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import read_rows


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "clinic"
    folder.mkdir()
    for name in ("Doe_John.nii.gz", "Roe_Jane.nii"):
        nifti(folder / name, VALUES)
    dicom_series(folder / "Miller, Ann", (VALUES.T * 1000).astype("int16"))
    return folder


# ---- run.json -------------------------------------------------------------------------------------------------------


def test_a_training_writes_its_settings_and_data(tmp_path):
    saml(tmp_path, "A", 3)
    settings = {"seed": 3, "rounds": 8, "local_epochs": 2, "features": 4, "device": "cpu", "dataset_dir": str(tmp_path)}
    settings |= {"val_interval": 5, "client_config": {"val_interval": 0}}  # of the run, and of its clients
    write_run(str(tmp_path), settings, str(tmp_path), ["A"], str(BUNDLE))
    run = read_json(tmp_path / "run.json")
    assert run["settings"]["seed"] == 3
    assert (run["settings"]["val_interval"], run["config"]["val_interval"]) == (5, 0)
    assert run["sites"]["A"]["cases"] == 3 and len(run["sites"]["A"]["fingerprint"]) == 16
    # the package's version may lack the build that torch names, such as +cu130
    assert torch.__version__.startswith(run["versions"]["torch"]) and run["versions"]["monai"]
    assert run["revision"] and run["threads"] == torch.get_num_threads()
    config = run["config"]
    assert (config["seed"], config["site"], config["epochs"], config["start_epoch"]) == (3, "A", 16, 12)
    assert config["alpha"] == 0.5  # that nobody asked for
    assert config["network_def"]["_target_"] == "BasicUNet"
    assert not any("$" in str(config[name]) for name in ("epochs", "ckpt_dir", "output_dir", "image_size"))


def test_an_inference_writes_its_models_and_names_no_scan(scans, tmp_path):
    (tmp_path / "models").mkdir()
    for name in ("model.pt", "model_A.pt", "notes.txt"):
        (tmp_path / "models" / name).write_bytes(name.encode())
    found = [*find_scans(scans), {"image": str(scans / "gone.nii"), "case": "gone"}]
    engine = Engine(lambda *_: None)
    InferenceRecorder(str(tmp_path), {"mode": "episodic"}, found, str(tmp_path / "models")).attach(engine)
    engine.run([0])
    run = read_json(tmp_path / "run.json")
    assert run["scans"]["cases"] == 4 and run["settings"] == {"mode": "episodic"}
    assert list(run["models"]) == ["model.pt", "model_A.pt"] and all(len(sha) == 64 for sha in run["models"].values())
    assert not any(name in (tmp_path / "run.json").read_text() for name in ("Doe", "Roe", "Miller", str(scans)))


# ---- pseudonyms -----------------------------------------------------------------------------------------------------


def test_scans_are_processed_under_pseudonyms(scans, tmp_path):
    """The same scans are read through links; the table with their files is in another folder."""
    found, table = find_scans(scans), tmp_path / "apart" / "who.csv"
    served = under_pseudonyms(found, table, tmp_path / "masks")
    assert [scan["case"] for scan in served] == ["scan_0001", "scan_0002", "scan_0003"]
    for scan, pseudonymous in zip(found, served):
        assert os.path.samefile(scan["image"], pseudonymous["image"])
        image = LoadCased("image")(pseudonymous)["image"]
        assert torch.equal(image, LoadCased("image")(scan)["image"])
        assert not any(name in str(image.meta) for name in ("Doe", "Roe", "Miller", "clinic"))
    rows = read_rows(table)
    assert [row["file"] for row in rows] == [scan["image"] for scan in found]
    assert [row["pseudonym"] for row in rows] == [scan["case"] for scan in served]


def test_a_scan_keeps_its_pseudonym(scans, tmp_path):
    table = tmp_path / "who.csv"
    first = {scan["case"] for scan in under_pseudonyms(find_scans(scans), table, tmp_path / "masks")}
    nifti(scans / "Adams_Amy.nii", VALUES)
    (scans / "Roe_Jane.nii").unlink()
    again = under_pseudonyms(find_scans(scans), table, tmp_path / "masks")
    names = {Path(os.path.realpath(scan["image"])).name: scan["case"] for scan in again}
    assert names["Adams_Amy.nii"] == "scan_0004"
    assert {names["Doe_John.nii.gz"], names["Miller, Ann"]} < first
    assert len(read_rows(table)) == 4


def test_without_a_table_scans_keep_their_names(scans, tmp_path):
    assert under_pseudonyms(find_scans(scans), "", tmp_path) == find_scans(scans)


def test_a_name_that_is_not_utf8_has_a_pseudonym_too(tmp_path):
    scan = {"image": str(tmp_path / os.fsdecode(b"M\xfcller.nii")), "case": "M_ller"}
    Path(scan["image"]).write_bytes(b"x")
    for _ in range(2):
        [served] = under_pseudonyms([scan], tmp_path / "who.csv", tmp_path / "masks")
        assert served["case"] == "scan_0001" and os.path.samefile(served["image"], scan["image"])


def test_a_table_in_the_folder_of_masks_or_with_other_columns_is_rejected(scans, tmp_path):
    with pytest.raises(InputError, match="in the folder of the masks"):
        under_pseudonyms(find_scans(scans), tmp_path / "masks" / "who.csv", tmp_path / "masks")
    (tmp_path / "other.csv").write_text("case,dice\na,1\n")
    with pytest.raises(InputError, match="not a table of pseudonyms"):
        under_pseudonyms(find_scans(scans), tmp_path / "other.csv", tmp_path / "masks")


# ---- kernels --------------------------------------------------------------------------------------------------------


def test_kernels_are_selected_for_speed_or_reproducibility():
    cudnn = torch.backends.cudnn
    try:
        for wanted in (True, False):
            set_backends(wanted)
            assert torch.are_deterministic_algorithms_enabled() == wanted
            assert (cudnn.deterministic, cudnn.benchmark) == (wanted, not wanted)
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.deterministic, cudnn.benchmark = False, False
