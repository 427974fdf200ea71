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
"""As a user types it: models that training wrote run without a word on how they were trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typed import run_bundle

from shared_iopfl.models.architecture import check_architecture
from shared_iopfl.models.manifest import check_manifest
from shared_iopfl.models.packaging import publish
from shared_iopfl.utils.errors import InputError, root_input_error

ROOT = Path(__file__).parents[2]
SHORT = {"rounds": 1, "own_rounds": 0, "shares": [], "passes": 1, "val_interval": 0}


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["prostate_iopfl", "fundus_iopfl"])
def test_a_federation_s_models_run_as_they_were_trained(bundle, tmp_path, make_sites, run_config):
    """Inference, scoring and publishing take what they need from the folder; what contradicts it is one line."""
    sites = make_sites(bundle, tmp_path / "sites")
    out = tmp_path / "out"
    run_config("federate", bundle, dataset_dir=sites, output_dir=out, sites=["A", "B"], normalise=False, **SHORT)
    models = out / "models"
    architecture = json.loads((models / "manifest.json").read_text())["architecture"]
    assert (architecture["image_size"], architecture["features"], architecture["normalise"]) == (32, 4, False)
    assert architecture["network_def"]["features"] == [4, 8, 16, 32, 64, 4]

    root, scans = f"bundles/{bundle}", {"dataset_dir": sites / "E", "ckpt_dir": models, "empty_masks": "allow"}
    ran = run_bundle(root, "inference", **scans, output_dir=tmp_path / "masks", overlays=False, device="cpu")
    assert ran.returncode == 0, ran.stderr[-800:]
    settings = json.loads((tmp_path / "masks" / "run.json").read_text())["settings"]
    assert {name: settings[name] for name in ("image_size", "features", "normalise")} == {
        name: architecture[name] for name in ("image_size", "features", "normalise")
    }
    wrong = run_bundle(root, "inference", **scans, output_dir=tmp_path / "no", image_size=64, device="cpu")
    line = wrong.stderr.strip().splitlines()[-1]
    assert wrong.returncode == 1
    assert line.startswith("error: --image_size 64 contradicts") and "trained with 32" in line

    publish(str(models), str(tmp_path / "set"), "for a test", bundle=str(ROOT / "bundles" / bundle))
    published = check_manifest(tmp_path / "set")["architecture"]
    assert published.items() >= architecture.items()


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["prostate_iopfl", "fundus_iopfl"])
def test_a_site_s_own_training_says_it_too(bundle, tmp_path, make_sites, run_config):
    sites = make_sites(bundle, tmp_path / "sites")
    options = {"dataset_dir": sites, "output_dir": tmp_path / "out", "ckpt_dir": tmp_path / "models", "site": "A"}
    run_config("train", bundle, **options, epochs=1, passes=1, tensorboard=False, val_interval=1)
    architecture = json.loads((tmp_path / "models" / "manifest.json").read_text())["architecture"]
    with pytest.raises(InputError, match="image_size"):
        check_architecture(tmp_path / "models", {"image_size": 48}, network_def=architecture["network_def"])
    scored = {**options, "split": "test", "image_size": 32, "features": 4}
    run_config("evaluate", bundle, **scored)
    with pytest.raises(Exception, match="check_architecture") as error:
        run_config("evaluate", bundle, **{**scored, "image_size": 48})
    assert "--image_size 48 contradicts" in str(root_input_error(error.value))


@pytest.mark.slow
def test_models_without_a_manifest_run_with_explicit_flags(tmp_path, make_sites, random_models):
    """As older runs left them: one line says that nothing was compared; without the flags, one says which they are."""
    bundle = "prostate_iopfl"
    sites = make_sites(bundle, tmp_path / "sites")
    models = random_models(tmp_path / "models", bundle)
    scans = {"dataset_dir": sites / "E", "ckpt_dir": models, "empty_masks": "allow", "overlays": False, "device": "cpu"}
    given = {**scans, "output_dir": tmp_path / "masks", "image_size": 32}
    ran = run_bundle(f"bundles/{bundle}", "inference", **given, features=4)
    assert ran.returncode == 0, ran.stderr[-800:]
    assert "has no manifest.json" in ran.stderr + ran.stdout
    wrong = run_bundle(f"bundles/{bundle}", "inference", **{**given, "output_dir": tmp_path / "other"})
    assert wrong.returncode == 1
    assert "give --features" in wrong.stderr.strip().splitlines()[-1]
