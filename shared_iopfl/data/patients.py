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

Images of both eyes, of two visits or of two series of a patient are similar. If one of them is used for training, the
others must not be used for testing.
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

KEYS = ("patient", "patient_id", "subject_id", "subject", "PatientID")  # of a datalist's items; the first one counts
SIDES = ({"od", "os"}, {"l", "r"}, {"le", "re"}, {"left", "right"})
_SEPARATOR = r"[ _.-]"
_SIDE = "|".join(sorted(set.union(*SIDES)))
_VISIT = (
    r"(?:ses|session|visit|scan|series|run|time|timepoint|tp|followup|fu|v)[ _-]?\d+|baseline|follow[ _-]?up|pre|post"
)


def _named(words: str) -> re.Pattern[str]:
    """Return the pattern of names that contain one of some words as a separate word."""
    between = rf"(?:(?P<before>.*){_SEPARATOR})?(?P<word>{words})(?:{_SEPARATOR}(?P<after>.*))?"
    return re.compile(between, re.IGNORECASE | re.DOTALL)


# words in which the file names of two scans of a patient differ
WORDS = {"side": _named(_SIDE), "visit or series": _named(_VISIT)}


def datalist_patient(item: Mapping[str, Any]) -> str | None:
    """Return the patient that an item of a datalist names under one of the usual keys; 0 is a name, "" and null are
    not.
    """
    named = (item[key] for key in KEYS if item.get(key) not in (None, ""))
    patient = next(named, None)
    return None if patient is None else str(patient)


def patients_of(names: Mapping[Path, str], patient: str = AUTO, site: str = "") -> tuple[dict[Path, str], bool]:
    """Find the patient of each file of a site.

    Args:
        names: File -> unique name, for the site's images.
        patient: How patients are recognised. A pattern with a group, such as ``(.*)_(OD|OS)``, is matched against the
            whole name of a file without its ending: its first group is the patient, and a file that does not match is a
            patient of its own. ``FILE.csv`` is a table with the columns ``file`` and ``patient``. With "auto", two
            files belong to the same patient if their names differ only in the side (``OD`` and ``OS``, ``L`` and ``R``,
            ``left`` and ``right``) or in the visit, session or series. Such words count only if a site has two files
            that differ in nothing else; a warning states how many patients were recognised.
        site: Name of the site, for messages.

    Returns:
        File -> patient, and whether the patients were declared (not recognised).

    Raises:
        InputError: If the pattern is invalid, or the table lacks a file. A pattern that matches no file of a site only
            gives a warning, as the files of another site may match it.
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
            f"{case_name(next(iter(names)))}: each file counts as a patient"
        )
    return {path: (match[1] or names[path]) if match else names[path] for path, match in found.items()}, True


def _by_table(names: Mapping[Path, str], table: Path) -> dict[Path, str]:
    rows = read_rows(table) if table.is_file() else None
    if rows is None or (rows and not {"file", "patient"} <= rows[0].keys()):
        raise InputError(f"{table} is not a table of patients: it needs the columns file and patient.")
    listed = {row["file"]: row["patient"] for row in rows}
    patients = {}
    for path in names:
        # users write the name of a file with or without its folder, and with or without its ending
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
        groups: dict[str, list[str]] = {}
        for path, patient in patients.items():
            groups.setdefault(patient, []).append(names[path])
        example = ", ".join(sorted(next(group for group in groups.values() if len(group) > 1))[:2])
        warn_once(
            f"site '{site}': {len(names)} files are taken for {len(groups)} patients, as names differ only in the "
            f'{" and ".join(kinds)} ({example}); --patient "(.*)" takes each file for a patient, another pattern '
            "divides them differently"
        )
    return patients


def _is_evidence(kind: str, words: Mapping[str, set[str]], others: Iterable[str]) -> bool:
    """Return whether two files of a site differ only in such a word.

    A word with a number, as in scan_01 and scan_02, may be the whole name: the remainder must contain a number too, and
    must differ between files.
    """
    if kind == "side":
        return any(pair <= found for rest, found in words.items() if rest for pair in SIDES)
    numbered = {rest: found for rest, found in words.items() if re.search(r"\d", rest)}
    several = any(len(found) > 1 or rest in others for rest, found in numbered.items())
    return several and len({*words, *others}) > 1 and len(numbered) == len(words)
