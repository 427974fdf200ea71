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
"""Bad and odd inputs through the bundles' own inference: a mask on the scan, or one line that names the file."""

from __future__ import annotations

import csv
import gzip
import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bad_scans import CORPORA, Corpus, make_corpus
from monai.bundle import ConfigWorkflow
from PIL import Image, ImageOps
from typed import run_bundle

from shared_iopfl.data.scan_files import find_scans, printable
from shared_iopfl.utils.errors import root_input_error

BUNDLES = Path(__file__).parents[2] / "bundles"
ODD = {"prostate_iopfl": ("sheared.nii.gz", "one_row.nii.gz"), "fundus_iopfl": ("turned.jpg", "palette.png")}
BAD = {"prostate_iopfl": "cut.nii.gz", "fundus_iopfl": "cut.png"}
ENDINGS = (".nii.gz", ".nii", ".mha", ".nrrd", ".png")
LABELS = {"prostate_iopfl": {0, 1}, "fundus_iopfl": {0, 1, 2}}
Run = Callable[..., ConfigWorkflow]


@dataclass
class Served:
    """What the command line, with overlays and worker processes, left of a whole corpus."""

    bundle: str
    scans: Path
    models: Path
    output: Path
    process: subprocess.CompletedProcess[str]
    reasons: dict[str, str]  # of the failed ones, file name -> reason

    @property
    def corpus(self) -> Corpus:
        return CORPORA[self.bundle]

    def masks(self) -> dict[str, Path]:
        """Those written, file name of the scan -> mask."""
        written = {}
        for scan in find_scans(self.scans):
            paths = [self.output / f"{scan['case']}{ending}" for ending in ENDINGS]
            written.update({Path(scan["image"]).name: path for path in paths if path.exists()})
        return written


