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
"""Making a calibration: the inside sites' validation cases are segmented as those of an outside site."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from monai.bundle import ConfigParser

from shared_iopfl.data.layouts import PARTS
from shared_iopfl.data.splits import list_sites, site_cases
from shared_iopfl.evaluation.calibration.estimate import LEVEL, Calibration, fit
from shared_iopfl.evaluation.review import EMPTY
from shared_iopfl.evaluation.scoring import Scoring, raise_failures
from shared_iopfl.evaluation.second_look import target_size
from shared_iopfl.models.files import GLOBAL, load_experts, load_weights, model_path
from shared_iopfl.models.manifest import CALIBRATION, published_files, read_manifest
from shared_iopfl.models.weights import digest
from shared_iopfl.routing.objectives import Output, target_masks
from shared_iopfl.routing.settings import RoutingSettings
from shared_iopfl.utils.config_values import Expression, as_values
from shared_iopfl.utils.names import check_file_name, check_sites
from shared_iopfl.utils.reading import read_json
from shared_iopfl.utils.tables import aligned, read_rows, write_json, write_rows

logger = logging.getLogger(__name__)

PAIRS = ("site", "scanner", "case", "quality", "dice")
AS_TAKEN = "as_taken"  # the scans without a virtual scanner


def trained_with(ckpt_dir: str, name: str, default: Any) -> Any:
    """A setting that the models of a folder were trained with, so that their training cases stay out of a calibration.

    Args:
        ckpt_dir: Folder of the models; its manifest has the setting if they were published, else the run's
            ``run.json`` beside the folder.
        name: Name of the setting, such as ``fractions``.
        default: Value if neither has it.
    """
    return _training_settings(ckpt_dir).get(name, default)


def _training_settings(ckpt_dir: str) -> Mapping[str, Any]:
    run = Path(ckpt_dir).absolute().parent / "run.json"
    trained = (read_manifest(ckpt_dir) or {}).get("training") or {}
    return trained or (read_json(run).get("settings", {}) if run.is_file() else {})


def inside_sites(ckpt_dir: str, dataset_dir: str) -> list[str]:
    """The sites of a data folder that have a personalised model, so that they were inside the federation.

    Args:
        ckpt_dir: Folder of the models.
        dataset_dir: Folder of the sites.
    """
    experts = load_experts(ckpt_dir, equal_too=True)
    return [site for site in list_sites(dataset_dir) if site in experts]


class Calibrator:
    """Make the calibration of a folder of models, from labelled cases of their inside sites.

    Args:
        bundle_root: Bundle of the models.
        ckpt_dir: Folder of the models. ``calibration.json`` is also written there, unless they were published.
        output_dir: Folder for ``calibration.json``, ``calibration.csv`` (one row per mask) and the masks.
        sites: Names of the inside sites.
        settings: Routing settings of the masks.
        virtual: Names of virtual scanners of ``virtual.json``.
        level: Share of the masks of left-out sites that the interval contains.
        overrides: Overrides of the evaluation config.
        output: Kind of the network's output.
    """

    def __init__(
        self,
        bundle_root: str,
        ckpt_dir: str,
        output_dir: str,
        sites: Sequence[str],
        settings: RoutingSettings,
        virtual: Sequence[str] = (),
        level: float = LEVEL,
        overrides: Mapping[str, Any] | None = None,
        output: Output = "softmax",
    ) -> None:
        self.output: Output = output
        self.bundle_root = bundle_root
        self.ckpt_dir = ckpt_dir
        self.output_dir = Path(output_dir)
        self.overrides = dict(overrides or {})
        self.sites = check_sites(sites)
        self.settings = settings
        self.virtual = [check_file_name(name, "virtual scanner") for name in virtual]
        self.level = level
        common = {**self.overrides, "ckpt_dir": ckpt_dir, "ckpt": model_path(ckpt_dir), "mode": "episodic"}
        self.scoring = Scoring(bundle_root, output_dir, common, ("evaluate", "virtual"))

    def run(self) -> Calibration:
        """Segment the cases, fit the line and write it.

        Raises:
            InputError: If no calibration can be made, or after it was made, if some cases could not be segmented.
        """
        if not _training_settings(self.ckpt_dir):
            logger.warning(
                "%s has no record of its training: if it was trained with another split than the present one, training "
                "cases are among those of the calibration; give --fractions and --split_seed as in the training",
                self.ckpt_dir,
            )
        size = self._target_size()
        rows = []
        for scanner in (AS_TAKEN, *self.virtual):
            how = {} if scanner == AS_TAKEN else {"acquisition": Expression(f"@virtual#{scanner}")}
            for site in self.sites:
                others = [other for other in self.sites if other != site]
                self.scoring.score(site, scanner, sites=others, role="virtual", target_size=size, **how)
                rows += self._rows(site, scanner)
        write_rows(self.output_dir / "calibration.csv", PAIRS, rows)
        pairs: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            pairs.setdefault(row["site"], []).append((float(row["quality"]), float(row["dice"])))
        cases = len({(row["site"], row["case"]) for row in rows})
        models = {GLOBAL: load_weights(model_path(self.ckpt_dir)), **load_experts(self.ckpt_dir)}
        digests = {name: digest(weights) for name, weights in models.items()}
        calibration = replace(fit(pairs, self.settings, self.level, cases), models=digests, target_size=size)
        write_json(self.output_dir / CALIBRATION, asdict(calibration))
        published = published_files(self.ckpt_dir) is not None
        if not published:
            write_json(Path(self.ckpt_dir) / CALIBRATION, asdict(calibration))
        self._print(calibration, published)
        raise_failures(self.scoring.failures)
        return calibration

    def _target_size(self) -> float:
        """The median size of the target in the masks of the training and validation cases, as the network sees them."""
        names = ("patient", "fractions", "fold", "folds")
        split = {
            "seed": self.overrides.get("split_seed", 0),
            **{n: self.overrides[n] for n in names if n in self.overrides},
        }
        sizes = []
        for site in self.sites:
            cases = [
                case for part in PARTS[:2] for case in site_cases(self.overrides["dataset_dir"], site, part, **split)
            ]
            parser = ConfigParser()
            parser.read_config(str(Path(self.bundle_root) / "configs" / "train.json"))
            given = {**self.overrides, "bundle_root": self.bundle_root, "site": site, "validate#dataset#data": cases}
            parser.update(as_values(given))
            for case in parser.get_parsed_content("validate#dataset"):
                masks = target_masks(case["label"].as_tensor().float()[None] - 0.5, self.output)
                sizes.append(target_size(masks[0].any(0)))
        return median(sizes)

    def _rows(self, site: str, scanner: str) -> list[dict[str, str]]:
        review = read_rows(self.output_dir / "masks" / site / scanner / "review.csv")
        # the views of an empty mask agree, which says nothing about its Dice; the review list names it anyway
        quality = {row["case"]: row["quality"] for row in review if row["quality"] and EMPTY not in row["reasons"]}
        return [
            {"site": site, "scanner": scanner, "case": row["case"], "quality": quality[row["case"]], "dice": dice}
            for row in read_rows(self.output_dir / "metrics.csv")
            if (row["site"], row["model"], row["metric"]) == (site, scanner, "dice")
            and row["case"] in quality
            and (dice := row["value"]) not in ("", "nan")
        ]

    def _print(self, calibration: Calibration, published: bool) -> None:
        table = [["quality", "expected Dice", f"{calibration.level:.0%} of the masks"]]
        for quality in (1.0, 0.95, 0.9, 0.8):
            expected, low, high = (f"{100 * value:.0f}" for value in calibration.estimate(quality))
            table.append([f"{quality:.2f}", expected, f"{low} to {high}"])
        print("\n".join(aligned(table)))
        print(
            f"mean absolute error at sites left out: {100 * calibration.error:.1f} Dice points "
            f"({calibration.masks} masks of {calibration.sites} sites)"
        )
        if published:
            print(
                f"{self.ckpt_dir} is a published set and stays as it is: segment with --calibration "
                f"{self.output_dir / CALIBRATION}"
            )
