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
"""A federation in one process: rounds of FedAvg over `MonaiAlgo` clients, one a site, and their personalised models.

Knows clients and weights, nothing of images. Only the local weights leave a client; its personalised model is written
by the client itself, next to the global one, because here both ends are one machine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from monai.fl.utils.exchange_object import ExchangeObject
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from shared_iopfl.errors import InputError
from shared_iopfl.models import GLOBAL, model_path, save_atomically
from shared_iopfl.tables import write_json, write_rows

__all__ = ["Federation", "SiteClient", "check_update", "weighted_average"]

logger = logging.getLogger(__name__)
Weights = Mapping[str, Tensor]
HISTORY = ("round", "site", "model", "metric", "value")


def check_update(site: str, update: Weights, reference: Weights, whose: str = "the global model") -> None:
    """Raise `InputError`, naming the site and the key, unless its weights are finite and of the reference's shapes."""
    difference = set(update) ^ set(reference)
    if difference:
        raise InputError(f"site '{site}' sent other keys than {whose}: '{min(difference)}' is in one of them only.")
    for key, tensor in update.items():
        if tensor.shape != reference[key].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(reference[key].shape)} as {whose}"
            raise InputError(f"site '{site}' sent '{key}' of shape {shapes}.")
        if not torch.isfinite(tensor).all():
            raise InputError(f"site '{site}' sent NaN or infinite values in '{key}'.")


def weighted_average(updates: Mapping[str, Weights], counts: Mapping[str, float]) -> dict[str, Tensor]:
    """FedAvg: the mean of the sites' weights, each weighed by its number of training cases.

    Summed in double precision in the order of `updates`; integer buffers (batch-norm counters) stay integers and are
    the first site's.

    Args:
        updates: site -> state_dict.
        counts: site -> positive number.

    Raises:
        InputError: naming the site whose update differs from the first one's in keys or shapes, or is not finite.
    """
    if not updates:
        raise InputError("nothing to average: no site sent an update.")
    total = float(sum(counts[site] for site in updates))
    if not all(counts[site] > 0 for site in updates):
        raise InputError(f"the sites' numbers of cases must be positive, but are {dict(counts)}.")
    first, reference = next(iter(updates.items()))
    for site, update in updates.items():
        check_update(site, update, reference, f"'{first}'")
    average = {}
    for key, like in reference.items():
        if like.is_floating_point():
            mean = sum(update[key].double() * (counts[site] / total) for site, update in updates.items())
            average[key] = torch.as_tensor(mean).to(like.dtype)
        else:
            average[key] = like.clone()
    return average


