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
"""A federation in one process: rounds of FedAvg with one `MonaiAlgo` client per site.

It knows clients and weights, but no images. Only local weights leave a client. The personalised models are kept in the
checkpoint, and written next to the global model at the end, because here all sites are on one machine.

A site that fails in a round, or takes too long, is left out of that round and asked again in the next one. Code that
never returns can be ended only if it runs in a process of its own, by the time limits of FLARE (``round_timeout`` in
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
from shared_iopfl.models.weights import Weights
from shared_iopfl.utils.errors import InputError, root_input_error

logger = logging.getLogger(__name__)
UNFINISHED = "." + 12 * "[0-9a-f]" + "_*"  # files that a run was writing when it was killed; see `whole_file`


class Federation(FederationState):
    """A whole inside run: FedAvg over the sites, with a personalised model for each site.

    It writes ``models/model.pt`` (global model), ``models/model_<site>.pt`` (personalised models),
    ``models/scores.json`` (how well each model does at the other sites, and the usual shift of validation cases),
    ``statistics.csv`` (the global model with its running statistics and with those of each site), ``history.csv``,
    ``failures.csv`` if a site has failed, and TensorBoard events. After every round it writes ``federation.pt``, from
    which ``resume`` continues to the same weights as those of an uninterrupted run. The checkpoint of the round before
    is kept as ``federation_previous.pt``, in case the newest one is damaged.

    A site fails in a round if its training raises an exception or takes too long, or if its update is refused. Its
    state is then restored to that before the round, and it is asked again in the next round. The reason, which may name
    files of the site, is written only to the log and to ``failures.csv``.

    Args:
        bundle_root: Folder of the bundle whose ``configs/train.json`` each site runs.
        sites: Names of the inside sites.
        rounds: Number of rounds.
        output_dir: Folder to write to.
        local_epochs: Number of epochs in a round.
        overrides: Overrides of the training config, the same for all sites; ``site`` and ``output_dir`` are set for
            each site.
        val_interval: Number of rounds between two scorings of both models on the sites' validation cases; the last
            round is always scored. 0 scores none.
        min_sites: A round continues without the sites that failed while at least this number of sites has not failed;
            0 requires all sites.
        max_update_norm: An update is refused if its distance from the global model is more than this number of times
            the usual one, see :func:`~shared_iopfl.federation.updates.far_off`; 0 sets no limit. The default accepts
            updates from ten times as many steps.
        averaging: "mean", "equal_mean", "median" or "trimmed_mean", see
            :func:`~shared_iopfl.federation.averaging.average_updates`.
        site_timeout: Largest number of seconds that a site may take for the training of a round, and again for the
            scoring of a model; 0 sets no limit. See :func:`~shared_iopfl.federation.client.time_limit` for what can be
            interrupted.
        own_rounds, shares: How each site makes its personalised model after the last round, see
            :meth:`~shared_iopfl.federation.client.SiteClient.select_personalised`. With 0 and no shares, it is the
            moving average.
        server_momentum: Momentum of the global weights, in [0, 1), see
            :class:`~shared_iopfl.federation.averaging.ServerMomentum`; 0 is plain averaging.
        resume: Whether to continue from ``federation.pt`` if it exists.
        seed: Seed of the first global model.
        initial_model: Path of the global model from which the first round starts, such as the model of an earlier
            federation or of a smaller image size; empty: a new network. It must have the same architecture.
    """

    def start(self) -> None:
        """Make the clients, which reads and checks the training cases of every site, and resume if requested.

        Raises:
            InputError: If anything is wrong at the sites; one message names all of it before any training.
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
                "personalised_file": None,  # the checkpoint has it
                "epochs": self.rounds * self.local_epochs,
            }
            # all sites, and repeated runs, start with the same network; the global random state is not changed
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                try:
                    self.clients[site] = SiteClient(self.bundle_root, site, self.local_epochs, overrides)
                except Exception as error:  # MONAI wraps the exceptions of transforms
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
        """Run the remaining rounds, and publish the models.

        Returns:
            The weights of the global model.
        """
        self.start()
        with (
            tensorboard(self.output_dir / "tensorboard") as board,
            tqdm(total=self.rounds, initial=self.round, desc="rounds", unit="round") as bar,
        ):
            while self.round < self.rounds:
                self.run_round(bar)
                draw(board, (row for row in self.history if row["round"] == self.round))
                bar.update()
        publish(self)
        return self.weights

    def run_round(self, bar: Any = None) -> None:
        """Run one round: every site trains from the global weights, and their weights are checked and averaged.

        Args:
            bar: Progress bar that shows the name of the site that is training.
        """
        self.round += 1
        # if any failure ends the run, no site continues from its state before the round
        tolerant = self.clients if self.failures.tolerated else {}
        before = {site: copy.deepcopy(client.state_dict()) for site, client in tolerant.items()}
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
                self._leave_out(site, error, before.get(site, {}))
        norms = {site: update_norm(update, self.weights) for site, update in updates.items()}
        earlier = accepted_norms(self.history)
        for site, refusal in far_off(norms, self.weights, self.max_update_norm, earlier).items():
            del updates[site]
            self._leave_out(site, refusal, before.get(site, {}))
        for site in updates:
            self._note(site, "local", {**metrics[site], UPDATE_NORM: norms[site]})
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
        """Record a failure, or raise if too few sites are left, and restore the state that the site had before."""
        self.failures.add(self.round, site, error)
        self._note(site, "local", {"failed": 1.0})
        self.clients[site].load_state_dict(before)

    def _note(self, site: str, model: str, metrics: Mapping[str, float]) -> None:
        self.history += figures(self.round, site, model, metrics)


@contextmanager
def tensorboard(folder: Path) -> Iterator[SummaryWriter]:
    """Open a writer of TensorBoard events, and close it at the end.

    Args:
        folder: Folder of the events.

    Raises:
        InputError: If the folder cannot be written to.
    """
    try:
        board = SummaryWriter(str(folder))
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error}): free space, then resume.") from error
    try:
        yield board
    finally:
        with suppress(OSError):  # if the disk is full, the run itself reports it
            board.close()
