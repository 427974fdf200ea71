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
"""As a user types it: two eyes of a patient are never in two parts of a run."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared_iopfl.data.sites import find_cases

ROOT = Path(__file__).parents[2]
BUNDLE = "bundles/fundus_iopfl"


def typed(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def eyes(tmp_path, make_sites) -> Path:
    """Site A with two eyes of two patients and two patients of one eye, in other words than usual at site B."""
    sites = make_sites("fundus_iopfl", tmp_path / "sites")
    for site, words in (("A", ("OD", "OS")), ("B", ("rechts", "links"))):
        for number, case in enumerate(find_cases(sites, site)):
            name = f"{number // 2:03d}_{words[number % 2]}.png"
            for key in ("image", "label"):
                Path(case[key]).rename(Path(case[key]).with_name(name))
        # a third and a fourth patient
        for number in (7, 8):
            for kind in ("images", "masks"):
                folder = sites / site / kind
                (folder / f"{number:03d}.png").write_bytes((folder / f"000_{words[0]}.png").read_bytes())
    return sites


@pytest.mark.slow
def test_eyes_of_a_patient_stay_together(eyes, tmp_path):
    """Recognised and said at one site, declared by a pattern at both; by fold."""
    told = typed("shared_iopfl", "prepare", str(eyes), "--split_seed", "3")
    assert "'A': 6 files are taken for 4 patients" in told.stderr
    assert "(000_OD, 000_OS)" in told.stderr and "'B'" not in told.stderr
    told = typed("shared_iopfl", "prepare", str(eyes), "--patient", "(.*)_(OD|OS|rechts|links)", "--folds", "2")
    assert told.returncode == 0, told.stderr
    (line,) = told.stderr.splitlines()  # the third site's files have no such names
    assert "fits no file of site 'E'" in line
    lines = told.stdout.splitlines()
    assert all("2 patients" in line and "masks of 0, 1, 2" in line for line in lines[:2])

    run = ("monai.bundle", "run", "--config_file", f"{BUNDLE}/configs/federate.json", "--bundle_root", BUNDLE)
    tiny = {"image_size": 32, "features": 4, "rounds": 1, "own_rounds": 0, "passes": 1, "val_interval": 0, "shares": []}
    options = [word for name, value in tiny.items() for word in (f"--{name}", str(value))]
    places = {"dataset_dir": str(eyes), "output_dir": str(tmp_path / "out"), "sites": "['A','B']", "device": "cpu"}
    options += [word for name, value in places.items() for word in (f"--{name}", value)]
    pattern = ["--patient", "(.*)_(OD|OS|rechts|links)", "--folds", "2", "--fold", "1"]
    done = typed(*run, *options, *pattern)
    assert done.returncode == 0, done.stderr[-800:]
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        tested = {(row["site"], row["case"]) for row in csv.DictReader(file)}
    for site in "AB":
        patients = [case.split("_")[0] for its, case in tested if its == site]
        assert len(set(patients)) == 2
        assert all(patients.count(patient) == (1 if patient in ("007", "008") else 2) for patient in patients)
