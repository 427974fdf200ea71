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
"""The same seed gives the same bits; and under pseudonyms nothing that a run leaves or says names a scan."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_volumes import BODY, with_names
from fake_clients import equal
from interrupted import TinyRun
from monai.bundle import ConfigWorkflow
from tiny_scans import dicom_series, nifti

from shared_iopfl.models.files import load_weights
from shared_iopfl.utils.errors import root_input_error
from shared_iopfl.utils.tables import read_rows

Run = Callable[..., ConfigWorkflow]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_masks(
    tmp_path: Path, run_config: Run, sites_dir: Path, random_models: Callable[..., Path]
) -> None:
    """To the bit on a CPU, with the switch for deterministic kernels or without; another seed, other weights."""
    tiny, weights = TinyRun.make(tmp_path / "sites"), {}
    for name, options in {"one": {}, "again": {}, "switch": {"deterministic": True}, "other": {"seed": 1}}.items():
        given = {"seed": 0, **options}
        run = tiny.federation(tmp_path / name, rounds=2, **given)
        run.overrides["seed"] = given["seed"]  # of the clients, as federate.json gives it to both
        run.run()
        weights[name] = [load_weights(path) for path in sorted((tmp_path / name / "models").glob("*.pt"))]
    assert len(weights["one"]) == 3
    for name in ("again", "switch"):
        assert all(equal(a, b) for a, b in zip(weights["one"], weights[name])), name
    assert not any(equal(a, b) for a, b in zip(weights["one"], weights["other"]))

    models = random_models(tmp_path / "models")
    for name in ("first", "second"):
        options = {"dataset_dir": sites_dir / "E", "ckpt_dir": models, "output_dir": tmp_path / name}
        run_config("inference", preset="adapted", overlays=False, deterministic=name == "second", **options)
    masks = sorted((tmp_path / "first").glob("*.nii.gz"))
    assert masks
    for mask in masks:
        assert mask.read_bytes() == (tmp_path / "second" / mask.name).read_bytes()
    assert not torch.are_deterministic_algorithms_enabled()


def test_under_pseudonyms_nothing_names_a_scan(
    tmp_path: Path,
    run_config: Run,
    random_models: Callable[..., Path],
    capfd: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No file's name or content, no log line, no error, though some scans fail; the table alone knows."""
    clinic = tmp_path / "clinic_of_doe"
    clinic.mkdir()
    with_names(clinic / "Doe_John.nii.gz")
    nifti(clinic / "Doe_Jane.nii", BODY * 0)
    (clinic / "Doe_Jim.nii.gz").write_bytes(b"")
    dicom_series(clinic / "Doe_Ann", (BODY.T * 1000).astype("int16"))
    output, table = tmp_path / "masks", tmp_path / "table" / "who.csv"
    options = {"dataset_dir": clinic, "ckpt_dir": random_models(tmp_path / "models"), "output_dir": output}
    with pytest.raises(Exception) as raised, caplog.at_level("DEBUG", logger="shared_iopfl"):
        run_config("inference", pseudonyms=table, **options)
    assert "2 of 4 scans failed" in str(root_input_error(raised.value))
    said = "".join(capfd.readouterr()) + str(root_input_error(raised.value))
    said += "".join(record.getMessage() for record in caplog.records if record.levelname != "DEBUG")
    assert "doe" not in said.lower()
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 7
    for path in files:
        assert "doe" not in path.name.lower()
        told = re.sub(rb"base64,[^\"]*", b"", path.read_bytes())  # of pictures, whose letters are random
        assert b"doe" not in told.lower(), path.name
    known = {Path(row["file"]).name: row["pseudonym"] for row in read_rows(table)}
    failed = {row["case"] for row in read_rows(output / "failed.csv")}
    assert failed == {known["Doe_Jane.nii"], known["Doe_Jim.nii.gz"]}
    assert {path.name for path in output.glob("*.nii*")} == {
        f"{known['Doe_John.nii.gz']}.nii.gz",
        f"{known['Doe_Ann']}.nii.gz",
    }
    assert json.loads((output / "run.json").read_text())["scans"]["cases"] == 4
