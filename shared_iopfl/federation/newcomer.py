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
"""A personalised model for a newcomer: a site with few labelled cases that uses the published models of a federation.

No other site takes part, and nothing leaves the newcomer. The candidates are the global model, mixtures of all models,
both of these with the batch-norm statistics of the site, and the best of all these after some rounds of training at the
site. Each candidate is scored by cross-validation over the site's patients. The candidate with the highest Dice becomes
the personalised model, which may be the global model itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from shared_iopfl.data.patients import AUTO
from shared_iopfl.data.scan_files import Case
from shared_iopfl.data.splits import find_cases
from shared_iopfl.evaluation.scores import finite_mean, show
from shared_iopfl.federation.averaging import average_updates
from shared_iopfl.federation.client import SiteClient
from shared_iopfl.handlers.norm_statistics import mixed_batches, with_own_statistics
from shared_iopfl.models.architecture import write_architecture
from shared_iopfl.models.files import GLOBAL, load_experts, load_scores, load_weights, model_path, save_atomically
from shared_iopfl.models.manifest import SCORES, read_manifest
from shared_iopfl.models.weights import Weights, check_experts, interpolate
from shared_iopfl.routing.distances import distance_routes, scan_distances
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.names import check_site
from shared_iopfl.utils.stacks import scan_slices
from shared_iopfl.utils.tables import aligned, write_json, write_rows

State = dict[str, Tensor]
CANDIDATES, COLUMNS = "candidates.csv", ("candidate", "fold", "cases", "dice", "chosen")
GLOBAL_MODEL, OWN = "global model", ", statistics of the site"
BATCH = 16  # network inputs per forward pass, or fewer if they are large


def deal(cases: Sequence[Case], folds: int) -> list[list[Case]]:
    """Divide cases into groups by patient, one patient after the other.

    Args:
        cases: The cases.
        folds: Number of groups; if there are fewer patients, each patient is a group.

    Returns:
        The cases of each group.

    Raises:
        InputError: If there are fewer than two patients or folds, so that nothing can be held out.
    """
    patients = sorted({case["patient"] for case in cases})
    if min(folds, len(patients)) < 2:
        raise InputError(
            f"a cross-validation needs two folds and two patients, but there are {folds} folds and {len(patients)} "
            "patients: label more cases, or use the published models (iopfl segment)."
        )
    groups = [set(patients[start::folds]) for start in range(min(folds, len(patients)))]
    return [[case for case in cases if case["patient"] in group] for group in groups]


@dataclass(eq=False)
class Newcomer:
    """Makes a personalised model for a site that did not take part in the federation.

    It writes ``models/``, which holds the published models and the new one, and ``candidates.csv`` with the Dice of
    each candidate in each fold.

    Args:
        bundle_root: Folder of the bundle whose ``configs/train.json`` the site runs.
        dataset_dir, site: Folder of the sites, and the name of the site with the labelled cases.
        ckpt_dir: Folder of the published models, which are only read.
        output_dir: Folder to write to.
        overrides: Overrides of the training config.
        rounds: Largest number of training rounds at the site. Models are scored after 1, 2, 4, ... rounds and at the
            end.
        folds: Number of folds of the cross-validation, at most one per patient.
        shares: Weights of the trained model in its interpolation with the model from which the training started.
        patient: How patients are recognised from the files, see :mod:`shared_iopfl.data.patients`.
        seed: Seed of sampling and augmentation.

    Raises:
        InputError: If a personalised model of this site has already been published.
    """

    bundle_root: str
    dataset_dir: str
    site: str
    ckpt_dir: str
    output_dir: Path
    overrides: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 8
    folds: int = 5
    shares: Sequence[float] = (0.5, 1.0)
    patient: str = AUTO
    seed: int = 0

    def __post_init__(self) -> None:
        """Find the cases and read the models."""
        self.output_dir = Path(self.output_dir)
        self.shares = sorted({*self.shares} - {0.0})
        self.groups = deal(find_cases(self.dataset_dir, check_site(self.site), self.patient), self.folds)
        self.models: dict[str, State] = {GLOBAL: load_weights(model_path(self.ckpt_dir)), **load_experts(self.ckpt_dir)}
        self.dice: dict[str, list[float]] = {}  # candidate -> Dice of each fold
        self.chosen = ""
        self._rounds_of: dict[str, int] = {}  # trained candidate -> its number of rounds
        if Path(model_path(self.ckpt_dir, "personalised", self.site)).is_file():
            raise InputError(
                f"{self.ckpt_dir} holds a personalised model of '{self.site}' already: use it, or give your site "
                "another name."
            )

    def run(self) -> State:
        """Score all candidates, and write the models together with the chosen candidate.

        Returns:
            The weights of the chosen candidate.
        """
        self._copy_models()
        clients = [self._client(fold) for fold in range(len(self.groups))]
        measured = [client.measurable(self.models[GLOBAL]) for client in clients]
        network = measured[0][0]
        check_experts(network, self.models)
        scans = [
            [(stack, scan_distances(network, self.models, scan_slices(stack), BATCH)) for stack in stacks]
            for _, stacks in measured
        ]

        starts = [self._untrained(network, _all_but(fold, scans)) for fold in range(len(clients))]
        for client, untrained in zip(clients, starts):
            self._score(client, untrained)
        start = self._best()
        for client, untrained in zip(tqdm(clients, desc="folds", unit="fold"), starts):
            self._score(client, self._trained(client, untrained[start], self.rounds))
        self.chosen = self._best()
        self._write_table()

        final = self._untrained(network, _all_but(None, scans))
        if self.chosen not in final:
            final = self._trained(self._client(None), final[start], self._rounds_of[self.chosen])
        save_atomically(final[self.chosen], model_path(str(self.output_dir / "models"), "personalised", self.site))
        return final[self.chosen]

    def print_table(self) -> str:
        """Print the mean Dice of each candidate over the held-out cases, and return the text."""
        rows = [["candidate", "Dice", "better than the global model in"]]
        for name, dice in self.dice.items():
            better = sum(one > other for one, other in zip(dice, self.dice[GLOBAL_MODEL]))
            wins = "" if name == GLOBAL_MODEL else f"{better} of {len(dice)} folds"
            rows.append([name, show("dice", self._mean(name)), wins + "  <- chosen" * (name == self.chosen)])
        path = model_path(str(self.output_dir / "models"), "personalised", self.site)
        text = "\n".join([*aligned(rows, left=(0, 2)), f"personalised model of {self.site}: {path}"])
        print(text)
        return text

    def _copy_models(self) -> None:
        """Copy the published models to the folder of the new one, so that they can be used and published together."""
        folder = self.output_dir / "models"
        for name, weights in {GLOBAL: self.models[GLOBAL], **load_experts(self.ckpt_dir, equal_too=True)}.items():
            save_atomically(weights, model_path(str(folder), GLOBAL if name == GLOBAL else "personalised", name))
        if (scores := load_scores(self.ckpt_dir)) is not None:
            write_json(folder / SCORES, {**scores, self.site: None})  # no other site has scored the new model
        if (manifest := read_manifest(self.ckpt_dir)) is not None:
            write_architecture(folder, manifest["architecture"])  # otherwise the training of the first client writes it

    def _client(self, fold: int | None) -> SiteClient:
        """A client that trains on all cases but those of a fold, and validates on those; None trains on all cases."""
        overrides = {
            **self.overrides,
            "dataset_dir": self.dataset_dir,
            "site": self.site,
            "output_dir": str(self.output_dir),
            "ckpt_dir": str(self.output_dir / "models"),
            "epochs": self.rounds,
            "seed": self.seed,
            "train#dataset#data": _all_but(fold, self.groups),
            "validate#dataset#data": [] if fold is None else self.groups[fold],
        }
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            client = SiteClient(self.bundle_root, self.site, 1, overrides)
        client.kept["personalization"].save_path = None  # only the chosen candidate is written
        return client

    def _untrained(self, network: nn.Module, scans: Sequence[tuple[Tensor, Tensor]]) -> dict[str, State]:
        """Make the candidates that need no labels.

        Args:
            network: The architecture.
            scans: Network inputs of each scan, and its distances from each model; empty if the network has no batch
                norms.

        Returns:
            Name of each candidate -> its weights.
        """
        found = {GLOBAL_MODEL: self.models[GLOBAL]}
        if len(self.models) > 1:
            found["equal mixture"] = average_updates(self.models, dict.fromkeys(self.models, 1.0))
            if scans:
                routes = distance_routes(torch.stack([distances for _, distances in scans]).mean(0)).tolist()
                found["mixture by distance"] = average_updates(self.models, dict(zip(self.models, routes)))
        if scans:
            batches = mixed_batches([stack for stack, _ in scans])
            for name, weights in [*found.items()]:
                network.load_state_dict(weights)
                found[name + OWN] = {key: tensor.cpu() for key, tensor in with_own_statistics(network, batches).items()}
        return found

    def _trained(self, client: SiteClient, start: Weights, rounds: int) -> dict[str, State]:
        """Train at the site; return the name of each trained candidate -> its weights."""
        found: dict[str, State] = {}
        own = dict(start)
        for trained in range(1, rounds + 1):
            own = client.train(own)
            if trained == self.rounds or math.log2(trained).is_integer():
                for share in self.shares:
                    name = f"trained for {trained} round{'s' * (trained > 1)}, share {share:g}"
                    found[name], self._rounds_of[name] = interpolate(start, own, share), trained
        return found

    def _score(self, client: SiteClient, candidates: Mapping[str, State]) -> None:
        for name, weights in candidates.items():
            self.dice.setdefault(name, []).append(client.validate(weights)["val_mean_dice"])

    def _mean(self, name: str) -> float:
        """The mean Dice over the cases; a fold whose reference masks are empty has none."""
        return finite_mean(value for value, group in zip(self.dice[name], self.groups) for _ in group)

    def _best(self) -> str:
        """The candidate with the highest mean Dice, or the first of several."""
        means = {name: mean for name in self.dice if math.isfinite(mean := self._mean(name))}
        if not means:
            raise InputError(f"no Dice of {self.site} is defined, because its masks are empty: label the target.")
        return max(means, key=means.__getitem__)

    def _write_table(self) -> None:
        rows = [
            {"candidate": name, "fold": fold, "dice": value, "chosen": name == self.chosen}
            | {"cases": ";".join(case["case"] for case in self.groups[fold])}
            for name, dice in self.dice.items()
            for fold, value in enumerate(dice)
        ]
        write_rows(self.output_dir / CANDIDATES, COLUMNS, rows)


def _all_but(fold: int | None, parts: Sequence[Sequence[Any]]) -> list[Any]:
    return [item for index, part in enumerate(parts) if index != fold for item in part]
