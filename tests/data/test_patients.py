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
"""No patient is in two parts: both eyes, all visits and all series of a patient are recognised or declared as such."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from site_folders import datalist, saml, touch

from shared_iopfl.commands.tools import prepare
from shared_iopfl.data import layouts
from shared_iopfl.data.splits import find_cases, fold_cases, site_cases, split_cases
from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.errors import InputError, warn_once

PARTS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    warn_once.cache_clear()


def pictures(root: Path, *names: str, site: str = "A") -> None:
    touch(root, *(f"{site}/{kind}/{name}.png" for name in names for kind in ("images", "masks")))


def whose(root: Path, patient: str = "auto", site: str = "A") -> dict[str, str]:
    return {case["case"]: case["patient"] for case in find_cases(root, site, patient)}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("_OD", "_OS"),
        ("-os", "-od"),
        ("_L", "_R"),
        (" left", " right"),
        ("_visit1", "_visit2"),
        ("_ses-01_T2w", "_ses-02_T2w"),
        ("_series_3", "_series_12"),
        ("_baseline", "_followup"),
        ("_OD_visit1", "_OS_visit2"),
        ("", "_visit2"),
    ],
)
def test_names_that_differ_only_in_side_or_visit_are_one_patient(tmp_path, caplog, one, other):
    """All splits, by share and by fold, keep them together, and a warning states what was recognised."""
    names = [f"P{n:02d}{word}" for n in range(12) for word in (one, other)]
    if "visit1" in one and "OD" in one:  # which needs a pair for either word
        names += [f"P{n:02d}_OS_visit1" for n in range(12)]
    pictures(tmp_path, *names)
    with caplog.at_level(logging.WARNING):
        found = whose(tmp_path)
    assert len(set(found.values())) == 12
    assert all(found[name] == found[f"{name[:3]}{one}"] for name in names)
    (record,) = caplog.records
    assert "are taken for 12 patients" in record.getMessage()
    for seed in range(4):
        parts = [{c["case"][:3] for c in site_cases(tmp_path, "A", part, seed)} for part in PARTS]
        assert sum(map(len, parts)) == 12 == len(set.union(*parts))
        parts = [{c["case"][:3] for c in fold_cases(tmp_path, "A", part, 1, 3, seed)} for part in PARTS]
        assert sum(map(len, parts)) == 12 == len(set.union(*parts))
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "names",
    [
        [f"Case{n:02d}" for n in range(6)],
        [f"V{n:04d}" for n in range(6)],
        [f"gdrishtiGS_{n:03d}" for n in range(6)],
        [f"prostate_scan_{n}" for n in range(6)],
        [f"{place}_scan_{n}" for n in range(3) for place in ("north", "south")],
        [f"{n}_L" for n in range(6)],  # no right one: it may say anything
        ["1_OD", "2_OS", "3_OD", "4_OS"],
        [f"{n}_{n + 1}" for n in range(6)],
    ],
)
def test_other_names_are_separate_patients(tmp_path, caplog, names):
    """A word alone is no evidence: the names of two files of the site must differ in nothing else."""
    pictures(tmp_path, *names)
    assert whose(tmp_path) == {name: name for name in names}
    assert not caplog.records


def test_a_pattern_declares_patients(tmp_path, caplog):
    """Its group is the patient; a file that does not match is a patient of its own; "(.*)" disables recognition."""
    pictures(tmp_path, "7_OD", "7_OS", "8_x", "7a")
    assert whose(tmp_path, "(.*)_(OD|OS)") == {"7_OD": "7", "7_OS": "7", "8_x": "8_x", "7a": "7a"}
    assert whose(tmp_path, r"(\d+).*") == {"7_OD": "7", "7_OS": "7", "8_x": "8", "7a": "7"}
    assert whose(tmp_path, "(.*)") == {name: name for name in ("7_OD", "7_OS", "8_x", "7a")}
    assert whose(tmp_path, "(q+)") == whose(tmp_path, "(.*)")  # as where another site names its files so
    assert "fits no file of site 'A', such as 7_OD" in caplog.text


@pytest.mark.parametrize("value", ["", "no group", "(", 7, None, ["(.*)"]])
def test_invalid_ways_to_recognise_patients_are_rejected(tmp_path, value):
    with pytest.raises(InputError, match="patient must be"):
        check_values({"patient": value})


def test_a_table_declares_patients(tmp_path):
    pictures(tmp_path, "a", "b", "c")
    table = tmp_path / "patients.csv"
    table.write_text("file,patient\na.png,p\nA/images/b.png,p\nc,q\n")
    assert whose(tmp_path, str(table)) == {"a": "p", "b": "p", "c": "q"}
    table.write_text("file,patient\na.png,p\n")
    with pytest.raises(InputError, match=r"names no patient for .*b\.png"):
        whose(tmp_path, str(table))
    for content in ("file,who\na,p\n", None):
        table.write_text(content) if content else table.unlink()
        with pytest.raises(InputError, match="columns file and patient"):
            whose(tmp_path, str(table))


@pytest.mark.parametrize("key", ["patient", "patient_id", "subject_id", "subject", "PatientID"])
@pytest.mark.parametrize("first", [0, "x"])
def test_a_datalist_names_patients_by_its_usual_keys(tmp_path, key, first):
    """0 is a patient; for an item that names none, the name of its file counts."""
    saml(tmp_path, "L", 4)
    named: list[Any] = [first, first, 5, None]
    items = [
        {"image": f"L/Case0{n}.nii.gz", "label": f"L/Case0{n}_segmentation.nii.gz", key: value}
        for n, value in enumerate(named)
    ]
    datalist(tmp_path, training=items)
    assert list(whose(tmp_path, site="L").values()) == [str(first), str(first), "5", "L/Case03"]


@pytest.mark.parametrize(("headers", "count"), [(["1", "1", "2"], 2), (["anonymous"] * 3, 3), (["", "", ""], 3)])
def test_dicom_headers_name_patients(tmp_path, monkeypatch, headers, count):
    """They count only if they differ, as an anonymiser writes the same name into all."""
    saml(tmp_path, "L", 3)
    items = [{"image": f"L/Case0{n}.nii.gz", "label": f"L/Case0{n}_segmentation.nii.gz"} for n in range(3)]
    datalist(tmp_path, training=items)
    monkeypatch.setattr(layouts, "patient_id", lambda path: headers[int(path.name[5])])
    assert len(set(whose(tmp_path, site="L").values())) == count


def test_published_lists_that_share_a_recognised_patient_are_kept_with_a_warning(tmp_path, caplog):
    for part, side in (("train", "L"), ("test", "R")):
        names = [f"D/{part}/ROIs/{kind}/{n}_{side}.png" for n in range(4) for kind in ("image", "mask")]
        touch(tmp_path, *names)
    with caplog.at_level(logging.WARNING):
        assert len(site_cases(tmp_path, "D", "test")) == 4
    assert "is in two lists" in caplog.text
    with pytest.raises(InputError, match="two lists"):
        find_cases(tmp_path, "D", "(.*)_(L|R)")


@pytest.mark.parametrize("count", [9, 10, 13, 20])
@pytest.mark.parametrize("seed", range(15))
def test_no_part_has_less_than_half_of_its_share(count, seed):
    """Nine patients always give more than one test case."""
    cases = [{"image": p, "label": p, "site": "A", "case": p, "patient": p} for p in (f"p{n}" for n in range(count))]
    parts = split_cases(cases, seed)
    assert sum(map(len, parts.values())) == count
    for part, share in zip(PARTS, (0.6, 0.15, 0.25)):
        assert len(parts[part]) >= share * count / 2
    assert len(parts["test"]) >= 2


def test_site_cases_selects_folds(tmp_path):
    saml(tmp_path, "A", 9)
    tested = [case["case"] for fold in range(3) for case in site_cases(tmp_path, "A", "test", fold=fold, folds=3)]
    assert sorted(tested) == sorted(case["case"] for case in find_cases(tmp_path, "A"))
    with pytest.raises(InputError, match="fold must be"):
        site_cases(tmp_path, "A", "test", fold=3, folds=3)


# ---- prepare --------------------------------------------------------------------------------------------------------


def volumes(root: Path, *names: str, values: tuple[int, ...] = (0, 1)) -> None:
    for name in names:
        mask = np.zeros((4, 4, 4), dtype=np.uint8)
        mask[0, 0, : len(values)] = values
        mask[3] = values[0]
        (root / "A").mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.random.RandomState(0).rand(4, 4, 4), np.eye(4)), root / "A" / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(mask, np.eye(4)), root / "A" / f"{name}_segmentation.nii.gz")


def test_prepare_lists_patients_and_values_of_masks(tmp_path, capsys):
    volumes(tmp_path, *(f"{n}_{side}" for n in range(4) for side in "LR"))
    volumes(tmp_path, "9", values=(0, 1, 255))
    prepare(str(tmp_path), split_seed=1)
    (line,) = capsys.readouterr().out.splitlines()
    shown = {}
    for part in line.split(": ", 1)[1].split(";")[0].split(", "):
        cases, name, patients_of_part = part.replace("(", "").split()[:3]
        shown[name] = (int(cases), int(patients_of_part))
    assert {name: sum(pair) for name, pair in shown.items()}.keys() == set(PARTS)
    assert [sum(column) for column in zip(*shown.values())] == [9, 5]
    assert line.endswith("masks of 0, 1 in 8; 0, 1, 255 in 1 (9)")


def test_prepare_names_a_mask_without_a_label(tmp_path):
    volumes(tmp_path, "a", "b", "c")
    volumes(tmp_path, "d", values=(0,))
    with pytest.raises(InputError, match=r"d_segmentation.*no foreground"):
        prepare(str(tmp_path))


def test_patients_of_a_datalist_take_precedence_over_a_pattern(tmp_path):
    saml(tmp_path, "L", 2)
    items = [{"image": f"L/Case0{n}.nii.gz", "label": f"L/Case0{n}_segmentation.nii.gz"} for n in range(2)]
    (tmp_path / "L.json").write_text(json.dumps({"training": [{**items[0], "patient": "p"}, items[1]]}))
    assert list(whose(tmp_path, r"(Case)\d+", "L").values()) == ["p", "Case"]
