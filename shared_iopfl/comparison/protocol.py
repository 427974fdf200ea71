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
"""The protocol of a comparison: all methods on all sites, in folds inside, and with each site left out in turn.

Inside: all sites are federated, and the test cases of each site are scored once, by the published split or by
cross-validation over patients. Choices that a method has to make use the validation cases. Outside: each site is left
out in turn, the others are federated, and all cases of the site left out are scored. None of its labels is used before;
settings can be chosen by an inner leave-one-site-out among the remaining sites. Finished steps are not run again, so an
interrupted comparison can be resumed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from shared_iopfl.comparison.runs import Runs, best_of
from shared_iopfl.comparison.tables import LABELLED, POOLED
from shared_iopfl.comparison.training import Trainings, expert_split, fine_tune, keep_models
from shared_iopfl.evaluation.scores import finite_mean
from shared_iopfl.evaluation.scoring import raise_failures
from shared_iopfl.federation.simulation import Federation
from shared_iopfl.inferers.selection import SELECTOR
from shared_iopfl.models.files import GLOBAL, model_path, save_atomically
from shared_iopfl.utils.config_values import Expression
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.names import check_file_name, check_sites
from shared_iopfl.utils.tables import write_json

logger = logging.getLogger(__name__)
FEDAVG = "FedAvg"
CHOSEN = "chosen"
PERSONAL = ("average", "average, interpolated", "personalised")  # the personalised models of a site


class Comparison:
    """Train and score all methods; write ``comparison.csv``, ``choices.json`` and a folder per run.

    A run's folder ``seed<k>/inside_<fold>`` or ``seed<k>/outside_<site>`` holds the federation of each training method,
    ``metrics.csv``, ``cases.csv`` and ``masks/``.

    Args:
        bundle_root: Bundle whose ``train.json`` and ``evaluate.json`` (with ``baselines.json``) are run.
        dataset_dir: Folder of the sites.
        output_dir: Folder to write to.
        sites: Names of all sites.
        rounds: Rounds of every federation.
        seeds: Seeds of networks, augmentation and splits; the whole protocol is run once per seed.
        folds: Number of folds inside; 1 uses the published split, more use cross-validation by patient.
        server_momentum: Server momentum of every federation, as in :class:`Federation`; the overrides of a method may
            contain another one (and an ``averaging``).
        training: Overrides of the training config, for all methods alike.
        scoring: Overrides of the evaluation config.
        inside: method -> overrides of the training config. A key "model" selects which model of the run is scored:
            "global", "norms" (with the site's own norm layers), "ditto" (the site's own model of Ditto) or "local"
            (each site alone).
        own_rounds, shares: How a site makes its personalised model after the last round, as in :class:`Federation`;
            this is the method "personalised". Without own rounds, the moving average is the method "average",
            and its interpolation with a share chosen among `shares` the method "average, interpolated".
        fine_tuning: Rounds of fine-tuning, at the learning rate of the last rounds, for the method "fine-tuned"; 0
            leaves it out.
        outside: method -> overrides of the evaluation config; a key "baseline" names an inferer of ``baselines.json``.
            For the baseline "selector", FedSM's selector is trained by the sites that are not left out.
        candidates: name -> routing settings, from which the method "chosen" selects one by an inner leave-one-site-out.
            If empty, there is no such method.
        pooled: Overrides of the training config for the method "pooled", inside and outside: one network trained for as
            many epochs on the pooled cases of all sites, which a federation does not have. None: no such method.
        federations: name -> overrides of the training config for a further federation. Outside, its global model is a
            method of that name. ``federations.json`` records which of them would be chosen for each site left out, by
            scores at the other sites alone.
        virtual: Names of virtual scanners of ``virtual.json``. Inside, each training method is also scored on the test
            cases as transformed by such a scanner. No setting was tuned on these scanners, and they have labels.
        labelled: Whether to add the bound of routes that were fitted with the outside site's labels.
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
        server_momentum: float = 0.0,
        training: Mapping[str, Any] | None = None,
        scoring: Mapping[str, Any] | None = None,
        inside: Mapping[str, Mapping[str, Any]] | None = None,
        own_rounds: int = 0,
        shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        fine_tuning: int = 0,
        outside: Mapping[str, Mapping[str, Any]] | None = None,
        candidates: Mapping[str, Mapping[str, Any]] | None = None,
        pooled: Mapping[str, Any] | None = None,
        federations: Mapping[str, Mapping[str, Any]] | None = None,
        virtual: Sequence[str] = (),
        labelled: bool = True,
    ) -> None:
        if len(sites) < 2:
            raise InputError(
                f"a comparison leaves each site out in turn: it needs two sites or more, got {list(sites)}."
            )
        self.output_dir = Path(output_dir)
        self.sites = check_sites(sites)
        self.seeds = list(seeds)
        self.folds = folds
        self.runs = Runs(bundle_root, dataset_dir, self.output_dir, scoring or {})
        how = (rounds, dict(training or {}), server_momentum, own_rounds, tuple(shares), pooled)
        self.trainings = Trainings(bundle_root, dataset_dir, self.output_dir, *how)
        self.inside_methods = dict(inside or {})
        # own rounds and shares of the models PERSONAL
        self.selections = ((0, ()), (0, tuple(shares)), (own_rounds, tuple(shares)))
        self.fine_tuning = fine_tuning
        self.outside_methods = dict(outside or {})
        self.candidates = dict(candidates or {})
        self.pooled = pooled
        self.federations = dict(federations or {})
        for name in {GLOBAL, CHOSEN, LABELLED, POOLED, *self.outside_methods} & set(self.federations):
            raise InputError(f"federations: '{name}' is another method's name already: choose a different one.")
        self.virtual = list(virtual)
        self.labelled = labelled

    # inside ----------------------------------------------------------------------------------------------------------

    def inside(self) -> None:
        """Run every seed and fold: each training method, scored on the test cases of every site."""
        for seed in self.seeds:
            for fold in range(self.folds):
                self._inside_run(seed, fold, self.output_dir / f"seed{seed}" / f"inside_{fold}")
                self.collect()

    def _inside_run(self, seed: int, fold: int, run: Path) -> None:
        data = {"split_seed": seed, "fold": fold, "folds": self.folds}
        tested = {**data, "split": "test", "role": "inside", "mode": "off"}
        for method, options in self.inside_methods.items():
            options = dict(options)
            kind = options.pop("model", GLOBAL)
            test = {**tested, **_architecture(options)}
            own = [*PERSONAL, *(["fine-tuned"] if self.fine_tuning else [])]
            produced = [method, *own] if method == FEDAVG else [method]
            if all(self.runs.scored(run, site, name) for site in self.sites for name in produced):
                continue
            logger.info("seed %d, fold %d: %s", seed, fold, method)
            models = run / "models" / method
            if kind == "local":
                for site in self.sites:
                    alone = self.trainings.federate([site], seed, run / method / site, {**data, **options})
                    save_atomically(alone.weights, model_path(str(models), "personalised", site))
            else:
                federation = self.trainings.federate(self.sites, seed, run / method, {**data, **options})
                keep_models(federation, kind, models)
                if method == FEDAVG:
                    self._personal(federation, run, test)
            for site in self.sites:
                self.runs.score(run, site, method, model_path(str(models), "personalised", site), **test)
            self._score_virtual(run, method, models, test)
        if self.pooled is not None and not all(self.runs.scored(run, site, POOLED) for site in self.sites):
            path = self.trainings.pool(self.sites, seed, run / "models" / POOLED, data)
            for site in self.sites:
                self.runs.score(run, site, POOLED, path, **tested)
            self._score_virtual(run, POOLED, Path(path).parent, tested)

    def _score_virtual(self, run: Path, method: str, models: Path, test: Mapping[str, Any]) -> None:
        """Score a method on the test cases of a fold, transformed by each virtual scanner."""
        for name in self.virtual:
            folder = run.with_name(f"virtual_{name}_{run.name.removeprefix('inside_')}")
            scanner = Expression(f"@virtual#{check_file_name(name, 'virtual scanner')}")
            options = {**test, "role": "virtual", "acquisition": scanner}
            for site in self.sites:
                own = Path(model_path(str(models), "personalised", site))
                path = own if own.is_file() else model_path(str(models))
                self.runs.score(folder, site, method, str(path), **options)

    def _personal(self, federation: Federation, run: Path, test: Mapping[str, Any]) -> None:
        """Score the models that each site derives from FedAvg: moving average, selected model, fine-tuned model."""
        shares: dict[str, list[float]] = {}
        for site, client in federation.clients.items():
            before = copy.deepcopy(client.state_dict())
            made: dict[str, dict[str, Tensor]] = {}
            for name, how in zip(PERSONAL, self.selections):
                shares.setdefault(site, []).append(client.select_personalised(federation.weights, *how))
                made[name] = copy.deepcopy(client.personalised)
                client.load_state_dict(before)
            if self.fine_tuning:
                made["fine-tuned"] = fine_tune(client, federation.weights, self.fine_tuning)
            for name, weights in made.items():
                path = model_path(str(run / "models" / name), "personalised", site)
                save_atomically(weights, path)
                self.runs.score(run, site, name, path, **test)
        write_json(run / "shares.json", {site: dict(zip(PERSONAL, chosen)) for site, chosen in shares.items()})

    # outside ---------------------------------------------------------------------------------------------------------

    def outside(self) -> None:
        """For every seed, leave each site out in turn, and score every method on all cases of that site."""
        chosen = []
        for seed in self.seeds:
            for site in self.sites:
                others = [other for other in self.sites if other != site]
                run = self.output_dir / f"seed{seed}" / f"outside_{site}"
                models = self.trainings.experts(others, seed)
                self._outside_methods(run, site, models, others, seed)
                if self.candidates and len(others) > 1:
                    name, means = self._choose(seed, others)
                    chosen.append({"seed": seed, "fold": site, "choice": name, "candidates": means})
                    write_json(self.output_dir / "choices.json", chosen)
                    options = {"mode": "episodic", "preset": "default", "routing": self.candidates[name]}
                    self.runs.score(run, site, CHOSEN, model_path(models), **self._outside(models, **options))
                self.collect()
        if self.federations and len(self.sites) > 2:
            self.runs.choose_trainings(self.sites, [GLOBAL, *self.federations])

    def _outside_methods(self, run: Path, site: str, models: str, others: Sequence[str], seed: int) -> None:
        for method, options in self.outside_methods.items():
            logger.info("outside %s: %s", site, method)
            if options.get("baseline") == SELECTOR and not self.runs.scored(run, site, method):
                self.trainings.select(others, seed, models)
            self.runs.score(run, site, method, model_path(models), **self._outside(models, **options))
        for method, training in self.federations.items():
            path = model_path(self.trainings.experts(others, seed, method, training))
            self.runs.score(run, site, method, path, **self._outside(models, mode="off"), **_architecture(training))
        for expert in others:
            path = model_path(models, "personalised", expert)
            self.runs.score(run, site, f"expert {expert}", path, **self._outside(models, mode="off"))
        if self.pooled is not None and not self.runs.scored(run, site, POOLED):
            path = self.trainings.pool(others, seed, run / "models" / POOLED, expert_split(seed))
            self.runs.score(run, site, POOLED, path, **self._outside(models, mode="off"))
        if self.labelled and not self.runs.scored(run, site, LABELLED):
            path = str(run / "models" / "labelled.pt")
            save_atomically(self.trainings.fit_with_labels(site, models), path)
            self.runs.score(run, site, LABELLED, path, **self._outside(models, mode="off"))

    def _outside(self, models: str, **options: Any) -> dict[str, Any]:
        if "baseline" in options:
            baseline = check_file_name(options.pop("baseline"), "baseline")
            options["validate#inferer"] = Expression(f"@baselines#{baseline}")
        return {"role": "outside", "split": "all", "ckpt_dir": models, **options}

    def _choose(self, seed: int, sites: Sequence[str]) -> tuple[str, dict[str, float]]:
        """The candidate with the highest mean when each of these sites in turn is the outside site of the others."""
        means: dict[str, list[float]] = {name: [] for name in self.candidates}
        for site in sites:
            others = [other for other in sites if other != site]
            models = self.trainings.experts(others, seed)
            run = self.output_dir / f"seed{seed}" / ("inner_" + "+".join(sorted(others)))
            for name, routing in self.candidates.items():
                options = {"mode": "episodic", "preset": "default", "routing": routing}
                self.runs.score(run, site, name, model_path(models), **self._outside(models, **options))
                scores = [float(row["value"]) for row in self.runs.rows(run, site, name) if row["metric"] == "dice"]
                means[name].append(finite_mean(scores))
        return best_of(means)

    def collect(self) -> None:
        """Gather the scores so far; see :meth:`~shared_iopfl.comparison.runs.Runs.collect`."""
        self.runs.collect()

    def finish(self) -> None:
        """Raise `InputError` if some cases could not be scored."""
        raise_failures(self.runs.failures)


def _architecture(training: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides of a training that define the network, which scoring needs as well."""
    return {key: value for key, value in training.items() if key.startswith("network_def")}
