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
"""`iopfl calibrate`, from labelled sites to the expected Dice of a scan without labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fl_bundles import NAMES

from shared_iopfl import segment
from shared_iopfl.commands.main import main
from shared_iopfl.data.scan_files import find_scans
from shared_iopfl.data.splits import site_cases
from shared_iopfl.models.files import load_weights
from shared_iopfl.models.manifest import check_manifest
from shared_iopfl.models.packaging import publish
from shared_iopfl.utils.reading import read_json
from shared_iopfl.utils.tables import read_rows, write_json

OPTIONS = ["--image_size", "32", "--features", "4", "--device", "cpu"]
SIZES = {"image_size": 32, "features": 4, "device": "cpu"}


@pytest.mark.parametrize("bundle", NAMES)
def test_a_calibrated_set_of_models_estimates_dice(
    bundle: str,
    tmp_path: Path,
    make_sites: Callable,
    random_models: Callable,
    capsys: pytest.CaptureFixture,
):
    """Each validation case is segmented without its site's expert; segmenting and publishing use what was fitted."""
    data = make_sites(bundle, tmp_path / "data")
    models = random_models(tmp_path / "run" / "models", bundle)
    settings = {"fractions": [0.5, 0.5, 0.0], **SIZES}
    write_json(tmp_path / "run" / "run.json", {"kind": "federate", "settings": settings, "versions": {}})
    task, out = bundle.removesuffix("_iopfl"), tmp_path / "calibration"
    words = ["--ckpt_dir", str(models), "--virtual", "[noise]", *OPTIONS]
    main(["calibrate", task, str(data), str(out), *words])
    assert "mean absolute error at sites left out" in capsys.readouterr().out
    rows = read_rows(out / "calibration.csv")
    assert {(row["site"], row["scanner"]) for row in rows} == {(s, v) for s in "AB" for v in ("as_taken", "noise")}
    split = {"fractions": settings["fractions"]}  # that of the training, by which no other case is used
    held = {(site, case["case"]) for site in "AB" for case in site_cases(str(data), site, "validation", 0, **split)}
    assert {(row["site"], row["case"]) for row in rows} == held and len(held) < 8
    for site, other in ("AB", "BA"):
        routes = read_rows(out / "masks" / site / "as_taken" / "routes.csv")
        assert {row["expert"] for row in routes} == {"global", other}

    assert 0 < read_json(out / "calibration.json")["target_size"] < 1

    scan = find_scans(str(data / "E"), pictures="fundus" in bundle)[0]["image"]
    with_calibration = segment(task, scan, ckpt_dir=str(models), **SIZES)
    if "empty" not in with_calibration.reasons:
        value, low, high = with_calibration.expected_dice
        assert 0 <= low <= value <= high <= 1 or low <= high
    assert segment(task, scan, ckpt_dir=str(models), preset="adapted", **SIZES).expected_dice is None
    again = {name: tensor + 0.01 for name, tensor in load_weights(models / "model.pt").items()}
    kept = (models / "model.pt").read_bytes()
    torch.save(again, models / "model.pt")  # trained further, by hand
    capsys.readouterr()
    main(["segment", task, scan, str(tmp_path / "masks"), "--ckpt_dir", str(models), *OPTIONS])
    assert "the calibration was made with other models" in capsys.readouterr().err
    assert {row["expected_dice"] for row in read_rows(tmp_path / "masks" / "review.csv")} == {""}
    (models / "model.pt").write_bytes(kept)
    publish(str(models), str(tmp_path / "published"), "for tests", bundle=str(Path("bundles") / bundle))
    assert "calibration.json" in check_manifest(tmp_path / "published")["files"]
