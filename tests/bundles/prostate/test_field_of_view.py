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
"""A federation with a field of view in millimetres: its models carry it, and inference follows."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_start import PROSTATE
from monai.bundle import ConfigParser
from prostate_runs import FEDERATE, Run, mask_of

from shared_iopfl.models.manifest import read_manifest
from shared_iopfl.utils.errors import root_input_error


def test_models_know_the_field_of_view_they_were_trained_with(sites_dir: Path, tmp_path: Path, run_config: Run) -> None:
    run = {"dataset_dir": sites_dir, "output_dir": tmp_path / "run", "rounds": 1, "field_of_view": 90.0}
    run_config("federate", **{**FEDERATE, **run})
    models = tmp_path / "run" / "models"
    manifest = read_manifest(models)
    assert manifest is not None
    assert manifest["architecture"]["field_of_view"] == 90.0

    given = {"dataset_dir": sites_dir / "E", "ckpt_dir": models, "empty_masks": "allow"}
    served = run_config("inference", **given, output_dir=tmp_path / "masks")
    spacing = served.parser.get_parsed_content("dataset")[0]["image"].pixdim
    size = served.parser.get_parsed_content("image_size")
    assert spacing[:2].tolist() == pytest.approx([90 / size] * 2, rel=0.05)
    for scan in (path for path in (sites_dir / "E").glob("*.nii.gz") if "segmentation" not in path.name):
        assert mask_of(tmp_path / "masks" / scan.name).shape == mask_of(scan).shape

    with pytest.raises(Exception) as caught:
        run_config("inference", **given, output_dir=tmp_path / "other", field_of_view=0.0)
    assert "--field_of_view 0.0 contradicts" in str(root_input_error(caught.value))

    config = ConfigParser()
    config.read_config(str(PROSTATE / "configs" / "personalise.json"))
    config["ckpt_dir"] = str(models)
    assert config.get_parsed_content("field_of_view") == 90.0, "a model that is trained further keeps its field of view"
