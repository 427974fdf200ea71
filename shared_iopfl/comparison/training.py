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
"""What a comparison trains: federations, fine-tuned models, a pooled model, FedSM's selector, and routes with labels.

Nothing is trained twice: the results in the folder of an earlier run are reused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from shared_iopfl.comparison.selector import train_selector
from shared_iopfl.comparison.tables import POOLED
from shared_iopfl.data.photographs.codings import coding_of
from shared_iopfl.federation.client import SiteClient
from shared_iopfl.federation.simulation import Federation
from shared_iopfl.inferers.baselines import labelled_routes
from shared_iopfl.inferers.selection import SELECTOR_FILE, site_classifier
from shared_iopfl.models.files import GLOBAL, load_experts, load_weights, model_path, save_atomically
from shared_iopfl.utils.config_values import Expression, as_values
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.stacks import to_stack

SELECTOR_ROUNDS = 3  # for each round of the federation: they are short, and a selector is a small network
EXPERTS = (0.8, 0.2, 0.0)  # no test cases: these sites are not scored when another one is left out
# the training cases of all sites in one list
ALL_CASES = Expression(
    "$splits.pooled(@pooled_sites, lambda site: splits.site_cases(@dataset_dir, site, 'train', seed=@split_seed, "
    "fractions=@fractions, patient=@patient, fold=@fold, folds=@folds))"
)


def expert_split(seed: int) -> dict[str, Any]:
    """Return the settings of the training config for the split of the sites that experts are trained at."""
    return {"split_seed": seed, "fractions": EXPERTS, "folds": 1}


@dataclass
class Trainings:
    """Trainings of a :class:`~shared_iopfl.comparison.protocol.Comparison`, which explains arguments of the same names.

    Args:
        bundle_root, dataset_dir, output_dir, rounds: As in the comparison.
        training: Overrides of the training config, for all trainings alike.
        server_momentum, own_rounds, shares: Settings of every federation, as in :class:`Federation`.
        pooled: Overrides of the pooled training.
    """

    bundle_root: str
    dataset_dir: str
    output_dir: Path
    rounds: int
    training: Mapping[str, Any]
    server_momentum: float = 0.0
    own_rounds: int = 0
    shares: Sequence[float] = ()
    pooled: Mapping[str, Any] | None = None

    def federate(
        self, sites: Sequence[str], seed: int, run: Path, overrides: Mapping[str, Any], **options: Any
    ) -> Federation:
        """Run a federation over some sites, or the remaining rounds of it, and return it."""
        server: dict[str, Any] = {"server_momentum": self.server_momentum, "averaging": "mean"}
        server |= {key: overrides[key] for key in server if key in overrides}
        overrides = {key: value for key, value in overrides.items() if key not in server}
        federation = Federation(
            self.bundle_root,
            list(sites),
            self.rounds,
            run,
            overrides={**self.training, "dataset_dir": self.dataset_dir, "seed": seed, **overrides},
            val_interval=0,
            resume=True,
            seed=seed,
            **server,
            **options,
        )
        federation.run()
        return federation

    def experts(
        self, sites: Sequence[str], seed: int, name: str = "", training: Mapping[str, Any] | None = None
    ) -> str:
        """The folder of the models that these sites published; they are federated first if necessary.

        Args:
            sites: Sites of the federation.
            seed: Seed of the network, the augmentation and the split.
            name: Name of a training other than the comparison's own; only its global model is used.
            training: Overrides of that training.
        """
        run = self.output_dir / f"seed{seed}" / (f"federation_{name}_" * bool(name) or "federation_")
        run = run.with_name(run.name + "+".join(sorted(sites)))
        if not (run / "models" / "scores.json").is_file():
            own = {} if name else {"own_rounds": self.own_rounds, "shares": self.shares}
            self.federate(sites, seed, run, {**expert_split(seed), **(training or {})}, **own)
        return str(run / "models")

    def pool(self, sites: Sequence[str], seed: int, folder: Path, split: Mapping[str, Any]) -> str:
        """A model trained on the pooled cases of these sites, for as many epochs as the federation.

        Args:
            sites: Sites whose training cases are pooled.
            seed: Seed of network and augmentation.
            folder: Folder of the model.
            split: Settings of the training config for the split of the sites.

        Returns:
            Path of the model. An existing model is not trained again.
        """
        path = model_path(str(folder))
        codings = self.training.get("coding")
        if isinstance(codings, Mapping) and len({repr(coding_of(site, codings)) for site in sites}) > 1:
            raise InputError(f"'{POOLED}' needs sites of one mask coding: set pooled to null.")
        if not Path(path).is_file():
            overrides = {
                **self.training,
                "dataset_dir": self.dataset_dir,
                "output_dir": str(folder),
                "ckpt_dir": str(folder / "unused"),  # for its own moving average
                "site": sites[0],
                "pooled_sites": list(sites),
                "seed": seed,
                "epochs": self.rounds,
                "train#dataset#data": ALL_CASES,
                **split,
                "validate#dataset#data": [],
                **(self.pooled or {}),
            }
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                client = SiteClient(self.bundle_root, sites[0], self.rounds, overrides)
            save_atomically(client.train(client.weights), path)
        return path

    def select(self, sites: Sequence[str], seed: int, models: str) -> None:
        """Train FedSM's selector beside the models of these sites, on their training cases, unless it exists.

        Args:
            sites: Sites of the federation.
            seed: Seed of the classifier, the augmentation and the split.
            models: Folder of the sites' models.
        """
        path = Path(models) / SELECTOR_FILE
        if not path.is_file():
            configs = {site: self._config(site, {**expert_split(seed), "seed": seed}) for site in sites}
            loaders = {site: config.get_parsed_content("train#dataloader") for site, config in configs.items()}
            first = configs[sites[0]]
            classifier = site_classifier(first.get_parsed_content("network_def#in_channels"), len(sites), seed)
            classifier.to(first.get_parsed_content("device"))
            save_atomically(train_selector(classifier, loaders, SELECTOR_ROUNDS * self.rounds, seed), path)

    def _config(self, site: str, overrides: Mapping[str, Any]) -> ConfigParser:
        """The training config of a site."""
        parser = ConfigParser()
        parser.read_config(str(Path(self.bundle_root) / "configs" / "train.json"))
        given = {**self.training, "dataset_dir": self.dataset_dir, "site": site, **overrides}
        parser.update(as_values({"bundle_root": self.bundle_root, **given}))
        return parser

    def fit_with_labels(self, site: str, models: str) -> dict[str, Tensor]:
        """Routes fitted with the site's labels: an upper bound for routes that are the same for the whole site."""
        data = Expression("$splits.site_cases(@dataset_dir, @site, 'all', patient=@patient)")
        parser = self._config(site, {"validate#dataset#data": data})
        network: nn.Module = parser.get_parsed_content("network")
        network.load_state_dict(load_weights(model_path(models)))
        experts = {GLOBAL: network.state_dict(), **load_experts(models)}
        inferer = parser.get_parsed_content("validate#inferer")
        device = parser.get_parsed_content("device")
        batches = []
        for case in parser.get_parsed_content("validate#dataset"):
            image, label = (case[key].as_tensor().to(device, torch.float32) for key in ("image", "label"))
            if inferer.slices is None:
                batches.append((image[None], label[None]))
            else:
                batches.append((to_stack(image, inferer.slices), to_stack(label, 1)))
        return labelled_routes(network, experts, batches, parser.get_parsed_content("loss"))


def fine_tune(client: SiteClient, weights: Mapping[str, Tensor], rounds: int) -> dict[str, Tensor]:
    """Train the global weights further at a site without averaging, at the small learning rate of the last rounds.

    The state of the client is restored afterwards: its personalised model and everything kept for resuming.

    Args:
        client: Client of the site.
        weights: Global weights.
        rounds: Rounds of local training.

    Returns:
        The site's weights.
    """
    before, personalization = copy.deepcopy(client.state_dict()), client.kept["personalization"]
    path, personalization.save_path = personalization.save_path, None  # this model is not published
    tuned = dict(weights)
    try:
        for _ in range(rounds):
            tuned = client.train(tuned)
    finally:
        personalization.save_path = path
        client.load_state_dict(before)
    return tuned


def keep_models(federation: Federation, kind: str, models: Path) -> None:
    """Save each site's model of a training method as a file of its own."""
    for site, client in federation.clients.items():
        weights: Mapping[str, Tensor] = federation.weights
        if kind == "norms":
            weights = client.kept["local_norms"].personal_state(federation.weights)
        elif kind == "ditto":
            weights = client.kept["ditto"].personal_state()
        save_atomically(dict(weights), model_path(str(models), "personalised", site))