class SiteClient:
    """One site's `MonaiAlgo` on the bundle's training config, and what of it has to survive an interruption.

    Args:
        bundle_root: the bundle.
        site: the site's name.
        local_epochs: epochs a round.
        overrides: of the training config, id -> value.
    """

    def __init__(self, bundle_root: str, site: str, local_epochs: int, overrides: Mapping[str, Any]) -> None:
        self.site = site
        self.algo = MonaiAlgo(
            bundle_root=bundle_root,
            local_epochs=local_epochs,
            send_weight_diff=False,
            train_kwargs=dict(overrides),
            config_evaluate_filename="configs/train.json",
            eval_kwargs=dict(overrides),
        )
        self.algo.initialize({ExtraItems.CLIENT_NAME: site})
        parser = self.algo.train_workflow.parser  # type: ignore[union-attr]
        self.cases = len(parser.get_parsed_content("train#dataset#data"))
        state = parser.get_parsed_content("round_state")
        # what the site keeps from round to round, by name; a handler that is switched off is None
        self.kept: dict[str, Any] = {name: item for name, item in state.items() if item is not None}

    @property
    def personalised(self) -> dict[str, Tensor]:
        """The personalised model; read by the client and for its own scoring only."""
        return self.kept["personalization"].ema_model.state_dict()

    def train(self, weights: Weights) -> dict[str, Tensor]:
        """One round: global weights in, local weights out (copies, on the CPU)."""
        self.algo.train(ExchangeObject(weights=dict(weights)))
        update = self.algo.get_weights().weights
        return {key: tensor.clone() for key, tensor in update.items()}

    def metrics(self) -> dict[str, float]:
        """Of the last round's local training."""
        trainer: Any = self.algo.trainer
        rate = self.kept["optimizer"].param_groups[0]["lr"]
        return {**{name: float(value) for name, value in trainer.state.metrics.items()}, "learning_rate": float(rate)}

    def validate(self, weights: Weights) -> dict[str, float]:
        """The site's validation metrics of any weights."""
        result = self.algo.evaluate(ExchangeObject(weights=dict(weights))).metrics
        return {name: float(value) for name, value in (result or {}).items()}

    def state_dict(self) -> dict[str, Any]:
        trainer: Any = self.algo.trainer
        kept = {name: item.state_dict() for name, item in self.kept.items()}
        scaler = getattr(trainer, "scaler_", None)
        return {
            "epoch": trainer.state.epoch,
            "iteration": trainer.state.iteration,
            "scaler": scaler.state_dict() if scaler is not None else {},
            "kept": kept,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        trainer: Any = self.algo.trainer
        trainer.state.epoch, trainer.state.iteration = state["epoch"], state["iteration"]
        scaler = getattr(trainer, "scaler_", None)
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        for name, item in self.kept.items():
            item.load_state_dict(state["kept"][name])


class Federation:
    """The whole inside run: FedAvg over the sites, with a personalised model at each.

    Writes ``models/model.pt`` (global), ``models/model_<site>.pt`` (personalised) and ``models/scores.json`` (mean
    validation Dice of each at the other sites, for distance routes that trust good experts), ``history.csv``,
    TensorBoard events, and after every round ``federation.pt``, from which ``resume`` goes on to the weights of an
    undisturbed run.

    Args:
        bundle_root: the bundle whose ``configs/train.json`` each site runs.
        sites: names of the inside sites.
        rounds: number of rounds.
        output_dir: where the files go.
        local_epochs: epochs a round.
        overrides: of the training config, the same for all sites; ``site`` and ``output_dir`` are set for each.
        val_interval: score both models on the sites' validation cases every so many rounds (and at the end); 0: never.
        resume: go on from ``federation.pt`` where there is one.
        seed: of the first global model.
    """

    def __init__(
        self,
        bundle_root: str,
        sites: Sequence[str],
        rounds: int,
        output_dir: str,
        local_epochs: int = 1,
        overrides: Mapping[str, Any] | None = None,
        val_interval: int = 1,
        resume: bool = False,
        seed: int = 0,
    ) -> None:
        if isinstance(sites, str) or not sites or len(set(sites)) != len(sites):
            raise InputError(f"sites must be a list of different names, such as \"['BIDMC','HK']\", but is {sites!r}.")
        if rounds < 1 or local_epochs < 1:
            raise InputError(f"rounds and local_epochs must be at least 1, but are {rounds} and {local_epochs}.")
        self.bundle_root = bundle_root
        self.sites = list(sites)
        self.rounds = rounds
        self.output_dir = Path(output_dir)
        self.local_epochs = local_epochs
        self.overrides = dict(overrides or {})
        self.val_interval = val_interval
        self.resume = resume
        self.seed = seed
        self.round = 0
        self.weights: dict[str, Tensor] = {}
        self.clients: dict[str, SiteClient] = {}
        self.history: list[dict[str, Any]] = []

    @property
    def checkpoint(self) -> Path:
        return self.output_dir / "federation.pt"

    def start(self) -> None:
        """Make the clients (which reads and checks every site's training cases), and resume if asked to."""
        for site in tqdm(self.sites, desc="sites", unit="site"):
            overrides = {
                **self.overrides,
                "site": site,
                "output_dir": str(self.output_dir / "sites" / site),
                "ckpt_dir": str(self.output_dir / "models"),
                "epochs": self.rounds * self.local_epochs,
            }
            # all sites, and every run, begin with the same network; the random state outside is left as it was
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                self.clients[site] = SiteClient(self.bundle_root, site, self.local_epochs, overrides)
        first = self.clients[self.sites[0]].algo
        self.weights = {k: v.detach().cpu().clone() for k, v in first.trainer.network.state_dict().items()}  # type: ignore[union-attr]
        if self.resume and self.checkpoint.is_file():
            self._load()

    def run(self) -> dict[str, Tensor]:
        """Run the rounds that are left.

        Returns:
            The global weights.
        """
        self.start()
        with (
            SummaryWriter(str(self.output_dir / "tensorboard")) as board,
            tqdm(total=self.rounds, initial=self.round, desc="rounds", unit="round") as bar,
        ):
            while self.round < self.rounds:
                self.run_round(bar)
                for row in self.history:
                    if row["round"] == self.round:
                        board.add_scalar(f"{row['metric']}/{row['model']}_{row['site']}", row["value"], self.round)
                bar.update()
        self._publish()
        return self.weights

    def run_round(self, bar: Any = None) -> None:
        """One round: every site trains from the global weights; their weights are checked and averaged."""
        self.round += 1
        updates: dict[str, dict[str, Tensor]] = {}
        for site, client in self.clients.items():
            if bar is not None:
                bar.set_postfix_str(site)
            began = time.perf_counter()
            updates[site] = client.train(self.weights)
            self._note(site, "local", {**client.metrics(), "seconds": time.perf_counter() - began})
        self.weights = weighted_average(updates, {site: client.cases for site, client in self.clients.items()})
        if self.val_interval and (self.round % self.val_interval == 0 or self.round == self.rounds):
            for site, client in self.clients.items():
                self._note(site, "global", client.validate(self.weights))
                self._note(site, "personalised", client.validate(client.personalised))
        self._save()

    def _note(self, site: str, model: str, metrics: Mapping[str, float]) -> None:
        for metric, value in metrics.items():
            self.history.append(
                {"round": self.round, "site": site, "model": model, "metric": metric, "value": float(value)}
            )

    def settings(self) -> dict[str, Any]:
        """What has to be the same when a run is resumed; folders and the device may change."""
        training = {
            key: list(value) if isinstance(value, (list, tuple)) else value
            for key, value in self.overrides.items()
            if isinstance(value, (bool, int, float, str, list, tuple)) and key not in ("dataset_dir", "device")
        }
        own = {"sites": self.sites, "rounds": self.rounds, "local_epochs": self.local_epochs, "seed": self.seed}
        return {**training, **own}

    def _save(self) -> None:
        # the history first: a run interrupted between the two does this round again, and writes it again
        write_rows(self.output_dir / "history.csv", HISTORY, self.history)
        save_atomically(
            {
                "settings": self.settings(),
                "round": self.round,
                "weights": self.weights,
                "clients": {site: client.state_dict() for site, client in self.clients.items()},
                "history": self.history,
            },
            self.checkpoint,
        )

    def _load(self) -> None:
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            settings = state["settings"]
        except Exception as error:
            raise InputError(
                f"cannot read {self.checkpoint} ({type(error).__name__}); remove it to start anew."
            ) from error
        for name, value in self.settings().items():
            if settings.get(name) != value:
                raise InputError(
                    f"{self.checkpoint} was begun with {name} {settings.get(name)}, now it is {value}; "
                    "resume with the same, or choose another output folder."
                )
        self.round, self.weights, self.history = state["round"], state["weights"], list(state["history"])
        for site, client in self.clients.items():
            client.load_state_dict(state["clients"][site])
        logger.info("resumed after round %d", self.round)

    def _publish(self) -> None:
        """Write the models, and how each of them does at the inside sites it was not made for."""
        folder = self.output_dir / "models"
        models = {GLOBAL: self.weights, **{site: client.personalised for site, client in self.clients.items()}}
        for name, weights in models.items():
            path = model_path(str(folder), GLOBAL if name == GLOBAL else "personalised", name)
            save_atomically({key: tensor.cpu() for key, tensor in weights.items()}, path)
        write_json(folder / "scores.json", {name: self._score(name, weights) for name, weights in models.items()})

    def _score(self, name: str, weights: Weights) -> float | None:
        """Mean validation Dice over the sites other than a model's own: whether it can be trusted elsewhere."""
        others = [client.validate(weights)["val_mean_dice"] for site, client in self.clients.items() if site != name]
        return sum(others) / len(others) if others else None
