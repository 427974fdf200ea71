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
"""A newcomer of a federation: a personalised model for a site with few labelled cases, from models that are published.

No other site takes part, and nothing leaves the newcomer. Each candidate is scored by a cross-validation over the
site's patients: the global model, mixtures of all models, both with the batch-norm statistics of the site, and the best
of these after some rounds of training at the site. The candidate with the highest Dice becomes the personalised model;
the global model is one of them.
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
from shared_iopfl.utils.tables import write_json, write_rows

State = dict[str, Tensor]
CANDIDATES, COLUMNS = "candidates.csv", ("candidate", "fold", "cases", "dice", "chosen")
GLOBAL_MODEL, OWN = "global model", ", statistics of the site"
BATCH = 16  # network inputs a forward, or fewer where they are large


def deal(cases: Sequence[Case], folds: int) -> list[list[Case]]:
    """The cases in groups of patients, one after the other; of fewer patients than folds, each is a group.

    Raises:
        InputError: with fewer than two patients or folds, where nothing could be held out.
    """
    patients = sorted({case["patient"] for case in cases})
    if min(folds, len(patients)) < 2:
        raise InputError(
            f"a cross-validation needs two folds and two patients, but there are {folds} folds and {len(patients)} "
            "patients: label more cases, or use the models as they are (iopfl segment)."
        )
    groups = [set(patients[start::folds]) for start in range(min(folds, len(patients)))]
    return [[case for case in cases if case["patient"] in group] for group in groups]


@dataclass(eq=False)
class Newcomer:
    """Makes a personalised model for a site that did not take part in the federation.

    Writes ``models/``, which holds the published models and the new one, and ``candidates.csv``: the Dice of each
    candidate in each fold.

    Args:
        bundle_root: the bundle whose ``configs/train.json`` the site runs.
        dataset_dir, site: the labelled cases.
        ckpt_dir: the published models; only read.
        output_dir: where the files go.
        overrides: of the training config.
        rounds: of training at the site, at most; it is scored after 1, 2, 4, ... rounds and at the end.
        folds: of the cross-validation, at most one for each patient.
        shares: of the trained model in its interpolation with the model that the training began with.
        patient: how files are assigned to patients.
        seed: of sampling and augmentation.

    Raises:
        InputError: where the site is one of those that the models are of.
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
        self.dice: dict[str, list[float]] = {}  # candidate -> of each fold
        self.chosen = ""
        if Path(model_path(self.ckpt_dir, "personalised", self.site)).is_file():
            raise InputError(
                f"{self.ckpt_dir} holds a personalised model of '{self.site}' already: use it, or give your site "
                "another name."
            )

    def run(self) -> State:
        """Score all candidates, and write the models with the chosen one among them.

        Returns:
            The weights of the chosen one.
        """
        self._copy_models()
        clients = [self._client(self._all_but(fold), held) for fold, held in enumerate(self.groups)]
        held_out = [client.measurable(self.models[GLOBAL])[1] for client in clients]
        network = clients[0].measurable(self.models[GLOBAL])[0]
        check_experts(network, self.models)
        distances = [
            [scan_distances(network, self.models, scan_slices(stack), BATCH) for stack in stacks] for stacks in held_out
        ]

        starts = []
        for fold, client in enumerate(clients):
            known = [index for index in range(len(clients)) if index != fold]
            starts.append(self._untrained(network, *(_flat(parts, known) for parts in (held_out, distances))))
            for name, weights in starts[fold].items():
                self._note(name, client, weights)
        start = self._best()
        for fold, client in enumerate(tqdm(clients, desc="folds", unit="fold")):
            for name, weights in self._trained(client, starts[fold][start], self.rounds).items():
                self._note(name, client, weights)
        self.chosen = self._best()
        self._write_table()

        every = range(len(self.groups))
        final = self._untrained(network, *(_flat(parts, every) for parts in (held_out, distances)))
        if self.chosen not in final:
            final = self._trained(self._client(self._all_but(None), []), final[start], self._rounds_of(self.chosen))
        save_atomically(final[self.chosen], model_path(str(self.output_dir / "models"), "personalised", self.site))
        return final[self.chosen]

    def print_table(self) -> str:
        """Print the mean Dice of each candidate over the held-out cases, and return the text."""
        width = max(map(len, self.dice))
        lines = [f"{'candidate':{width}}   Dice  better than the global model in"]
        for name, dice in self.dice.items():
            better = sum(one > other for one, other in zip(dice, self.dice[GLOBAL_MODEL]))
            wins = "" if name == GLOBAL_MODEL else f"{better} of {len(dice)} folds"
            mark = "  <- chosen" * (name == self.chosen)
            lines.append(f"{name:{width}}  {show('dice', self._mean(name)):>5}  {wins}{mark}".rstrip())
        path = model_path(str(self.output_dir / "models"), "personalised", self.site)
        lines += [f"personalised model of {self.site}: {path}"]
        text = "\n".join(lines)
        print(text)
        return text

    def _copy_models(self) -> None:
        """The published models where the new one will lie, so that the set can be used, or published, as any other."""
        folder = self.output_dir / "models"
        for name, weights in {GLOBAL: self.models[GLOBAL], **load_experts(self.ckpt_dir, equal_too=True)}.items():
            save_atomically(weights, model_path(str(folder), GLOBAL if name == GLOBAL else "personalised", name))
        if (scores := load_scores(self.ckpt_dir)) is not None:
            write_json(folder / SCORES, {**scores, self.site: None})  # the new model was scored at no other site
        if (manifest := read_manifest(self.ckpt_dir)) is not None:
            write_architecture(folder, manifest["architecture"])  # else the first client's training writes one

    def _client(self, training: Sequence[Case], validation: Sequence[Case]) -> SiteClient:
        overrides = {
            **self.overrides,
            "dataset_dir": self.dataset_dir,
            "site": self.site,
            "output_dir": str(self.output_dir),
            "ckpt_dir": str(self.output_dir / "models"),
            "epochs": self.rounds,
            "seed": self.seed,
            "train#dataset#data": list(training),
            "validate#dataset#data": list(validation),
        }
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            client = SiteClient(self.bundle_root, self.site, 1, overrides)
        client.kept["personalization"].save_path = None  # the file is written once, with what is chosen
        return client

    def _all_but(self, fold: int | None) -> list[Case]:
        return [case for index, group in enumerate(self.groups) if index != fold for case in group]

    def _untrained(self, network: nn.Module, stacks: Sequence[Tensor], distances: Sequence[Tensor]) -> dict[str, State]:
        """The candidates that no label was used for, name -> weights.

        Args:
            network: the architecture.
            stacks: network inputs of each scan; none where the network has no batch norms.
            distances: of each scan from each model.
        """
        found = {GLOBAL_MODEL: self.models[GLOBAL]}
        if len(self.models) > 1:
            found["equal mixture"] = average_updates(self.models, dict.fromkeys(self.models, 1.0))
            if stacks:
                routes = distance_routes(torch.stack(list(distances)).mean(0)).tolist()
                found["mixture by distance"] = average_updates(self.models, dict(zip(self.models, routes)))
        if stacks:
            batches = mixed_batches(stacks)
            for name, weights in [*found.items()]:
                network.load_state_dict(weights)
                found[name + OWN] = {key: tensor.cpu() for key, tensor in with_own_statistics(network, batches).items()}
        return found

    def _trained(self, client: SiteClient, start: Weights, rounds: int) -> dict[str, State]:
        """The candidates that are trained at the site, name -> weights."""
        found: dict[str, State] = {}
        own = dict(start)
        for trained in range(1, rounds + 1):
            own = client.train(own)
            if trained == self.rounds or math.log2(trained).is_integer():
                for share in self.shares:
                    found[self._name(trained, share)] = interpolate(start, own, share)
        return found

    def _name(self, rounds: int, share: float) -> str:
        return f"trained for {rounds} round{'s' * (rounds > 1)}, share {share:g}"

    def _rounds_of(self, name: str) -> int:
        named = {self._name(rounds, share): rounds for rounds in range(1, self.rounds + 1) for share in self.shares}
        return named[name]

    def _note(self, name: str, client: SiteClient, weights: Weights) -> None:
        self.dice.setdefault(name, []).append(client.validate(weights)["val_mean_dice"])

    def _mean(self, name: str) -> float:
        """Over the cases; a fold whose reference masks are empty has no Dice."""
        return finite_mean(value for value, group in zip(self.dice[name], self.groups) for _ in group)

    def _best(self) -> str:
        """The candidate with the highest mean Dice, of equal ones the first."""
        means = {name: mean for name in self.dice if math.isfinite(mean := self._mean(name))}
        if not means:
            raise InputError(f"no Dice of {self.site} is defined: its masks are empty.")
        return max(means, key=means.__getitem__)

    def _write_table(self) -> None:
        rows = [
            {"candidate": name, "fold": fold, "dice": value, "chosen": name == self.chosen}
            | {"cases": ";".join(case["case"] for case in self.groups[fold])}
            for name, dice in self.dice.items()
            for fold, value in enumerate(dice)
        ]
        write_rows(self.output_dir / CANDIDATES, COLUMNS, rows)


def _flat(parts: Sequence[Sequence[Tensor]], known: Sequence[int]) -> list[Tensor]:
    return [item for index in known for item in parts[index]]
