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
"""The cases of a site, and their split by patient into training, validation and test.

A case is ``{"image", "label", "site", "case", "patient"}``, all strings. The module `layouts` finds its files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from shared_iopfl.data.layouts import PARTS, known_sites, published_parts
from shared_iopfl.data.patients import AUTO
from shared_iopfl.data.scan_files import Case, entries
from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.names import check_sites

FRACTIONS = (0.6, 0.15, 0.25)
SHARES = dict(zip(PARTS, FRACTIONS))


def list_sites(dataset_dir: str | Path) -> list[str]:
    """Return the sorted names of the sites in a folder.

    Raises:
        InputError: If the folder does not exist, has no site, or has a site with a name that is not allowed.
    """
    sites = check_sites(known_sites(Path(dataset_dir)))
    if not sites:
        raise InputError(
            f"no sites in {dataset_dir}: expected a folder of scans and masks, or a SITE.json, for each site"
        )
    return sites


def find_cases(dataset_dir: str | Path, site: str, patient: str = AUTO) -> list[Case]:
    """Return all labelled cases of a site, sorted by case name.

    Args:
        dataset_dir: Folder of the sites.
        site: Name of the site.
        patient: How patients are recognised if a datalist does not name them; see `patients.patients_of`.

    Raises:
        InputError: If the site is unknown or has no cases, or if an image or a mask lacks its counterpart.
    """
    return _sorted(case for part in published_parts(Path(dataset_dir), site, patient).values() for case in part)


def site_cases(
    dataset_dir: str | Path,
    site: str,
    split: str,
    seed: int = 0,
    fractions: Sequence[float] = FRACTIONS,
    patient: str = AUTO,
    fold: int = 0,
    folds: int = 1,
) -> list[Case]:
    """Return the cases of one part of a site, as the bundles' configs use it.

    A published split (the lists of a datalist, the train and test folders of the fundus set) is kept; a part that it
    lacks is taken from its training cases by patient, as in `split_cases`.

    Args:
        dataset_dir: Folder of the sites.
        site: Name of the site.
        split: ``"train"``, ``"validation"``, ``"test"``, or ``"all"``, which is also used for outside sites.
        seed: Seed of the split.
        fractions: Fractions of the patients for training, validation and test; they sum to 1.
        patient: As in `find_cases`.
        fold, folds: With more than one fold, the parts are those of one fold of a cross-validation; see `fold_cases`.

    Raises:
        InputError: As in `find_cases`, and if there are too few patients or the part has no case.
    """
    if split not in (*PARTS, "all"):
        raise InputError(f"unknown split {split!r}: choose train, validation, test or all")
    if split == "all":
        return find_cases(dataset_dir, site, patient)
    if folds > 1:
        return fold_cases(dataset_dir, site, split, fold, folds, seed, patient=patient)
    official = published_parts(Path(dataset_dir), site, patient)
    shares = dict(zip(PARTS, _checked(fractions)))
    lacking = [part for part in PARTS if not official[part]]
    if official["train"] and (split == "train" or split in lacking):
        parts = {part: shares[part] for part in ("train", *lacking)}
        official.update(split_cases(official["train"], seed, parts, f"{dataset_dir}/{site}"))
    if not official[split]:
        raise InputError(
            f"no {split} cases in {dataset_dir}/{site}: its list is empty or its fraction is 0; add cases, or change "
            "fractions"
        )
    return _sorted(official[split])


def cases_of_process(cases: Sequence[Case], rank: int, processes: int) -> list[Case]:
    """Return the cases that one of several processes trains on.

    All processes have the same number of cases, so that some cases may be assigned to two of them.

    Raises:
        InputError: If there are fewer cases than processes.
    """
    if len(cases) < processes:
        raise InputError(
            f"site {cases[0]['site']} has {len(cases)} training cases for {processes} processes: start at most "
            f"{len(cases)} (--nproc_per_node)."
        )
    each = math.ceil(len(cases) / processes)
    return [cases[(rank + step * processes) % len(cases)] for step in range(each)]


def has_test_cases(
    dataset_dir: str | Path,
    site: str,
    fractions: Sequence[float] = FRACTIONS,
    patient: str = AUTO,
    folds: int = 1,
) -> bool:
    """Return whether `site_cases` gives a site a test part: by folds, a fraction above 0, or a published list.

    Args:
        dataset_dir: Folder of the sites.
        site: Name of the site.
        fractions, patient, folds: As in `site_cases`.
    """
    return folds > 1 or _checked(fractions)[2] > 0 or bool(published_parts(Path(dataset_dir), site, patient)["test"])


def split_cases(
    cases: Sequence[Case], seed: int = 0, shares: Mapping[str, float] = SHARES, where: str = "a list"
) -> dict[str, list[Case]]:
    """Split cases by patient into parts, such as ``"train"``, ``"validation"`` and ``"test"``.

    The part of a patient depends only on a hash of seed and patient, so that patients keep their part when cases are
    added, unlike with MONAI's `partition_dataset`. With few patients the parts can be uneven. A part with less than
    half of its share, or without any patient, takes the patients nearest to its interval from the part that exceeds its
    share most. Only this can move a patient to another part when cases are added.

    Args:
        cases: Cases of one site, as returned by `find_cases`.
        seed: Seed of the split.
        shares: Part -> its share of the patients, relative to the other parts; a part with share 0 is empty.
        where: Source of the cases, for the message.

    Returns:
        Part -> cases, sorted by case name.

    Raises:
        InputError: If there are fewer patients than parts.
    """
    position = {case["patient"]: _position(seed, case["patient"]) for case in cases}
    wanted = [part for part, share in shares.items() if share > 0]
    if len(position) < len(wanted):
        verbs = {"train": "train", "validation": "validate", "test": "test"}
        *first, last = (verbs[part] for part in wanted)
        each = f" (one each to {', '.join(first)} and {last})" if first else ""
        raise InputError(
            f"a split needs at least {len(wanted)} patients{each}, but {where} has {len(position)}: add cases, or "
            "change fractions"
        )

    ends = list(accumulate(shares[part] / sum(shares.values()) for part in wanted))
    intervals = dict(zip(wanted, pairwise([0.0, *ends[:-1], 1.0])))
    members = {
        part: {patient for patient, at in position.items() if low <= at < high}
        for part, (low, high) in intervals.items()
    }
    expected = {part: (high - low) * len(position) for part, (low, high) in intervals.items()}
    for part, (low, high) in intervals.items():
        while len(members[part]) < max(1, math.ceil(expected[part] / 2)):
            # an empty part is worse than one below half of its share: it may take from any part that keeps a patient
            spare = {o: len(members[o]) - max(1, math.ceil(expected[o] / 2) * bool(members[part])) for o in members}
            givers = [other for other, count in spare.items() if count > 0]
            if not givers:
                break
            largest = members[max(givers, key=lambda other: len(members[other]) - expected[other])]
            nearest = min(largest, key=lambda name: (max(low - position[name], position[name] - high), name))
            largest.remove(nearest)
            members[part].add(nearest)
    return {part: _sorted(case for case in cases if case["patient"] in members.get(part, ())) for part in shares}


def fold_cases(
    dataset_dir: str | Path,
    site: str,
    split: str,
    fold: int,
    folds: int,
    seed: int = 0,
    validation: float = 0.2,
    patient: str = AUTO,
) -> list[Case]:
    """Return the cases of one part of a site in one fold of a cross-validation by patient.

    The patients are assigned to the folds in turn, in the order of a hash, so that the numbers of test patients of two
    folds differ by at most one, and each patient is tested once. The first of the remaining patients are used for
    validation. A published split is not used: every case is tested.

    Args:
        dataset_dir: Folder of the sites.
        site: Name of the site.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        fold: Number of the fold, from 0.
        folds: Number of folds, at least 2.
        seed: Seed of the order of patients.
        validation: Share of the remaining patients for validation; at least one patient is used.
        patient: As in `find_cases`.

    Raises:
        InputError: If the split or the fold is unknown, or if there are too few patients.
    """
    if split not in PARTS:
        raise InputError(f"unknown split {split!r}: choose train, validation or test")
    if folds < 2 or not 0 <= fold < folds:
        raise InputError(f"fold must be from 0 to folds - 1, and folds at least 2, but they are {fold} and {folds}")
    cases = find_cases(dataset_dir, site, patient)
    patients = sorted({case["patient"] for case in cases}, key=lambda name: (_position(seed, name), name))
    rest = [name for index, name in enumerate(patients) if index % folds != fold]
    if len(patients) < folds or len(rest) < 2:
        raise InputError(
            f"{folds} folds need at least {max(folds, 3)} patients, found {len(patients)} in {dataset_dir}/{site}"
        )
    count = min(len(rest) - 1, max(1, round(validation * len(rest))))
    parts = {"validation": set(rest[:count]), "train": set(rest[count:]), "test": set(patients) - set(rest)}
    return _sorted(case for case in cases if case["patient"] in parts[split])


def pooled(sites: Iterable[str], cases_of: Callable[[str], Sequence[Case]]) -> list[Case]:
    """Return the cases of several sites in one list, for the pooled training that federated training is compared with.

    Args:
        sites: Names of the sites.
        cases_of: Function that returns the cases of a site.
    """
    return [case for site in sites for case in cases_of(site)]


def fingerprint(cases: Sequence[Case]) -> str:
    """Return the SHA-256 over the sorted names and sizes of the cases' files; it identifies data without reading them.

    Raises:
        InputError: If a file no longer exists.
    """
    lines = []
    for case in cases:
        for key in ("image", "label"):
            if key in case:
                path = Path(case[key])
                try:
                    sizes = [(file.name, file.stat().st_size) for file in (entries(path) if path.is_dir() else [path])]
                except OSError as error:
                    raise InputError(f"{path} cannot be read: {error.strerror}") from error
                lines.append(json.dumps([case.get("site"), case["case"], key, sizes]))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _position(seed: int, patient: str) -> float:
    """Return a patient's position in [0, 1); with 48 bits the quotient is exact."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{patient}".encode()).digest()[:6], "big") / 2**48


def _checked(fractions: Sequence[float]) -> Sequence[float]:
    check_values({"fractions": fractions})
    return fractions


def _sorted(cases: Iterable[Case]) -> list[Case]:
    return sorted(cases, key=lambda case: case["case"])
