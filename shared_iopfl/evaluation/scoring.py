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
"""The final scoring of a run: ``evaluate.json`` on the test cases of every site, for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

from shared_iopfl.data.splits import has_test_cases
from shared_iopfl.evaluation.failed_scans import Failure
from shared_iopfl.utils.config_values import as_values
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.names import check_site, check_sites


def raise_failures(failures: Sequence[Failure]) -> None:
    """Raise `InputError` if cases failed, with the first reason; a case that failed for several models counts once."""
    reasons = {failure.file: failure.reason for failure in failures}
    if reasons:
        first = next(iter(reasons.values()))
        raise InputError(
            f"{len(reasons)} cases could not be scored, all others were: see failed.csv beside the masks. The first: "
            f"{first}"
        )


class Scoring:
    """Score the models of a run on test cases, and only on these.

    Args:
        bundle_root: Bundle whose ``configs/evaluate.json`` is run.
        output_dir: Folder of the run; ``metrics.csv``, ``cases.csv`` and ``masks/`` are added there.
        overrides: Overrides of the evaluation config.
        configs: Names of the bundle's configs; later ones override earlier ones.
    """

    def __init__(
        self,
        bundle_root: str,
        output_dir: str,
        overrides: Mapping[str, Any] | None = None,
        configs: Sequence[str] = ("evaluate",),
    ) -> None:
        self.configs = [str(Path(bundle_root) / "configs" / f"{name}.json") for name in configs]
        self.bundle_root = bundle_root
        self.output_dir = output_dir
        self.overrides = dict(overrides or {})
        self.failures: list[Failure] = []

    def score(self, site: str, model: str, **overrides: Any) -> None:
        """Score one model at one site.

        MONAI evaluates no override as code, unless it is an `Expression`.

        Args:
            site: Name of the site.
            model: Name of the model: "global", "personalised", "soup", "routed" or another label.
            overrides: Overrides of the evaluation config, which take precedence over the common ones.
        """
        given = {
            "bundle_root": self.bundle_root,
            "output_dir": self.output_dir,
            "site": check_site(site),
            "model": model,
            "personalised_metrics": False,
            "strict": False,
            "own_folder": False,
            **self.overrides,
            **overrides,
        }
        workflow = ConfigWorkflow(config_file=self.configs, meta_file=None, logging_file=False, **as_values(given))
        workflow.initialize()
        workflow.run()
        self.failures += workflow.parser.get_parsed_content("evaluator").failures
        workflow.finalize()

    def finish(self) -> None:
        """Raise `InputError` if cases could not be scored, so that the exit status of the run shows it."""
        raise_failures(self.failures)

    @staticmethod
    def check(sites: Sequence[str], outside_sites: Sequence[str]) -> None:
        """Raise `InputError` if a site is both inside and outside: its outside score would not be one of new data."""
        check_sites([*sites, *outside_sites])
        both = sorted(set(sites) & set(outside_sites))
        if both:
            raise InputError(f"site '{both[0]}' is both in sites and in outside_sites: leave it out of one.")

    def tested(self, sites: Sequence[str]) -> list[str]:
        """Return the inside sites that have test cases; one line names those that have none."""
        names = {"dataset_dir", "fractions", "patient", "folds"} & set(self.overrides)
        found = [site for site in sites if has_test_cases(site=site, **{name: self.overrides[name] for name in names})]
        if untested := [site for site in sites if site not in found]:
            print(f"no test cases to score at {', '.join(untested)}: the test fraction is 0")
        return found

    def inside(self, sites: Sequence[str]) -> None:
        """Score the global model and each site's personalised model on the site's test cases; see `tested`."""
        for site in self.tested(sites):
            for model in ("global", "personalised"):
                self.score(site, model, role="inside", split="test", mode="off")

    def outside(self, sites: Sequence[str]) -> None:
        """Score the global model, the uniform soup and the routed network on all cases of each outside site."""
        for site in sites:
            outside = {"role": "outside", "split": "all"}
            self.score(site, "global", **outside, mode="off")
            self.score(site, "soup", **{**outside, "preset": "soup", "routing": {}, "mode": "episodic"})
            self.score(site, "routed", **outside)
