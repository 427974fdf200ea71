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
"""The protocol that tells what pays: every method on every site, by folds inside and left-out sites outside.

Inside, all sites are federated, each site's test cases are scored once (by the published split, or cross-validated by
patient), and what a method has to choose it chooses on the sites' validation cases. Outside, each site is left out in
turn: the others are federated, and all its cases are scored without a label of it having been used; settings can be
chosen by an inner leave-one-site-out among the sites inside. Nothing is run twice: an interrupted comparison goes on.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from torch import Tensor, nn

from shared_iopfl.baselines import fine_tune, labelled_routes
from shared_iopfl.config_values import Expression, as_values
from shared_iopfl.errors import InputError
from shared_iopfl.federation import Federation
from shared_iopfl.models import GLOBAL, load_experts, load_weights, model_path, save_atomically
from shared_iopfl.names import check_file_name, check_sites
from shared_iopfl.review import collect_review
from shared_iopfl.scoring import Scoring
from shared_iopfl.stacks import to_stack
from shared_iopfl.tables import read_rows, write_json, write_rows

__all__ = ["Comparison"]

logger = logging.getLogger(__name__)
COLUMNS = ("seed", "fold", "site", "role", "method", "case", "metric", "value")
FEDAVG = "FedAvg"
PERSONAL = ("average", "average, interpolated", "personalised")  # what a site makes of it for itself


class Comparison:
    """Trains and scores; writes ``comparison.csv``, ``choices.json`` and a folder a run.

    A run's folder ``seed<k>/inside_<fold>`` or ``seed<k>/outside_<site>`` holds the federation of each training method,
    ``metrics.csv``, ``cases.csv`` and ``masks/``.

    Args:
        bundle_root: the bundle whose ``train.json`` and ``evaluate.json`` (with ``baselines.json``) are run.
        dataset_dir: folder of the sites.
        output_dir: where the files go.
        sites: all sites.
        rounds: of every federation.
        seeds: of networks, augmentation and splits; the whole protocol is run once with each.
        folds: inside, 1: the published split; more: cross-validation by patient.
        training: overrides of the training config, for all methods alike.
        scoring: overrides of the evaluation config.
        inside: method -> overrides of the training config. A key "model" says which of the run's models it is:
            "global", "norms" (with the site's own norm layers), "ditto" (the site's own of Ditto) or "local" (each
            site alone).
        own_rounds, shares: what a site makes of its personalised model once the last round is over, as in
            :class:`Federation`: the method "personalised". The moving average as it is, and chosen among the shares
            without rounds of its own, are the methods "average" and "average, interpolated".
        fine_tuning: rounds of fine-tuning at the tail's rate for the method "fine-tuned"; 0 leaves it out.
        outside: method -> overrides of the evaluation config; a key "baseline" names an inferer of ``baselines.json``.
        candidates: name -> routing settings, among which the method "chosen" picks one by an inner leave-one-site-out;
            none: no such method.
        labelled: add the bound of routes fitted with the outside site's labels.
    """

    def __init__(
        self,
        bundle_root: str,
        dataset_dir: str,
        output_dir: str,
        sites: Sequence[str],
        rounds: int,
        seeds: Sequence[int] = (0,),
        folds: int = 1,
        training: Mapping[str, Any] | None = None,
        scoring: Mapping[str, Any] | None = None,
        inside: Mapping[str, Mapping[str, Any]] | None = None,
        own_rounds: int = 0,
        shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        fine_tuning: int = 0,
        outside: Mapping[str, Mapping[str, Any]] | None = None,
        candidates: Mapping[str, Mapping[str, Any]] | None = None,
        labelled: bool = True,
    ) -> None:
        if len(sites) < 2:
            raise InputError(
                f"a comparison leaves each site out in turn: it needs two sites or more, got {list(sites)}."
            )
        self.bundle_root = bundle_root
        self.dataset_dir = dataset_dir
        self.output_dir = Path(output_dir)
        self.sites = check_sites(sites)
        self.rounds = rounds
        self.seeds = list(seeds)
        self.folds = folds
        self.training = dict(training or {})
        self.scoring = dict(scoring or {})
        self.inside_methods = dict(inside or {})
        self.own_rounds = own_rounds
        self.shares = tuple(shares)
        self.fine_tuning = fine_tuning
        self.outside_methods = dict(outside or {})
        self.candidates = dict(candidates or {})
        self.labelled = labelled

    # inside ----------------------------------------------------------------------------------------------------------

    def inside(self) -> None:
        """Every seed and fold: each training method, scored on every site's test cases of the fold."""
        for seed in self.seeds:
            for fold in range(self.folds):
                self._inside_run(seed, fold, self.output_dir / f"seed{seed}" / f"inside_{fold}")
                self.collect()

    def _inside_run(self, seed: int, fold: int, run: Path) -> None:
        def cases(split: str) -> Expression:
            if self.folds == 1:
                text = f"$sites.site_cases(@dataset_dir, @site, '{split}', seed={seed:d}, fractions=@fractions)"
            else:
                folds = f"fold={fold:d}, folds={self.folds:d}"
                text = f"$sites.fold_cases(@dataset_dir, @site, '{split}', {folds}, seed={seed:d})"
            return Expression(text)

        data = {"train#dataset#data": cases("train"), "validate#dataset#data": cases("validation")}
        test = {"role": "inside", "mode": "off", "validate#dataset#data": cases("test")}
        for method, options in self.inside_methods.items():
            options = dict(options)
            kind = options.pop("model", GLOBAL)
            own = [*PERSONAL, *(["fine-tuned"] if self.fine_tuning else [])]
            produced = [method, *own] if method == FEDAVG else [method]
            if all(self._scored(run, site, name) for site in self.sites for name in produced):
                continue
            logger.info("seed %d, fold %d: %s", seed, fold, method)
            models = run / "models" / method
            if kind == "local":
                for site in self.sites:
                    alone = self._federate([site], seed, run / method / site, {**data, **options})
                    save_atomically(alone.weights, model_path(str(models), "personalised", site))
            else:
                federation = self._federate(self.sites, seed, run / method, {**data, **options})
                self._keep_models(federation, kind, models)
                if method == FEDAVG:
                    self._personal(federation, run, test)
            for site in self.sites:
                self._score(run, site, method, model_path(str(models), "personalised", site), **test)

    def _keep_models(self, federation: Federation, kind: str, models: Path) -> None:
        """Each site's model of a training method, as a file of its own."""
        for site, client in federation.clients.items():
            weights: Mapping[str, Tensor] = federation.weights
            if kind == "norms":
                weights = client.kept["local_norms"].personal_state(federation.weights)
            elif kind == "ditto":
                weights = client.kept["ditto"].personal_state()
            save_atomically(dict(weights), model_path(str(models), "personalised", site))

    def _personal(self, federation: Federation, run: Path, test: Mapping[str, Any]) -> None:
        """What each site makes of FedAvg for itself: the moving average, what it settles on, fine-tuning."""
        shares: dict[str, list[float]] = {}
        for site, client in federation.clients.items():
            before = copy.deepcopy(client.state_dict())
            made: dict[str, Mapping[str, Tensor]] = {}
            for name, settled in zip(PERSONAL, ((0, ()), (0, self.shares), (self.own_rounds, self.shares))):
                shares.setdefault(site, []).append(client.settle(federation.weights, *settled))
                made[name] = {key: tensor.cpu().clone() for key, tensor in client.personalised.items()}
                client.load_state_dict(before)
            if self.fine_tuning:
                made["fine-tuned"] = fine_tune(client, federation.weights, self.fine_tuning)
            for name, weights in made.items():
                path = model_path(str(run / "models" / name), "personalised", site)
                save_atomically(dict(weights), path)
                self._score(run, site, name, path, **test)
        write_json(run / "shares.json", {site: dict(zip(PERSONAL, chosen)) for site, chosen in shares.items()})

    # outside ---------------------------------------------------------------------------------------------------------

    def outside(self) -> None:
        """Every seed, each site left out in turn: every method on all its cases."""
        chosen = []
        for seed in self.seeds:
            for site in self.sites:
                others = [other for other in self.sites if other != site]
                run = self.output_dir / f"seed{seed}" / f"outside_{site}"
                models = self._experts(others, seed)
                self._outside_methods(run, site, models, others)
                if self.candidates and len(others) > 1:
                    name, means = self._choose(seed, others)
                    chosen.append({"seed": seed, "fold": site, "choice": name, "candidates": means})
                    write_json(self.output_dir / "choices.json", chosen)
                    options = {"mode": "episodic", "preset": "default", "routing": self.candidates[name]}
                    self._score(run, site, "chosen", model_path(models), **self._outside(models, **options))
                self.collect()

    def _outside_methods(self, run: Path, site: str, models: str, others: Sequence[str]) -> None:
        for method, options in self.outside_methods.items():
            logger.info("outside %s: %s", site, method)
            self._score(run, site, method, model_path(models), **self._outside(models, **options))
        for expert in others:
            path = model_path(models, "personalised", expert)
            self._score(run, site, f"expert {expert}", path, **self._outside(models, mode="off"))
        if self.labelled and not self._scored(run, site, "labelled routes"):
            path = str(run / "models" / "labelled.pt")
            save_atomically(self._fit_with_labels(site, models), path)
            self._score(run, site, "labelled routes", path, **self._outside(models, mode="off"))

    def _outside(self, models: str, **options: Any) -> dict[str, Any]:
        if "baseline" in options:
            baseline = check_file_name(options.pop("baseline"), "baseline")
            options["validate#inferer"] = Expression(f"@baselines#{baseline}")
        return {"role": "outside", "split": "all", "ckpt_dir": models, **options}

    def _experts(self, sites: Sequence[str], seed: int) -> str:
        """The folder of the models that these sites published; federated where that has not been done yet."""
        run = self.output_dir / f"seed{seed}" / ("federation_" + "+".join(sorted(sites)))
        if not (run / "models" / "scores.json").is_file():
            cases = "$sites.site_cases(@dataset_dir, @site, '{}', seed={:d}, fractions=(0.8, 0.2, 0.0))"
            data = {
                "train#dataset#data": Expression(cases.format("train", seed)),
                "validate#dataset#data": Expression(cases.format("validation", seed)),
            }
            self._federate(sites, seed, run, data, own_rounds=self.own_rounds, shares=self.shares)
        return str(run / "models")

    def _choose(self, seed: int, sites: Sequence[str]) -> tuple[str, dict[str, float]]:
        """The candidate that does best where each of these sites plays the outsider for the rest of them."""
        means: dict[str, list[float]] = {name: [] for name in self.candidates}
        for site in sites:
            others = [other for other in sites if other != site]
            models = self._experts(others, seed)
            run = self.output_dir / f"seed{seed}" / ("inner_" + "+".join(sorted(others)))
            for name, routing in self.candidates.items():
                options = {"mode": "episodic", "preset": "default", "routing": routing}
                self._score(run, site, name, model_path(models), **self._outside(models, **options))
                scores = [float(row["value"]) for row in self._rows(run, site, name) if row["metric"] == "dice"]
                means[name].append(sum(scores) / len(scores))
        mean = {name: sum(values) / len(values) for name, values in means.items()}
        return max(mean, key=lambda name: mean[name]), mean

    def _fit_with_labels(self, site: str, models: str) -> dict[str, Tensor]:
        """Routes fitted with the site's labels: what the best routes for the site as a whole could give."""
        parser = self._training_config(site)
        network: nn.Module = parser.get_parsed_content("network")
        network.load_state_dict(load_weights(model_path(models)))
        experts = {GLOBAL: network.state_dict(), **load_experts(models)}
        inferer = parser.get_parsed_content("validate#inferer")
        device = parser.get_parsed_content("device")
        batches = []
        for case in parser.get_parsed_content("validate#dataset"):
            image, label = (case[key].as_tensor().to(device) for key in ("image", "label"))
            if inferer.slices is None:
                batches.append((image[None], label[None]))
            else:
                batches.append((to_stack(image, inferer.slices), to_stack(label, 1)))
        return labelled_routes(network, experts, batches, parser.get_parsed_content("loss"))

    # both ------------------------------------------------------------------------------------------------------------

    def _training_config(self, site: str) -> ConfigParser:
        parser = ConfigParser()
        parser.read_config(str(Path(self.bundle_root) / "configs" / "train.json"))
        data = Expression("$sites.site_cases(@dataset_dir, @site, 'all')")
        overrides = {**self.training, "dataset_dir": self.dataset_dir, "site": site, "validate#dataset#data": data}
        parser.update(as_values({"bundle_root": self.bundle_root, **overrides}))
        return parser

    def _federate(
        self, sites: Sequence[str], seed: int, run: Path, overrides: Mapping[str, Any], **options: Any
    ) -> Federation:
        federation = Federation(
            self.bundle_root,
            sites,
            self.rounds,
            str(run),
            overrides={**self.training, "dataset_dir": self.dataset_dir, "seed": seed, **overrides},
            val_interval=0,
            resume=True,
            seed=seed,
            **options,
        )
        federation.run()
        return federation

    def _score(self, run: Path, site: str, method: str, path: str, **options: Any) -> None:
        if not self._scored(run, site, method):
            common = {**self.scoring, "dataset_dir": self.dataset_dir, "ckpt": path}
            Scoring(self.bundle_root, str(run), common, ("evaluate", "baselines")).score(site, method, **options)

    def _rows(self, run: Path, site: str, method: str) -> list[dict[str, str]]:
        rows = read_rows(run / "metrics.csv") if (run / "metrics.csv").is_file() else []
        return [row for row in rows if row["site"] == site and row["model"] == method]

    def _scored(self, run: Path, site: str, method: str) -> bool:
        return bool(self._rows(run, site, method))

    def collect(self) -> None:
        """Gather the runs' scores in ``comparison.csv``, and those of the review lists in ``review.csv``."""
        rows = []
        for path in sorted(self.output_dir.glob("seed*/*side_*/metrics.csv")):
            seed, fold = path.parts[-3].removeprefix("seed"), path.parts[-2].split("_", 1)[1]
            for row in read_rows(path):
                rows.append({**row, "seed": seed, "fold": fold, "method": row["model"]})
        write_rows(self.output_dir / "comparison.csv", COLUMNS, [{key: row[key] for key in COLUMNS} for row in rows])
        collect_review(self.output_dir)
