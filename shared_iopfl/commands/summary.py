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
"""The summary that is printed after an inference: scans, time, measures, and which masks to check first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shared_iopfl.evaluation.run.results import ServedScan, dice_text, read_failed, read_passed_over, read_served
from shared_iopfl.utils.names import counted, shortened
from shared_iopfl.utils.tables import aligned

SHOWN = 10  # scans in the table
WIDEST = 40  # characters of a case's name
NAMES = {"vertical_cup_to_disc_ratio": "vCDR", "volume_ml": "volume (ml)"}
DASH = "-"


def has_results(output_dir: str | Path) -> bool:
    """Whether a run has segmented any scan or recorded any failure."""
    return any((Path(output_dir) / name).is_file() for name in ("measures.csv", "failed.csv", "scans.csv"))


def summary(output_dir: str | Path, seconds: float) -> str:
    """Summarise an inference in about twenty lines at most.

    Args:
        output_dir: Folder of the run.
        seconds: Duration of the run.

    Returns:
        The text of the summary.
    """
    out = Path(output_dir)
    served, failed, passed = read_served(out), read_failed(out), read_passed_over(out)
    count = len(served) + len(failed)
    each = f", {seconds / count:.1f} s each" if count > 1 else ""
    lines = [f"{counted(count, 'scan')} in {seconds:.0f} s{each}; {counted(len(served), 'mask')} in {out}"]
    if served:
        lines += ["", *_table(served[:SHOWN])]
        lines += [f"... and {len(served) - SHOWN} more: see {out / 'review.csv'}"] * (len(served) > SHOWN)
        lines += ["", _first(served, (out / "review.csv").is_file())]
    lines += [f"failed: {shortened(row['case'], WIDEST)}: {row['reason']}" for row in failed[:SHOWN]]
    lines += [f"... and {len(failed) - SHOWN} more: see {out / 'failed.csv'}"] * (len(failed) > SHOWN)
    lines += [
        f"{len(passed)} file{'s were' if len(passed) != 1 else ' was'} skipped, no scans: see {out / 'not_taken.csv'}"
    ] * bool(passed)
    page = out / "report.html"
    lines += [f"pictures of all masks: {page}"] * page.is_file()
    return "\n".join([*lines, "For research use only, not for diagnosis."])


def _table(served: Sequence[ServedScan]) -> list[str]:
    """A table with one line per scan."""
    measures = list(dict.fromkeys(name for scan in served for name in scan.measures))
    estimated = any(scan.expected_dice is not None for scan in served)
    figures = ["quality", *["expected Dice"] * estimated, "seconds"]
    rows = [["case", *(NAMES.get(name, name) for name in measures), *figures, "check because"]]
    for scan in served:
        digits = 2 if max(scan.measures.values(), default=0) <= 1 else 1
        cells = [_figure(scan.measures.get(name), digits) for name in measures] + [_figure(scan.quality, 2)]
        cells += [DASH if scan.expected_dice is None else dice_text(scan.expected_dice)] * estimated
        rows.append([shortened(scan.case, WIDEST), *cells, _figure(scan.seconds, 1), scan.reasons or DASH])
    return aligned(rows, left=(0, len(rows[0]) - 1))


def _figure(value: float | None, digits: int) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _first(served: Sequence[ServedScan], reviewed: bool) -> str:
    """One line that says what to check first."""
    if not reviewed:
        return "no review list: plain inference does not estimate which masks to check first"
    noticed = [scan for scan in served if scan.reasons]
    if noticed:
        named = ", ".join(shortened(scan.case, WIDEST) for scan in noticed[:3]) + ", ..." * (len(noticed) > 3)
        return f"check first: {named} ({len(noticed)} of {len(served)} masks were flagged)"
    if served[0].quality is not None and len(served) > 1:
        return f"check first: {shortened(served[0].case, WIDEST)}, whose views agree least"
    estimated = any(scan.expected_dice is not None for scan in served)
    meaning = "; quality is the agreement between views of a scan, not an estimate of Dice"
    return "no mask was flagged" + meaning * (served[0].quality is not None and not estimated)
