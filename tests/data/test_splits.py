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
"""Splits: no patient is in two parts, and patients keep their part when cases are added."""

from __future__ import annotations

from pathlib import Path

import pytest
from site_folders import dofe, names, saml

from shared_iopfl.data.splits import (
    cases_of_process,
    find_cases,
    fingerprint,
    fold_cases,
    has_test_cases,
    site_cases,
    split_cases,
)
from shared_iopfl.utils.errors import InputError


def cases_of(*patients: str) -> list[dict[str, str]]:
    return [{"image": p, "label": p, "site": "A", "case": p, "patient": p} for p in patients]


@pytest.mark.parametrize("count, processes", [(1, 1), (4, 2), (5, 2), (5, 4), (5, 5)])
def test_processes_have_the_same_number_of_cases_and_cover_all_cases(count, processes):
    """Otherwise the other processes would wait for the gradient of a process with fewer steps."""
    cases = cases_of(*(f"p{n}" for n in range(count)))
    parts = [cases_of_process(cases, rank, processes) for rank in range(processes)]
    assert {case["case"] for part in parts for case in part} == {case["case"] for case in cases}
    assert len({len(part) for part in parts}) == 1 and sum(map(len, parts)) < count + processes


def test_more_processes_than_cases_are_refused():
    with pytest.raises(InputError, match="site A has 2 training cases for 3 processes: start at most 2"):
        cases_of_process(cases_of("p0", "p1"), 2, 3)


def test_split_follows_the_fractions():
    parts = split_cases(cases_of(*(f"p{n}" for n in range(2000))))
    for part, share in (("train", 0.6), ("validation", 0.15), ("test", 0.25)):
        assert abs(len(parts[part]) / 2000 - share) < 0.03
    assert sum(map(len, parts.values())) == 2000


def test_adding_cases_moves_no_patient_to_another_part():
    """Except with few cases, a patient keeps its part when others are added, in any order."""
    few, many = (
        split_cases(cases_of(*(f"p{n}" for n in numbers)), seed=1) for numbers in (range(50), range(99, -1, -1))
    )
    for part, cases in few.items():
        assert set(names(cases)) <= set(names(many[part]))


@pytest.mark.parametrize("seed", range(20))
def test_three_patients_give_one_each(seed):
    assert [len(part) for part in split_cases(cases_of("a", "b", "c"), seed).values()] == [1, 1, 1]


def test_the_split_depends_on_the_seed_but_not_on_the_order():
    cases = cases_of(*(f"p{n}" for n in range(20)))
    assert split_cases(cases, 0) == split_cases(cases[::-1], 0)
    assert split_cases(cases, 0) != split_cases(cases, 1)


def test_fraction_of_zero_leaves_a_part_empty():
    parts = split_cases(cases_of("a", "b"), shares={"train": 0.5, "validation": 0.5, "test": 0})
    assert [len(part) for part in parts.values()] == [1, 1, 0]


def test_too_few_cases(tmp_path):
    saml(tmp_path, "A", 2)
    with pytest.raises(
        InputError, match=r"needs at least 3 patients \(one each to train, validate and test\), but .* has 2"
    ):
        site_cases(tmp_path, "A", "train")
    assert len(site_cases(tmp_path, "A", "all")) == 2
    with pytest.raises(InputError, match="has 1"):  # two scans of one patient
        split_cases([{**case, "patient": "p"} for case in cases_of("a", "b")])


@pytest.mark.parametrize("fractions", [(0.6, 0.4), (0.6, 0.6, 0.6), (-0.2, 0.6, 0.6), (0, 0.5, 0.5)])
def test_bad_fractions(fractions):
    with pytest.raises(InputError, match="fractions"):
        has_test_cases("any", "A", fractions)


def test_unknown_or_empty_part(tmp_path):
    dofe(tmp_path, train=0, test=3)
    with pytest.raises(InputError, match="unknown split"):
        site_cases(tmp_path, "D", "training")
    with pytest.raises(InputError, match="no train cases"):
        site_cases(tmp_path, "D", "train")
    assert len(site_cases(tmp_path, "D", "test")) == 3


def test_a_site_has_test_cases_by_fraction_published_list_or_folds(tmp_path):
    saml(tmp_path, "A", 4)
    dofe(tmp_path, train=3, test=1)
    without = {"fractions": (0.7, 0.3, 0)}
    assert has_test_cases(tmp_path, "A") and has_test_cases(tmp_path, "A", **without, folds=2)
    assert has_test_cases(tmp_path, "D", **without)
    assert not has_test_cases(tmp_path, "A", **without)
    with pytest.raises(InputError, match="no test cases"):
        site_cases(tmp_path, "A", "test", **without)


def test_fingerprint_depends_on_names_and_sizes(tmp_path):
    """It is the same for the same files in any order and place, and differs if a file is added, renamed or grows."""
    for copy in ("x", "y"):
        saml(tmp_path / copy, "A", 3)
    cases = find_cases(tmp_path / "x", "A")
    first = fingerprint(cases)
    assert fingerprint(cases[::-1]) == first == fingerprint(find_cases(tmp_path / "y", "A"))
    assert fingerprint(cases[:2]) != first
    Path(cases[0]["label"]).write_bytes(b"xx")
    assert fingerprint(cases) != first
    Path(cases[0]["label"]).unlink()
    with pytest.raises(InputError, match="Case00_segmentation"):
        fingerprint(cases)


@pytest.mark.parametrize("folds", [2, 3])
def test_folds_test_each_patient_once_and_share_no_patient(tmp_path: Path, folds: int) -> None:
    """Each patient is in one test part, and no fold trains on patients that it tests or validates on."""
    saml(tmp_path, "A", 7)
    everybody = {case["case"] for case in find_cases(tmp_path, "A")}
    tested: list[str] = []
    for fold in range(folds):
        parts = {
            split: {case["case"] for case in fold_cases(tmp_path, "A", split, fold, folds)}
            for split in ("train", "validation", "test")
        }
        assert all(parts.values())
        assert sum(map(len, parts.values())) == len(everybody) == len(set.union(*parts.values()))
        tested += parts["test"]
    assert sorted(tested) == sorted(everybody)


@pytest.mark.parametrize(
    ("fold", "folds", "said"), [(2, 2, "fold must be"), (0, 1, "fold must be"), (0, 9, "patients")]
)
def test_impossible_folds_are_refused(tmp_path: Path, fold: int, folds: int, said: str) -> None:
    """A fold that does not exist, and more folds than patients, are reported in one line."""
    saml(tmp_path, "A", 4)
    with pytest.raises(InputError, match=said):
        fold_cases(tmp_path, "A", "train", fold, folds)
