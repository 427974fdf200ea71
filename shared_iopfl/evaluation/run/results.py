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
"""What an inference left in its folder: quality, measures and routes of each scan, the one to check first on top."""

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
SITE = "site"  # stands for all scans in the routes of mode "site"


@dataclass(frozen=True)
class ServedScan:
    """One scan that got a mask.

    Attributes:
        case: its name.
        quality: agreement of the masks of several views; None where it was not computed.
        expected_dice: the Dice to expect and the ends of its interval; None where the models have no calibration.
        reasons: why the mask should be checked; "" if nothing was noticed.
        measures: name -> value, such as ``volume_ml``.
        routes: expert -> mean weight over the layers; empty for plain inference.
        seconds: for routing and segmenting it; None where it was not recorded.
        statistics: the shares of its own batch-norm statistics, of which the predictions were averaged; empty where
            they were not recorded.
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
    """The scans of a run that got a mask, in the order of ``review.csv``, those that it does not list after it.

    Of a run without review, measures and routes ``scans.csv`` tells them, which is written at its end.

    Raises:
        InputError: when a table of the run is not as a run writes it.
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
    """An expected Dice and its interval in percent, such as "86 (72 to 94)"."""
    value, low, high = (f"{100 * number:.0f}" for number in expected)
    return f"{value} ({low} to {high})"


def read_failed(output_dir: str | os.PathLike) -> list[dict[str, str]]:
    """The scans that failed, with ``case`` and ``reason``."""
    return read_rows(Path(output_dir) / "failed.csv", "case reason")


def read_passed_over(output_dir: str | os.PathLike) -> list[dict[str, str]]:
    """The files that were not taken for scans, with ``file`` and ``reason``."""
    return read_rows(Path(output_dir) / "not_taken.csv", "file reason")


def _routes(path: Path) -> dict[str, dict[str, Any]]:
    content = read_json(path) if path.is_file() else {}
    cases = content.get("cases", {}) if isinstance(content, dict) else None
    if not isinstance(cases, dict) or not all(isinstance(facts, dict) for facts in cases.values()):
        raise InputError(f"{path} is not a table of routes of a run.")
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
