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
"""The controller of the rounds at the NVIDIA FLARE server.

The server needs this package but no data. It receives local weights and numbers. It checks and averages them with the
same functions as the one-process run, and in the same order of the sites, so that both give the same global weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.workflows.model_controller import ModelController
from torch import Tensor

from shared_iopfl.evaluation.run.provenance import report_to_nobody
from shared_iopfl.federation.averaging import Averaging, ServerMomentum, average_updates
from shared_iopfl.federation.flare.messages import COUNTED, LAST, SCORE, SELECT
from shared_iopfl.federation.results import expert_scores
from shared_iopfl.federation.updates import (
    FAILURES,
    UPDATE_NORM,
    accepted_norms,
    check_update,
    far_off,
    figures,
    update_norm,
)
from shared_iopfl.models.files import GLOBAL
from shared_iopfl.utils.errors import InputError

MOST_CASES = 1e9  # more than any site has; a site that claims more would determine the average alone


@dataclass(eq=False)
class Rounds(ModelController):
    """FedAvg over all sites: train, check and average, and let the sites score the result.

    FLARE's own `FedAvg` sums the updates in the order of their arrival, in single precision and including integer
    buffers. It waits for every site without a limit, or samples the sites at random, and does not score the last global
    model.

    A site that fails, does not answer in time or sends an update that does not fit is left out of the round. It is
    asked again in the next round, and continues from its last update that was averaged.

    Args:
        sites: Names of the sites, in the order in which they are averaged.
        rounds: Number of rounds.
        min_sites: A round with fewer usable updates ends the job.
        val_interval: Number of rounds between two scorings of both models; the last round is always scored. 0 scores
            none.
        max_update_norm: An update is refused if its distance from the global model is more than this number of times
            the usual one, see :func:`~shared_iopfl.federation.updates.far_off`; 0 sets no limit.
        server_momentum: Momentum of the global weights, as in one process.
        own_rounds, shares: How each site makes its personalised model after the last round, see
            :meth:`~shared_iopfl.federation.client.SiteClient.select_personalised`. With 0 and no shares, it is the
            moving average.
        round_timeout: Number of seconds for the training, and again for the scoring, after which a round continues
            without the sites that have not answered; 0 waits for all.
        publish: Whether to ask the sites for their final personalised models, and to let every site score those of the
            others. A site sends its model only if it allows this itself.
        averaging: "mean", "equal_mean", "median" or "trimmed_mean", see
            :func:`~shared_iopfl.federation.averaging.average_updates`.
    """

    sites: list[str]
    rounds: int
    min_sites: int
    val_interval: int = 1
    max_update_norm: float = 10.0
    server_momentum: float = 0.0
    own_rounds: int = 0
    shares: Sequence[float] = ()
    round_timeout: int = 0
    publish: bool = False
    averaging: Averaging = "mean"

    def __post_init__(self) -> None:
        """Set up the controller of FLARE."""
        super().__init__(ignore_result_error=True)
        report_to_nobody()  # MLflow may receive the metrics of the job
        self.round = 0
        self._answered: list[str] = []  # sites that sent an update in this round, usable or not

    def run(self) -> None:
        """Run the remaining rounds (FLARE's controller interface)."""
        model = self.load_model()
        model.total_rounds = self.rounds
        self.persistor.server = server = ServerMomentum(self.server_momentum)
        server.load_state_dict(self.persistor.state["server"])
        try:
            while self.persistor.round < self.rounds:
                self.round = self.persistor.round + 1
                self.info(f"Round {self.round} of {self.rounds}")
                model.current_round = self.round - 1  # FLARE counts from 0
                model.params = server.step(model.params, self._train(model), self.persistor.state["parameters"])
                if self.val_interval and (self.round % self.val_interval == 0 or self.round == self.rounds):
                    self._validate(model)
                self.save_model(model)
            if not self.persistor.state["selected"]:
                self._select(model)
        finally:
            self.persistor.save_tables(self.fl_ctx)

    def _train(self, model: FLModel) -> dict[str, Tensor]:
        """Let the sites train, and return the average of their local weights."""
        updates: dict[str, dict[str, Tensor]] = {}
        counts: dict[str, float] = {}
        metrics: dict[str, dict[str, float]] = {}
        replies = self._ask("train", model, self.sites)
        self._answered = list(replies)
        for site, reply in replies.items():
            with self._left_out_if_wrong(site):
                count = _number(reply.meta.get(FLMetaKey.NUM_STEPS_CURRENT_ROUND))
                if not 1 <= count <= MOST_CASES:
                    raise InputError(f"site '{site}' reports {count} training cases, which cannot be right.")
                update = check_update(site, reply.params, model.params)
                metrics[site] = _numbers(reply.metrics or {})
                updates[site], counts[site] = update, count
        earlier = accepted_norms(self.persistor.history)
        norms = {site: update_norm(update, model.params) for site, update in updates.items()}
        for site, refusal in far_off(norms, model.params, self.max_update_norm, earlier).items():
            del updates[site]
            self._fail(site, str(refusal))
        if len(updates) < self.min_sites:
            raise InputError(
                f"round {self.round}: {len(updates)} of {len(self.sites)} sites sent a usable update, fewer than "
                f"min_sites {self.min_sites}; {FAILURES} gives the reasons of the others."
            )
        for site in updates:
            self._note(site, "local", {**metrics[site], UPDATE_NORM: norms[site]})
        return average_updates(updates, counts, self.averaging)

    def _validate(self, model: FLModel) -> None:
        """Let the sites score the global model and their personalised models; only the metrics are sent.

        All sites that answered are asked, because the request also makes a site whose update was refused restore its
        earlier state. The metrics of such a site are of an older model and are left out.
        """
        counted = self.persistor.counted()
        for site, reply in self._ask(AppConstants.TASK_VALIDATION, model, self._answered).items():
            if counted.get(site) == self.round:
                with self._left_out_if_wrong(site):
                    for name, value in _numbers(reply.metrics).items():
                        whose, _, metric = name.partition("/")
                        if whose in ("global", "personalised"):  # rows of "local" limit and count the site's updates
                            self._note(site, whose, {metric: value})

    def _select(self, model: FLModel) -> None:
        """Let the sites with a personalised model select the final one, and report their validation cases' shift."""
        self.round = self.rounds
        model.current_round = self.rounds - 1
        counted = self.persistor.counted()
        sites = [site for site in self.sites if site in counted]
        shares, shifts, statistics, published = {}, {}, [], {}
        for site, reply in self._ask(AppConstants.TASK_VALIDATION, model, sites, SELECT).items():
            with self._left_out_if_wrong(site):
                if self.publish and reply.params:
                    published[site] = check_update(site, reply.params, model.params)
                if reply.meta.get("error"):  # the site keeps its moving average, as in one process
                    continue
                told = _numbers(reply.metrics)
                shares[site] = told["share"]
                if counted[site] == self.rounds:  # as in one process
                    if math.isfinite(told.get("shift", math.nan)):
                        shifts[site] = told["shift"]
                    if "global" in told and "own" in told:
                        statistics.append({"site": site, "global": told["global"], "own": told["own"]})
        dice: dict[str, dict[str, float]] = {}
        if self.publish:
            scorers = [site for site in shares if counted[site] == self.rounds and site not in self._failed()]
            dice = self._cross_site({GLOBAL: model.params, **published}, scorers)
            self.persistor.save_published(published, dice, self.fl_ctx)
        scores = expert_scores(dice, list(shifts.values()))
        self.persistor.save_selected(shares if self.shares else {}, scores, statistics, self.fl_ctx)

    def _cross_site(
        self, models: Mapping[str, Mapping[str, Tensor]], scorers: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Return the validation Dice of each model at the other sites; a site that fails scores no models."""
        dice: dict[str, dict[str, float]] = {}
        for name, weights in models.items():
            asked = FLModel(params=dict(weights), current_round=self.rounds - 1)
            others = [site for site in scorers if site != name and site not in self._failed()]
            dice[name] = {}
            for site, reply in self._ask(AppConstants.TASK_VALIDATION, asked, others, SCORE).items():
                with self._left_out_if_wrong(site):
                    dice[name][site] = _number(reply.metrics["dice"])
        failed = self._failed()
        return {name: {site: dice for site, dice in at.items() if site not in failed} for name, at in dice.items()}

    def _failed(self) -> set[str]:
        """The sites that have failed in this round."""
        return {row["site"] for row in self.persistor.failures if row["round"] == self.round}

    def _ask(self, task: str, model: FLModel, sites: Sequence[str], last: str = "") -> dict[str, FLModel]:
        """Ask some sites, and return their answers in the order of the sites.

        A site that does not answer, or fails, is recorded and left out. Only a site whose selection of the personalised
        model failed may have sent its moving average, and is not left out then.

        Args:
            task: FLARE's name of the task.
            model: What is sent with the task.
            sites: Names of the sites that are asked.
            last: SELECT or SCORE for the tasks after the last round, otherwise empty.
        """
        selects = last == SELECT
        there = {client.name for client in self.engine.get_clients()}
        targets = [site for site in sites if site in there]
        model.meta = {COUNTED: self.persistor.counted(), LAST: last}
        timeout = self.round_timeout * (max(1, self.own_rounds) if selects else 1)
        replies = []
        if targets:  # without targets, FLARE would ask all clients
            replies = self.send_model_and_wait(task_name=task, data=model, targets=targets, timeout=timeout)
        if self.abort_signal.triggered:
            raise InputError(f"round {self.round}: the job was aborted; resume it to continue.")
        by_site = {reply.meta["client_name"]: reply for reply in replies}
        answers = {}
        for site in sites:
            if site not in by_site:
                self._fail(site, f"no answer to '{task}'" + ("." if site in targets else ": it is not connected."))
            elif error := by_site[site].meta.get("error"):
                kind = str(error) if str(error).isidentifier() else "an error"  # the name of a class, no other text
                self._fail(site, f"{kind[:40]} at '{task}'; see training.log at the site.")
                if selects and by_site[site].params:
                    answers[site] = by_site[site]
            else:
                answers[site] = by_site[site]
        return answers

    @contextmanager
    def _left_out_if_wrong(self, site: str) -> Iterator[None]:
        """Record a failure of the site if its answer raises any exception, and continue with the other sites."""
        try:
            yield
        except Exception as error:
            self._fail(site, str(error))

    def _fail(self, site: str, reason: str) -> None:
        if site in self._failed():
            return  # the site may fail to train and then to score
        self.warning(f"Round {self.round}: site '{site}' is left out: {reason}")
        self.persistor.failures.append({"round": self.round, "site": site, "reason": reason})
        self._note(site, "local", {"failed": 1.0})

    def _note(self, site: str, model: str, metrics: Mapping[str, float]) -> None:
        self.persistor.history += figures(self.round, site, model, metrics)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: _number(value) for name, value in metrics.items()}


def _number(value: Any) -> float:
    """Return a number that a site sent besides weights; refuse anything else."""
    if isinstance(value, (bool, torch.Tensor)) or not isinstance(value, (int, float)) or math.isinf(value):
        raise InputError(f"a number is expected, but {type(value).__name__} {str(value)[:40]!r} was sent.")
    return float(value)
