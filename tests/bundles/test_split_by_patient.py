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
from pathlib import Path

import pytest
from typed import run_bundle, typed

from shared_iopfl.data.splits import find_cases

PATTERN = "(.*)_(OD|OS|rechts|links)"


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
    told = typed("-m", "shared_iopfl", "prepare", eyes, "--split_seed", "3")
    assert "'A': 6 files are taken for 4 patients" in told.stderr
    assert "(000_OD, 000_OS)" in told.stderr and "'B'" not in told.stderr
    told = typed("-m", "shared_iopfl", "prepare", eyes, "--patient", PATTERN, "--folds", "2")
    assert told.returncode == 0, told.stderr
    (line,) = told.stderr.splitlines()  # the third site's files have no such names
    assert "fits no file of site 'E'" in line
    lines = told.stdout.splitlines()
    assert all("2 patients" in line and "masks of 0, 1, 2" in line for line in lines[:2])

    tiny = {"image_size": 32, "features": 4, "rounds": 1, "own_rounds": 0, "passes": 1, "val_interval": 0, "shares": []}
    places = {"dataset_dir": eyes, "output_dir": tmp_path / "out", "sites": "['A','B']", "device": "cpu"}
    by_patient = {"patient": PATTERN, "folds": 2, "fold": 1}
    done = run_bundle("bundles/fundus_iopfl", "federate", **tiny, **places, **by_patient)
    assert done.returncode == 0, done.stderr[-800:]
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        tested = {(row["site"], row["case"]) for row in csv.DictReader(file)}
    for site in "AB":
        patients = [case.split("_")[0] for its, case in tested if its == site]
        assert len(set(patients)) == 2
        assert all(patients.count(patient) == (1 if patient in ("007", "008") else 2) for patient in patients)
