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
"""The patient of each file: declared by a pattern, a table or a datalist, or recognised from file names.

Both eyes, two visits or two series of a patient look alike. If one is used for training, the other must not be used for
testing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shared_iopfl.data.scan_names import case_name
from shared_iopfl.utils.checks import AUTO, is_patient_setting
from shared_iopfl.utils.errors import InputError, warn_once
from shared_iopfl.utils.tables import read_rows

KEYS = ("patient", "patient_id", "subject_id", "subject", "PatientID")  # of a datalist's items, the first there counts
SIDES = ({"od", "os"}, {"l", "r"}, {"le", "re"}, {"left", "right"})
_SEPARATOR = r"[ _.-]"
_SIDE = "|".join(sorted(set.union(*SIDES)))
_VISIT = (
    r"(?:ses|session|visit|scan|series|run|time|timepoint|tp|followup|fu|v)[ _-]?\d+|baseline|follow[ _-]?up|pre|post"
)


def _named(words: str) -> re.Pattern[str]:
    """A name with one of these words in it, as a word of its own."""
    between = rf"(?:(?P<before>.*){_SEPARATOR})?(?P<word>{words})(?:{_SEPARATOR}(?P<after>.*))?"
    return re.compile(between, re.IGNORECASE | re.DOTALL)


# what tells two scans of a patient apart
WORDS = {"side": _named(_SIDE), "visit or series": _named(_VISIT)}


def datalist_patient(item: Mapping[str, Any]) -> str | None:
    """The patient that an item of a datalist names, under one of the usual keys; 0 is a name, "" and null are none."""
    named = (item[key] for key in KEYS if item.get(key) not in (None, ""))
    patient = next(named, None)
    return None if patient is None else str(patient)


def patients_of(names: Mapping[Path, str], patient: str = AUTO, site: str = "") -> tuple[dict[Path, str], bool]:
    """Whose scan each file of a site is.

    Args:
        names: of the site's images, each by a name that no other has.
        patient: a pattern that the whole name of a file (without its ending) fits, such as ``(.*)_(OD|OS)``: its first
            group is the patient, and a file that does not fit is a patient of its own; a table ``FILE.csv`` with the
            columns ``file`` and ``patient``; or "auto": names that differ in nothing but the side (``OD`` and ``OS``,
            ``L`` and ``R``, ``left`` and ``right``) or in the visit, session or series. Such words count where a site
            has two files that differ in one, and a line says so.
        site: its name, for messages.

    Returns:
        File -> patient, and whether it was declared (not recognised).

    Raises:
        InputError: where the pattern is none, or the table lacks a file. A pattern that fits no file of a site is a
            warning: it may be another site that names its files so.
    """
    if not names:
        return {}, True
    if patient == AUTO:
        return _recognised(names, site), False
    if not is_patient_setting(patient):
        raise InputError(
            f"patient {patient!r} is neither '{AUTO}', a table FILE.csv nor a pattern with a group: try (.*)_(OD|OS)."
        )
    if patient.lower().endswith(".csv"):
        return _by_table(names, Path(patient)), True
    found = {path: re.fullmatch(patient, case_name(path)) for path in names}
    if not any(found.values()):
        warn_once(
            f"the pattern {patient} of patient fits no file of site '{site}', such as "
            f"{case_name(next(iter(names)))}: each is taken for a patient"
        )
    return {path: (match[1] or names[path]) if match else names[path] for path, match in found.items()}, True


def _by_table(names: Mapping[Path, str], table: Path) -> dict[Path, str]:
    rows = read_rows(table) if table.is_file() else None
    if rows is None or (rows and not {"file", "patient"} <= rows[0].keys()):
        raise InputError(f"{table} is not a table of patients: it needs the columns file and patient.")
    listed = {row["file"]: row["patient"] for row in rows}
    patients = {}
    for path in names:
        # as it was typed: with its folder or without, with its ending or without
        known = next((name for name in (str(path), path.name, case_name(path)) if listed.get(name)), None)
        known = known or next((name for name in listed if listed[name] and path.as_posix().endswith(f"/{name}")), None)
        if known is None:
            raise InputError(f"{table} names no patient for {path}: add a row for each file.")
        patients[path] = listed[known]
    return patients


def _recognised(names: Mapping[Path, str], site: str) -> dict[Path, str]:
    patients, kinds = dict(names), []
    for kind, pattern in WORDS.items():
        found = {name: match for name in patients.values() if (match := pattern.fullmatch(name))}
        rest = {name: "_".join(filter(None, (match["before"], match["after"]))) for name, match in found.items()}
        words: dict[str, set[str]] = {}
        for name, match in found.items():
            words.setdefault(rest[name], set()).add(match["word"].lower())
        if _is_evidence(kind, words, set(patients.values()) - found.keys()):
            patients = {path: rest.get(name) or name for path, name in patients.items()}
            kinds.append(kind)
    if kinds:
        _say(site, len(names), len(set(patients.values())), " and ".join(kinds), _example(names, patients))
    return patients


def _is_evidence(kind: str, words: Mapping[str, set[str]], others: Iterable[str]) -> bool:
    """Whether two files of a site differ in such a word alone.

    A word and a number, as in scan_01 and scan_02, may be all that a name is: what remains must have a number too, and
    differ between files.
    """
    if kind == "side":
        return any(pair <= found for rest, found in words.items() if rest for pair in SIDES)
    numbered = {rest: found for rest, found in words.items() if re.search(r"\d", rest)}
    several = any(len(found) > 1 or rest in others for rest, found in numbered.items())
    return several and len({*words, *others}) > 1 and len(numbered) == len(words)


def _example(names: Mapping[Path, str], patients: Mapping[Path, str]) -> str:
    groups: dict[str, list[str]] = {}
    for path, patient in patients.items():
        groups.setdefault(patient, []).append(names[path])
    return ", ".join(sorted(next(group for group in groups.values() if len(group) > 1))[:2])


def _say(site: str, files: int, patients: int, kinds: str, example: str) -> None:
    warn_once(
        f"site '{site}': {files} files are taken for {patients} patients, as names differ in the {kinds} alone "
        f'({example}); --patient "(.*)" takes each file for a patient, another pattern says otherwise'
    )
