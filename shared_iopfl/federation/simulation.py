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
"""A federation in one process: rounds of FedAvg over one `MonaiAlgo` client per site.

It knows clients and weights, not images. Only local weights leave a client. Each client writes its personalised model
itself, next to the global one, because here all sites are on one machine.

A site that fails a round, or takes too long, is left out of that round and asked again in the next one. Code that does
not return can be ended only in a process of its own, by FLARE's time limits (``round_timeout`` in
`shared_iopfl.federation.flare.run`).
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from shared_iopfl.federation.averaging import average_updates
from shared_iopfl.federation.checkpoint import resume, save
from shared_iopfl.federation.client import SiteClient, time_limit
from shared_iopfl.federation.results import publish
from shared_iopfl.federation.state import FederationState
from shared_iopfl.federation.updates import (
    UPDATE_NORM,
    accepted_norms,
    check_update,
    draw,
    far_off,
    figures,
    update_norm,
)
from shared_iopfl.models.files import model_path
from shared_iopfl.models.weights import Weights
from shared_iopfl.utils.errors import InputError, root_input_error

logger = logging.getLogger(__name__)
UNFINISHED = "." + 12 * "[0-9a-f]" + "_*"  # files that a run was writing when it was killed; see `whole_file`


class Federation(FederationState):
    """The whole inside run: FedAvg over the sites, with a personalised model at each.

    Writes ``models/model.pt`` (global), ``models/model_<site>.pt`` (personalised) and ``models/scores.json`` (how
    each does at the other sites, and how far validation cases are from the global model), ``statistics.csv`` (the
    global model by its running statistics and by each site's own), ``history.csv``, ``failures.csv`` once a site has
    failed, TensorBoard events, and after every round ``federation.pt``, from which ``resume`` goes on to the weights of
    an undisturbed run. The one of the round before is kept too, as ``federation_previous.pt``, for a disk that spoils
    the newest.

    A site fails a round when its training raises or takes too long, or its update is refused: it is then as it was
    before, and asked again in the next one. The reason, which may name the site's files, stays in the log and in
    ``failures.csv``.

    Args:
        bundle_root: the bundle whose ``configs/train.json`` each site runs.
        sites: names of the inside sites.
        rounds: number of rounds.
        output_dir: where the files go.
        local_epochs: epochs a round.
        overrides: of the training config, the same for all sites; ``site`` and ``output_dir`` are set for each.
        val_interval: score both models on the sites' validation cases every so many rounds (and at the end); 0: never.
        min_sites: a round goes on without those that failed while at least so many deliver; 0: it takes all sites.
        max_update_norm: refuse an update that lies more than so many times as far from the global model as is usual; 0:
            no bound. See :func:`~shared_iopfl.federation.updates.far_off`. The default lets in ten times as many steps.
        averaging: "mean", "median" or "trimmed_mean"; see :func:`~shared_iopfl.federation.averaging.average_updates`.
        site_timeout: a site may take so many seconds for a round's training, and as many to score a model; 0: no limit.
            See :func:`~shared_iopfl.federation.client.time_limit` for what it can break off.
        own_rounds, shares: what each site makes of its personalised model once the last round is over; see
            :meth:`~shared_iopfl.federation.client.SiteClient.select_personalised`. 0 and none: the plain
            moving average.
        server_momentum: of the global weights from round to round; see
            :class:`~shared_iopfl.federation.averaging.ServerMomentum`. 0: plain averaging.
        resume: go on from ``federation.pt`` where there is one.
        seed: of the first global model.
        initial_model: Path of the global model from which the first round starts, such as the model of an earlier
            federation or of a smaller image size; empty: a new network. It must have the same architecture.
    """

    def start(self) -> None:
        """Make the clients (which reads and checks every site's training cases), and resume if asked to.

        Raises:
            InputError: naming what is wrong at each site where something is, before anything is trained.
        """
        faults: list[InputError] = []
        for path in self.output_dir.rglob(UNFINISHED):
            path.unlink()
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
                try:
                    self.clients[site] = SiteClient(self.bundle_root, site, self.local_epochs, overrides)
                except Exception as error:  # MONAI wraps what a transform raises
                    fault = root_input_error(error)
                    if fault is None:
                        raise
                    faults.append(fault)
        if faults:
            raise InputError("; ".join(dict.fromkeys(map(str, faults)))) from faults[0]
        self.weights = self.first_weights(self.clients[self.sites[0]].weights)
        if self.resume:
            resume(self)

    def run(self) -> dict[str, Tensor]:
        """Run the rounds that are left.

        Returns:
            The global weights.
        """
        self.start()
        with (
            _tensorboard(self.output_dir / "tensorboard") as board,
            tqdm(total=self.rounds, initial=self.round, desc="rounds", unit="round") as bar,
        ):
            while self.round < self.rounds:
                self.run_round(bar)
                try:
                    draw(board, (row for row in self.history if row["round"] == self.round))
                except OSError as error:
                    raise InputError(f"cannot write to {self.output_dir} ({error}): free space, then resume") from error
                bar.update()
        publish(self)
        return self.weights

    def run_round(self, bar: Any = None) -> None:
        """One round: every site trains from the global weights; their weights are checked and averaged."""
        self.round += 1
        before = {site: copy.deepcopy(client.state_dict()) for site, client in self.clients.items()}
        updates: dict[str, dict[str, Tensor]] = {}
        metrics: dict[str, dict[str, float]] = {}
        for site, client in self.clients.items():
            if bar is not None:
                bar.set_postfix_str(site)
            began = time.perf_counter()
            try:
                with time_limit(site, self.site_timeout):
                    update = client.train(self.weights)
                update = check_update(site, update, self.weights)
                metrics[site] = {**client.metrics(), "seconds": time.perf_counter() - began}
                updates[site] = update
            except Exception as error:
                self._leave_out(site, error, before[site])
        earlier = accepted_norms(self.history)
        for site, refusal in far_off(updates, self.weights, self.max_update_norm, earlier).items():
            del updates[site]
            self._leave_out(site, refusal, before[site])
        for site, update in updates.items():
            self._note(site, "local", {**metrics[site], UPDATE_NORM: update_norm(update, self.weights)})
        counts = {site: self.clients[site].cases for site in updates}
        average = average_updates(updates, counts, self.averaging)
        parameters = self.clients[self.sites[0]].parameters if self.server.momentum else ()
        self.weights = self.server.step(self.weights, average, parameters)
        if self.val_interval and (self.round % self.val_interval == 0 or self.round == self.rounds):
            for site in updates:
                client = self.clients[site]
                try:
                    self._note(site, "global", self._validate(site, self.weights))
                    self._note(site, "personalised", self._validate(site, client.personalised))
                except Exception as error:
                    self._leave_out(site, error, client.state_dict())
        save(self)

    def _validate(self, site: str, weights: Weights) -> dict[str, float]:
        with time_limit(site, self.site_timeout):
            return self.clients[site].validate(weights)

    def _leave_out(self, site: str, error: Exception, before: Mapping[str, Any]) -> None:
        """Note a failure, or raise if too few sites are left; and put the site back to where it was."""
        self.failures.add(self.round, site, error)
        self._note(site, "local", {"failed": 1.0})
        self.clients[site].load_state_dict(before)
        # what the refused round has left there; the site's next round, or the end of the run, writes it anew
        Path(model_path(str(self.output_dir / "models"), "personalised", site)).unlink(missing_ok=True)

    def _note(self, site: str, model: str, metrics: Mapping[str, float]) -> None:
        self.history += figures(self.round, site, model, metrics)


@contextmanager
def _tensorboard(folder: Path) -> Iterator[SummaryWriter]:
    try:
        board = SummaryWriter(str(folder))
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error}): free space, then resume") from error
    try:
        yield board
    finally:
        with suppress(OSError):  # where the disk is full, the run says so itself
            board.close()
