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
"""The runs of a comparison: score each method on each site once, gather all scores, and choose the best candidates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_iopfl.comparison.scores import COMPARED
from shared_iopfl.evaluation.failed_scans import Failure
from shared_iopfl.evaluation.review import collect_review
from shared_iopfl.evaluation.scores import finite_mean
from shared_iopfl.evaluation.scoring import Scoring
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import read_rows, write_json, write_rows

COLUMNS = ("seed", "fold", "site", "role", "method", "case", "metric", "value")


class Runs:
    """Score methods on sites for a :class:`~shared_iopfl.comparison.protocol.Comparison`, each of them once.

    Args:
        bundle_root, dataset_dir, output_dir, scoring: As in the comparison.

    Attributes:
        failures: Cases that could not be scored.
    """

    def __init__(self, bundle_root: str, dataset_dir: str, output_dir: Path, scoring: Mapping[str, Any]) -> None:
        self.bundle_root = bundle_root
        self.output_dir = output_dir
        self.options = {**scoring, "dataset_dir": dataset_dir}
        self.failures: list[Failure] = []

    def score(self, run: Path, site: str, method: str, path: str, **options: Any) -> None:
        """Score a model on a site, unless this has been done before.

        Args:
            run: Folder of the run.
            site: Name of the site.
            method: Name under which the model is scored.
            path: Path of the model.
            options: Overrides of the evaluation config.
        """
        if not self.scored(run, site, method):
            common = {**self.options, "ckpt": path}
            scoring = Scoring(self.bundle_root, str(run), common, ("evaluate", "baselines", "virtual"))
            scoring.score(site, method, **options)
            self.failures += scoring.failures

    def rows(self, run: Path, site: str, method: str) -> list[dict[str, str]]:
        """The scores of a method on a site."""
        return [row for row in read_rows(run / "metrics.csv") if (row["site"], row["model"]) == (site, method)]

    def scored(self, run: Path, site: str, method: str) -> bool:
        """Whether a method has been scored on a site."""
        return bool(self.rows(run, site, method))

    def choose_trainings(self, sites: Sequence[str], names: Sequence[str]) -> None:
        """Write ``federations.json``: for each site, the training with the highest mean at the other sites left out.

        Args:
            sites: Sites of the comparison.
            names: Methods outside, each the global model of a training.
        """
        dice: dict[tuple[str, str], list[float]] = {(name, site): [] for name in names for site in sites}
        for row in read_rows(self.output_dir / "comparison.csv"):
            if (row["role"], row["metric"]) == ("outside", "dice") and row["method"] in names:
                dice[row["method"], row["site"]].append(float(row["value"]))
        chosen = []
        for site in sites:
            best, means = best_of({n: [finite_mean(dice[n, o]) for o in sites if o != site] for n in names})
            chosen.append({"seed": "all", "fold": site, "choice": best, "candidates": means})
        write_json(self.output_dir / "federations.json", chosen)

    def collect(self) -> None:
        """Gather the runs' scores in ``comparison.csv``, and those of the review lists in ``review.csv``."""
        rows = []
        for path in sorted(self.output_dir.glob("seed*/*_*/metrics.csv")):
            role, _, fold = path.parts[-2].partition("_")
            if role not in COMPARED:
                continue
            scanner, _, fold = fold.rpartition("_") if role == "virtual" else ("", "", fold)
            for row in read_rows(path):
                row = {**row, "seed": path.parts[-3].removeprefix("seed"), "fold": fold, "method": row["model"]}
                if scanner:  # the virtual scanner takes the place of the site, with the cases of all sites
                    row |= {"site": scanner, "case": f"{row['site']} {row['case']}"}
                rows.append(row)
        write_rows(self.output_dir / "comparison.csv", COLUMNS, [{key: row[key] for key in COLUMNS} for row in rows])
        collect_review(self.output_dir)


def best_of(means: Mapping[str, Sequence[float]]) -> tuple[str, dict[str, float]]:
    """The candidate with the highest mean over sites, and the means of all candidates.

    Args:
        means: candidate -> mean Dice at each site, over the cases with a defined Dice (cases with an empty reference
            have none). A site without any defined Dice is ignored for all candidates.

    Raises:
        InputError: If no site has a defined Dice for all candidates.
    """
    sites = [of_site for of_site in zip(*means.values()) if all(map(math.isfinite, of_site))]
    if not sites:
        raise InputError(
            "nothing to choose by: at no site has every candidate a defined Dice; are all references empty?"
        )
    mean = {name: sum(values) / len(sites) for name, values in zip(means, zip(*sites))}
    return max(mean, key=lambda name: mean[name]), mean
