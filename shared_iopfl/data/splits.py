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

A case is ``{"image", "label", "site", "case", "patient"}``, all strings. Where its files lie is told by `layouts`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """The names of the sites in a folder, sorted.

    Raises:
        InputError: when there is no such folder, it holds no site, or one whose name a site cannot have.
    """
    sites = check_sites(known_sites(Path(dataset_dir)))
    if not sites:
        raise InputError(
            f"no sites in {dataset_dir}: expected a folder of scans and masks, or a SITE.json, for each site"
        )
    return sites


def find_cases(dataset_dir: str | Path, site: str, patient: str = AUTO) -> list[Case]:
    """All labelled cases of a site, sorted by case name.

    Args:
        dataset_dir: folder of the sites.
        site: name of the site.
        patient: how patients are found where a datalist does not name them; see `patients.patients_of`.

    Raises:
        InputError: for an unknown site, one without cases, an image without its mask or a mask without its image.
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
    """The cases of one part of a site: what a bundle's config asks for.

    A published split (the lists of a datalist, the train and test folders of the fundus set) is kept; a part it lacks
    is taken from its training cases, by patient, as `split_cases` does.

    Args:
        dataset_dir: folder of the sites.
        site: name of the site.
        split: ``"train"``, ``"validation"``, ``"test"``, or ``"all"``, which also serves an outside site.
        seed: another seed, another split.
        fractions: how much of the patients to train, validate and test on; they sum to 1.
        patient: as for `find_cases`.
        fold, folds: with more folds than one, the parts are those of one fold of a cross-validation; see `fold_cases`.

    Raises:
        InputError: as `find_cases`, and when there are too few patients to split or the part holds no case.
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
        raise InputError(f"no {split} cases in {dataset_dir}/{site}: its list is empty or its fraction is 0")
    return _sorted(official[split])


def cases_of_process(cases: Sequence[Case], rank: int, processes: int) -> list[Case]:
    """The cases that one of several processes trains on; all have as many, so that some cases may be in two.

    Raises:
        InputError: with fewer cases than processes.
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
    """Whether `site_cases` gives a site a test part: by folds, a fraction above 0, or a published list.

    Args:
        dataset_dir: folder of the sites.
        site: name of the site.
        fractions, patient, folds: as for `site_cases`.
    """
    return folds > 1 or _checked(fractions)[2] > 0 or bool(published_parts(Path(dataset_dir), site, patient)["test"])


def split_cases(
    cases: Sequence[Case], seed: int = 0, shares: Mapping[str, float] = SHARES, where: str = "a list"
) -> dict[str, list[Case]]:
    """Split cases by patient into parts, such as ``"train"``, ``"validation"`` and ``"test"``.

    A patient's part depends on a hash of seed and patient alone, so a patient stays where it is when cases are added,
    unlike with MONAI's `partition_dataset`. With few patients the parts can be uneven. A part that would have less than
    half of its share, or no patient, takes the patients nearest to its interval from the part that exceeds its share
    most. Only this can move a patient to another part when cases are added.

    Args:
        cases: cases of one site, as `find_cases` returns them.
        seed: another seed, another split.
        shares: part -> how much of the patients it has, relative to the others; a 0 leaves a part empty.
        where: the cases come from, for the message.

    Raises:
        InputError: when there are fewer patients than parts.
    """
    position = {case["patient"]: _position(seed, case["patient"]) for case in cases}
    wanted = [part for part, share in shares.items() if share > 0]
    if len(position) < len(wanted):
        verbs = {"train": "train", "validation": "validate", "test": "test"}
        *first, last = (verbs[part] for part in wanted)
        each = f" (one each to {', '.join(first)} and {last})" if first else ""
        raise InputError(f"needs at least {len(wanted)} cases{each}, found {len(position)} in {where}")

    intervals, low = {}, 0.0
    for part in wanted:
        high = low + shares[part] / sum(shares.values())
        intervals[part] = (low, high if part != wanted[-1] else 1.0)
        low = high
    members = {
        part: {patient for patient, at in position.items() if low <= at < high}
        for part, (low, high) in intervals.items()
    }
    expected = {part: (high - low) * len(position) for part, (low, high) in intervals.items()}
    for part, (low, high) in intervals.items():
        while len(members[part]) < max(1, math.ceil(expected[part] / 2)):
            # no patient is worse than less than half: an empty part may take one from any part that keeps one
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
    """The cases of one part of a site in one fold of a cross-validation by patient.

    The patients are dealt to the folds in the order of a hash, so that every fold tests as many as the others (or one
    more or less) and each patient is tested once. Of the rest, the first are for validation. A published split is
    disregarded: every case is tested.

    Args:
        dataset_dir: folder of the sites.
        site: name of the site.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        fold: which, from 0.
        folds: how many, at least 2.
        seed: another seed, another deal.
        validation: share of the rest, at least one patient.
        patient: as for `find_cases`.

    Raises:
        InputError: for an unknown split or fold, and when there are too few patients.
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
    """The cases of several sites in one list, for pooled training, which federated training is compared with.

    Args:
        sites: names of the sites.
        cases_of: gives the cases of one site.
    """
    return [case for site in sites for case in cases_of(site)]


def fingerprint(cases: Sequence[Case]) -> str:
    """SHA-256 over the sorted names and sizes of the cases' files: which data a run saw, without reading it.

    Raises:
        InputError: when a file is gone.
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
    """A patient's place in [0, 1); 48 bits, so that the quotient is exact."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{patient}".encode()).digest()[:6], "big") / 2**48


def _checked(fractions: Sequence[float]) -> Sequence[float]:
    check_values({"fractions": fractions})
    return fractions


def _sorted(cases: Iterable[Case]) -> list[Case]:
    return sorted(cases, key=lambda case: case["case"])
