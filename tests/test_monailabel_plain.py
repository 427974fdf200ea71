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
"""The bundles in a MONAI Label server as anyone sets one up, and a client that was written without knowing them.

No `serve.sh`: MONAI Label's own app, the bundles' folders as they lie with the weights they come with, its command.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
from label_server import (
    BUNDLES,
    DEPLOY,
    PATIENCE,
    PYTHON,
    ROOT,
    VENV,
    digest,
    ending,
    make_studies,
    needs_monailabel,
    own_mask,
    read,
    serving,
)

from shared_iopfl.models.files import load_experts
from shared_iopfl.models.packaging import package

PACKED = "fundus_iopfl"  # served from the zip of `python -m shared_iopfl package`, the other as it lies

pytestmark = [pytest.mark.slow, needs_monailabel]


@dataclass
class Visit:
    """What a client that knows MONAI Label alone asked of a server, and got."""

    bundle: Path  # the server's copy
    folder: Path  # what the client kept
    scans: list[Path]

    def mask(self, name: str) -> np.ndarray:
        return read(self.folder / f"{name}{ending(self.bundle.name)}")

    @property
    def answers(self) -> dict[str, Any]:
        return json.loads((self.folder / "answers.json").read_text())


@pytest.fixture(scope="module")
def visits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Visit]]:
    """One client a bundle, at the same server; the prostate's also trains, the fundus' comes from a zip."""
    folder = tmp_path_factory.mktemp("plain")
    app, found = folder / "app", {}
    shutil.copytree(VENV / "monailabel" / "sample-apps" / "monaibundle", app)
    for bundle in BUNDLES:
        if bundle == PACKED:
            with zipfile.ZipFile(package(str(ROOT / "bundles" / bundle), str(folder / "zip"))) as packed:
                packed.extractall(app / "model")
                for entry in packed.infolist():  # as `unzip` does
                    os.utime(app / "model" / entry.filename, (time.mktime((*entry.date_time, 0, 0, -1)),) * 2)
        else:
            shutil.copytree(ROOT / "bundles" / bundle, app / "model" / bundle)
    (folder / "studies").mkdir()
    command = ["monailabel", "start_server", "--app", app, "--studies", folder / "studies", "--host", "127.0.0.1"]
    command += ["--conf", "models", ",".join(BUNDLES), "--conf", "zoo_source", "ngc", "--conf", "sam2", "false"]
    paths = {"PATH": f"{VENV / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": f"{ROOT}:{DEPLOY / 'stand_in'}"}
    with serving(command, folder / "server.log", **paths) as url:
        for bundle in BUNDLES:
            masks = make_studies(folder / bundle / "scans", bundle)
            scans = sorted((folder / bundle / "scans").iterdir())[:2]
            labels = [masks / scan.name for scan in scans] if "prostate" in bundle else []
            found[bundle] = Visit(app / "model" / bundle, folder / bundle / "kept", scans)
            found[bundle].folder.mkdir()
            client = [PYTHON, Path(__file__).with_name("third_party_label.py"), url, bundle, found[bundle].folder]
            ended = subprocess.run(
                [*map(str, [*client, *scans, *labels])], capture_output=True, text=True, timeout=PATIENCE, cwd=folder
            )
            assert ended.returncode == 0, ended.stderr[-2000:] + (folder / "server.log").read_text()[-2000:]
        yield found


@pytest.fixture(params=BUNDLES)
def visit(request: pytest.FixtureRequest, visits: dict[str, Visit]) -> Visit:
    return visits[request.param]


def test_all_published_models_are_offered(visit: Visit) -> None:
    """The global model first, which is the server's default."""
    published = {path.name for path in (ROOT / "bundles" / visit.bundle.name / "models").glob("*.pt")}
    offered = visit.answers["offered"]["config"]["model_filename"]
    assert offered[0] == "model.pt"
    assert set(offered) == published


def test_masks_are_the_bundles_own(visit: Visit, tmp_path: Path) -> None:
    """Routed where no model is chosen, by the server's id or as a file; the chosen site's model as it is."""
    published = ROOT / "bundles" / visit.bundle.name
    routed = own_mask(published, visit.scans[0], tmp_path)
    assert routed.any()
    for name in ("first", "sent", "session"):
        np.testing.assert_array_equal(visit.mask(name), routed)
    chosen = str(published / "models" / visit.answers["offered"]["config"]["model_filename"][-1])
    np.testing.assert_array_equal(
        visit.mask("chosen"), own_mask(published, visit.scans[0], tmp_path, ckpt=chosen, mode="off")
    )
    assert (visit.mask("chosen") != routed).any()


def test_two_at_once_get_what_each_gets_alone(visit: Visit) -> None:
    for name in ("first", "second"):
        np.testing.assert_array_equal(visit.mask(f"{name}_at_once"), visit.mask(name))


def test_slicer_gets_the_mask_where_the_scan_is(visits: dict[str, Visit]) -> None:
    """As NRRD, which 3D Slicer asks for: the same voxels at the same place in the patient."""
    visit = visits["prostate_iopfl"]
    mask, scan = itk.imread(str(visit.folder / "slicer.nrrd")), itk.imread(str(visit.scans[0]))
    np.testing.assert_array_equal(itk.array_from_image(mask).T, visit.mask("first"))
    for of in (itk.origin, itk.spacing, lambda image: itk.array_from_matrix(image.GetDirection())):
        np.testing.assert_allclose(of(mask), of(scan), atol=1e-5)
    np.testing.assert_allclose(
        nib.load(visit.folder / "first.nii.gz").affine, nib.load(visit.scans[0]).affine, atol=1e-5
    )


def test_batch_keeps_the_mask_of_a_single_request(visits: dict[str, Visit]) -> None:
    visit = visits["prostate_iopfl"]
    assert visit.answers["batch"] == "DONE"
    np.testing.assert_array_equal(visit.mask("batch"), visit.mask("first"))


def test_the_model_that_was_trained_serves(visits: dict[str, Visit], tmp_path: Path) -> None:
    """Two labelled cases, one epoch: another model, written by the bundle's own handlers, and its mask."""
    visit = visits["prostate_iopfl"]
    published = ROOT / "bundles" / visit.bundle.name / "models"
    assert visit.answers["train"] == "DONE"
    assert digest(visit.bundle / "models" / "model.pt") != digest(published / "model.pt")
    assert (visit.mask("trained") != visit.mask("first")).any()
    sites = list(load_experts(str(published)))  # as the server read them, before the training
    np.testing.assert_array_equal(visit.mask("trained"), own_mask(visit.bundle, visit.scans[0], tmp_path, sites=sites))
