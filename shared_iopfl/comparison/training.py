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
"""What a comparison trains: federations, fine-tuned models, a model on pooled data, and routes fitted with labels.

Nothing is trained twice: what lies in the folder of an earlier run is taken from there.
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

from shared_iopfl.comparison.tables import POOLED
from shared_iopfl.data.photographs.codings import coding_of
from shared_iopfl.federation.client import SiteClient
from shared_iopfl.federation.simulation import Federation
from shared_iopfl.inferers.baselines import labelled_routes
from shared_iopfl.models.files import GLOBAL, load_experts, load_weights, model_path, save_atomically
from shared_iopfl.utils.config_values import Expression, as_values
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.stacks import to_stack

EXPERTS = (0.8, 0.2, 0.0)  # where a site is left out, those inside need no test cases


@dataclass
class Trainings:
    """Trains for a :class:`~shared_iopfl.comparison.protocol.Comparison`, whose arguments of the same names these are.

    Args:
        bundle_root, dataset_dir, output_dir, rounds: of the comparison.
        training: overrides of the training config, for all trainings alike.
        server_momentum, own_rounds, shares: of every federation, as in :class:`Federation`.
        pooled: overrides of the pooled training.
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
        """Run a federation over some sites, or what is left of it, and return it."""
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
        """The folder of the models that these sites published; federated where that has not been done yet.

        Args:
            sites: of the federation.
            seed: of the network, the augmentation and the split.
            name: of another training than the comparison's own, of which only the global model is of interest.
            training: its overrides.
        """
        run = self.output_dir / f"seed{seed}" / (f"federation_{name}_" * bool(name) or "federation_")
        run = run.with_name(run.name + "+".join(sorted(sites)))
        if not (run / "models" / "scores.json").is_file():
            cases = "$splits.site_cases(@dataset_dir, @site, '{}', seed={:d}, fractions={}, patient=@patient)"
            data = {
                "train#dataset#data": Expression(cases.format("train", seed, EXPERTS)),
                "validate#dataset#data": Expression(cases.format("validation", seed, EXPERTS)),
            }
            own = {} if name else {"own_rounds": self.own_rounds, "shares": self.shares}
            self.federate(sites, seed, run, {**data, **(training or {})}, **own)
        return str(run / "models")

    def pool(self, sites: Sequence[str], seed: int, folder: Path, cases: str) -> str:
        """The model of one training on the cases of all these sites, for as many epochs as the federation has.

        Args:
            sites: whose training cases.
            seed: of network and augmentation.
            folder: of the model.
            cases: what gives the training cases of ``site``, as an expression of the training config.

        Returns:
            The model's path; it is not trained again where it is there.
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
                "ckpt_dir": str(folder / "unused"),  # where its own moving average goes
                "site": sites[0],
                "pooled_sites": list(sites),
                "seed": seed,
                "epochs": self.rounds,
                "train#dataset#data": Expression(f"$splits.pooled(@pooled_sites, lambda site: {cases})"),
                "validate#dataset#data": [],
                **(self.pooled or {}),
            }
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                client = SiteClient(self.bundle_root, sites[0], self.rounds, overrides)
            save_atomically(client.train(client.weights), path)
        return path

    def fit_with_labels(self, site: str, models: str) -> dict[str, Tensor]:
        """Routes fitted with the site's labels: what the best routes for the site as a whole could give."""
        parser = self._config(site)
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

    def _config(self, site: str) -> ConfigParser:
        parser = ConfigParser()
        parser.read_config(str(Path(self.bundle_root) / "configs" / "train.json"))
        data = Expression("$splits.site_cases(@dataset_dir, @site, 'all', patient=@patient)")
        overrides = {**self.training, "dataset_dir": self.dataset_dir, "site": site, "validate#dataset#data": data}
        parser.update(as_values({"bundle_root": self.bundle_root, **overrides}))
        return parser


def fine_tune(client: SiteClient, weights: Mapping[str, Tensor], rounds: int) -> dict[str, Tensor]:
    """Global weights trained further at a site, without averaging: at the tail's small rate once the run is over.

    The client is left as it was: its personalised model and all that survives an interruption.

    Args:
        client: of the site.
        weights: the global ones.
        rounds: of local training.

    Returns:
        The site's weights.
    """
    before, personalization = copy.deepcopy(client.state_dict()), client.kept["personalization"]
    path, personalization.save_path = personalization.save_path, None  # what is published is not this
    tuned = dict(weights)
    try:
        for _ in range(rounds):
            tuned = client.train(tuned)
    finally:
        personalization.save_path = path
        client.load_state_dict(before)
    return tuned


def keep_models(federation: Federation, kind: str, models: Path) -> None:
    """Each site's model of a training method, as a file of its own."""
    for site, client in federation.clients.items():
        weights: Mapping[str, Tensor] = federation.weights
        if kind == "norms":
            weights = client.kept["local_norms"].personal_state(federation.weights)
        elif kind == "ditto":
            weights = client.kept["ditto"].personal_state()
        save_atomically(dict(weights), model_path(str(models), "personalised", site))