def failed(output: Path) -> dict[str, str]:
    """File -> reason; without how sure the disc finder was, which on one colour everywhere is rounding alone."""
    with (output / "failed.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {Path(row["file"]).name: re.sub(r"confidence [\d.]+", "confidence", row["reason"]) for row in rows}


def run_to_its_end(run_config: Run, bundle: str, **overrides: Any) -> str:
    """The line that a run with failures ends in."""
    with pytest.raises(Exception) as caught:
        run_config("inference", bundle, empty_masks="allow", **overrides)  # of random models
    cause = root_input_error(caught.value)
    assert cause is not None, caught.value
    return str(cause)


@pytest.fixture(scope="module", params=CORPORA)
def served(request: Any, tmp_path_factory: pytest.TempPathFactory, random_models: Callable[..., Path]) -> Served:
    bundle, root = request.param, tmp_path_factory.mktemp(request.param)
    scans = make_corpus(CORPORA[bundle], root / "scans")
    models, output = random_models(root / "models", bundle), root / "masks"
    options: dict[str, Any] = {"dataset_dir": scans, "ckpt_dir": models, "output_dir": output}
    options |= {"image_size": 32, "features": 4, "device": "cpu", "empty_masks": "allow", "dataloader#num_workers": 2}
    process = run_bundle(BUNDLES / bundle, "inference", **options)
    return Served(bundle, scans, models, output, process, failed(output))


def test_there_are_many_of_them() -> None:
    refused = [name for corpus in CORPORA.values() for name, (_, what) in corpus.items() if what]
    assert len(refused) >= 60
    assert sum(len(corpus) for corpus in CORPORA.values()) - len(refused) >= 60


def test_every_input_ends_in_a_mask_or_in_a_line_that_names_it(served: Served) -> None:
    masks, wrong = served.masks(), {}
    for name, (_, what) in served.corpus.items():
        line = served.reasons.get(printable(name))
        if what is None:
            fits = line is None and name in masks
        else:
            fits = line is not None and bool(re.search(what, line)) and name in line and name not in masks
        if not fits:
            wrong[name] = line
    assert not wrong, "\n".join(f"{name}: {line}" for name, line in wrong.items())


def test_nothing_else_is_written(served: Served) -> None:
    """A mask and an overlay for each that has not failed, the run's tables, no half files; every line is one line."""
    good = [name for name, (_, what) in served.corpus.items() if what is None]
    tables = {"run.json", "failed.csv", "routes.csv", "routes.json", "review.csv", "measures.csv", "site.pt"}
    tables |= {"written.jsonl", ".run.lock", "scans.csv", "not_taken.csv", "report.html"}
    overlays = {path.name for path in served.output.glob("*_overlay.png")}
    assert len(overlays) >= len(good) - 6  # a scan of one row makes no picture, nor a name that is too long
    others = {path.name for path in served.output.iterdir()} - {path.name for path in served.masks().values()}
    assert others - overlays <= tables
    assert len(served.masks()) == len(good)
    assert not any("\n" in reason for reason in served.reasons.values())
    routed = json.loads((served.output / "routes.json").read_text())["cases"]
    assert (routed["site"]["scans"] if "site" in routed else len(routed)) == len(good)


def test_the_run_ends_in_a_line_that_counts_them(served: Served) -> None:
    """With status 1, and nothing of the code in the text."""
    bad = sum(what is not None for _, what in served.corpus.values())
    assert served.process.returncode == 1
    assert [line for line in served.process.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {bad} of {len(served.corpus)} scans failed: see {served.output / 'failed.csv'}"
    ]
    assert "Traceback" not in served.process.stdout + served.process.stderr


def test_masks_of_odd_scans_lie_on_them(served: Served) -> None:
    """The scan's own shape and affine, or pixels as they are looked at; the values of a mask and no others."""
    for name, mask in served.masks().items():
        scan = served.scans / name
        if mask.suffix == ".png":
            with Image.open(scan) as picture:
                size = ImageOps.exif_transpose(picture).size
            values = np.asarray(Image.open(mask))
            assert values.shape == size[::-1], name
        elif ".nii" in name.lower() or scan.suffix.lower() in (".mgz", ".mgh", ".hdr", ".img"):
            image: Any = nib.load(scan)
            written: Any = nib.load(mask)
            values = np.asarray(written.dataobj)
            assert values.shape == image.shape, name
            np.testing.assert_allclose(
                written.affine, image.affine, 0 if ".nii" in name.lower() else 1e-5, err_msg=name
            )
        elif scan.is_dir():
            values = np.asarray(nib.load(mask).dataobj)  # type: ignore[attr-defined]
            assert values.shape == (18, 20, len(list(scan.glob("*.dcm")))), name
        else:
            itk = pytest.importorskip("itk")
            image, written = itk.imread(str(scan)), itk.imread(str(mask))
            values = itk.array_from_image(written)
            assert written.GetLargestPossibleRegion().GetSize() == image.GetLargestPossibleRegion().GetSize(), name
            assert list(written.GetOrigin()) == list(image.GetOrigin()), name
        assert set(np.unique(values)) <= LABELS[served.bundle], name


def test_nothing_that_a_header_says_of_the_patient_is_in_the_mask(served: Served) -> None:
    """Free fields of a NIfTI header, its extensions, and a DICOM file's tags."""
    for name, mask in served.masks().items():
        data = mask.read_bytes()
        data = gzip.decompress(data) if mask.suffix == ".gz" else data
        assert b"DOE" not in data and b"1950" not in data, name


def test_a_scan_gets_the_mask_that_it_gets_alone(served: Served, tmp_path: Path, run_config: Run) -> None:
    """The failures before it leave no trace, and alone it leaves no ``failed.csv``."""
    for name in ODD[served.bundle]:
        options = {"ckpt_dir": served.models, "output_dir": tmp_path, "overlays": False, "overwrite": True}
        run_config("inference", served.bundle, dataset_dir=served.scans / name, **options)
        mask = served.masks()[name]
        assert (tmp_path / mask.name).read_bytes() == mask.read_bytes()
    assert not (tmp_path / "failed.csv").exists()


@pytest.mark.parametrize("mode", ["episodic", "site"])
def test_a_bad_scan_alone_is_named_at_once(served: Served, mode: str, tmp_path: Path, run_config: Run) -> None:
    scan = served.scans / BAD[served.bundle]
    options = {"dataset_dir": scan, "ckpt_dir": served.models, "output_dir": tmp_path, "mode": mode}
    assert str(scan) in run_to_its_end(run_config, served.bundle, **options)
    assert {path.name for path in tmp_path.iterdir()} <= {"run.json", "written.jsonl", ".run.lock"}


def some_scans(served: Served, folder: Path) -> Path:
    """Two that get masks, and a bad one between them."""
    folder.mkdir()
    first, second = ODD[served.bundle]
    for place, name in (("a", first), ("b", BAD[served.bundle]), ("c", second)):
        (folder / f"{place}_{name}").write_bytes((served.scans / name).read_bytes())
    return folder


def test_the_network_of_a_site_is_made_of_the_good_scans(served: Served, tmp_path: Path, run_config: Run) -> None:
    scans, output = some_scans(served, tmp_path / "scans"), tmp_path / "masks"
    options = {"ckpt_dir": served.models, "output_dir": output, "mode": "site", "overlays": False}
    line = run_to_its_end(run_config, served.bundle, dataset_dir=scans, **options)
    assert line.startswith("1 of 3 scans failed")
    assert (output / "site.pt").is_file()
    assert json.loads((output / "routes.json").read_text())["cases"]["site"]["scans"] == 2


def test_no_scan_is_let_off_in_training() -> None:
    """What is learnt must be what was asked for: there a bad scan ends the run."""
    for bundle in CORPORA:
        for config in ("train", "federate", "multi_gpu_train"):
            assert "Tolerant" not in (BUNDLES / bundle / "configs" / f"{config}.json").read_text()
