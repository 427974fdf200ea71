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
"""The results of an inference in its folder: quality, measures and routes of each scan, in the order of the review."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.reading import read_json
from shared_iopfl.utils.tables import read_rows

EXPECTED = ("expected_dice", "expected_low", "expected_high")  # columns of review.csv
SITE = "site"  # name of all scans together in the routes of mode "site"


@dataclass(frozen=True)
class ServedScan:
    """A scan that got a mask.

    Attributes:
        case: Name of the case.
        quality: Agreement of the masks of several views; None if it was not computed.
        expected_dice: Expected Dice and the ends of its interval; None if the models have no calibration.
        reasons: Reasons to check the mask; "" if there are none.
        measures: Name -> value, such as ``volume_ml``.
        routes: Expert -> mean weight over the layers; empty for plain inference.
        seconds: Time for routing and segmenting; None if it was not recorded.
        statistics: Shares of its own batch-norm statistics with which the averaged predictions were made; empty if they
            were not recorded.
    """

    case: str
    quality: float | None = None
    expected_dice: tuple[float, float, float] | None = None
    reasons: str = ""
    measures: Mapping[str, float] = field(default_factory=dict)
    routes: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    statistics: tuple[float, ...] = ()


def read_served(output_dir: str | os.PathLike) -> list[ServedScan]:
    """Return the scans of a run that got a mask: first those of ``review.csv`` in its order, then the others.

    In a run without review, measures and routes, they are read from ``scans.csv``, which is written at the end.

    Args:
        output_dir: Folder of the run.

    Raises:
        InputError: If a table was not written by a run.
    """
    folder = Path(output_dir)
    review = {row["case"]: row for row in read_rows(folder / "review.csv", "case quality reasons")}
    measures = {row.pop("case"): row for row in read_rows(folder / "measures.csv", "case")}
    routes = _routes(folder / "routes.json")
    whole_site = routes.pop(SITE, {}) if SITE not in measures and SITE not in review else {}
    failed = {row["case"] for row in read_failed(folder)}
    scans = [row["case"] for row in read_rows(folder / "scans.csv", "case") if row["case"] not in failed]
    served = []
    for case in dict.fromkeys([*review, *measures, *routes, *scans]):
        facts = routes.get(case, {})
        served.append(
            ServedScan(
                case,
                _number(review.get(case, {}).get("quality")),
                _expected(review.get(case, {})),
                review.get(case, {}).get("reasons", ""),
                {name: value for name, text in measures.get(case, {}).items() if (value := _number(text)) is not None},
                _weights(facts or whole_site),
                _number(facts.get("seconds")),
                _shares(facts or whole_site),
            )
        )
    return served


def dice_text(expected: tuple[float, float, float]) -> str:
    """Return an expected Dice and its interval in percent, such as "86 (72 to 94)"."""
    value, low, high = (f"{100 * number:.0f}" for number in expected)
    return f"{value} ({low} to {high})"


def read_failed(output_dir: str | os.PathLike) -> list[dict[str, str]]:
    """Return the scans that failed, each with ``case`` and ``reason``."""
    return read_rows(Path(output_dir) / "failed.csv", "case reason")


def read_passed_over(output_dir: str | os.PathLike) -> list[dict[str, str]]:
    """Return the files that were not taken for scans, each with ``file`` and ``reason``."""
    return read_rows(Path(output_dir) / "not_taken.csv", "file reason")


def _routes(path: Path) -> dict[str, dict[str, Any]]:
    content = read_json(path) if path.is_file() else {}
    cases = content.get("cases", {}) if isinstance(content, dict) else None
    if not isinstance(cases, dict) or not all(isinstance(facts, dict) for facts in cases.values()):
        raise InputError(f"{path} is not a table of routes of a run: remove it, or give another folder.")
    return cases


def _weights(facts: Mapping[str, Any]) -> dict[str, float]:
    experts = facts.get("experts", {})
    return {str(name): float(weight) for name, weight in experts.items()} if isinstance(experts, dict) else {}


def _shares(facts: Mapping[str, Any]) -> tuple[float, ...]:
    shares = facts.get("statistics", [])
    return tuple(float(share) for share in shares if _number(share) is not None) if isinstance(shares, list) else ()


def _expected(row: Mapping[str, str]) -> tuple[float, float, float] | None:
    values = [_number(row.get(name)) for name in EXPECTED]
    return (values[0], values[1], values[2]) if None not in values else None  # type: ignore[return-value]


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
