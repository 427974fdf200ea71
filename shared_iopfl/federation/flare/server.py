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
"""The controller at the NVIDIA FLARE server: the rounds.

The server needs this package but no data. It receives local weights and numbers, and checks and averages them with the
functions of the one-process run, in the order of the sites: both engines give the same global weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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

MOST_CASES = 1e9  # more than any site has: what claims more would be the average


@dataclass(eq=False)
class Rounds(ModelController):
    """FedAvg over all the sites: train, check, average, and have the sites score what came out.

    FLARE's own `FedAvg` sums updates in the order of their arrival, in single precision, including integer buffers;
    waits for every site without a limit, or samples the sites at random; and does not score the last global model.

    A site that fails, does not answer in time or sends an update that does not fit is left out of the round. It is
    asked again in the next one, and continues from its last update that was averaged.

    Args:
        sites: the sites, in the order in which they are averaged.
        rounds: number of rounds.
        min_sites: a round with fewer usable updates ends the job.
        val_interval: have both models scored every so many rounds (and at the end); 0: never.
        max_update_norm: refuse updates that lie so many times as far off as is usual; 0: no bound. See
            :func:`~shared_iopfl.federation.updates.far_off`.
        server_momentum: of the global weights, as in one process.
        own_rounds, shares: what each site makes of its personalised model after the last round; see
            :meth:`~shared_iopfl.federation.client.SiteClient.select_personalised`. 0 and none: the plain
            moving average.
        round_timeout: seconds to train, and again to score, after which a round goes on without those who have not
            answered; 0: wait for all.
        publish: ask the sites for their final personalised models, and have every site score those of the others. A
            site sends its own only if it allows that itself.
        averaging: "mean", "median" or "trimmed_mean"; see :func:`~shared_iopfl.federation.averaging.average_updates`.
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
        """Set FLARE's controller up."""
        super().__init__(ignore_result_error=True)
        report_to_nobody()  # the receiver of a tracked job is MLflow's
        self.round = 0
        self._answered: list[str] = []  # in this round, with whatever update

    def run(self) -> None:
        """Run the rounds that are left (FLARE's controller interface)."""
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
        """The average of the sites' local weights."""
        updates: dict[str, dict[str, Tensor]] = {}
        counts: dict[str, float] = {}
        metrics: dict[str, dict[str, float]] = {}
        replies = self._ask("train", model, self.sites)
        self._answered = list(replies)
        for site, reply in replies.items():
            try:
                count = _number(reply.meta.get(FLMetaKey.NUM_STEPS_CURRENT_ROUND))
                if not 1 <= count <= MOST_CASES:
                    raise InputError(f"site '{site}' says that it has {count} training cases.")
                update = check_update(site, reply.params, model.params)
                metrics[site] = {name: _number(value) for name, value in (reply.metrics or {}).items()}
            except Exception as error:  # whatever a site sends, the others go on
                self._fail(site, str(error))
                continue
            updates[site], counts[site] = update, count
        earlier = accepted_norms(self.persistor.history)
        for site, refusal in far_off(updates, model.params, self.max_update_norm, earlier).items():
            del updates[site]
            self._fail(site, str(refusal))
        if len(updates) < self.min_sites:
            raise InputError(
                f"round {self.round}: {len(updates)} of {len(self.sites)} sites sent a usable update, fewer than "
                f"min_sites {self.min_sites}; {FAILURES} tells what became of the others."
            )
        for site, update in updates.items():
            self._note(site, "local", {**metrics[site], UPDATE_NORM: update_norm(update, model.params)})
        return average_updates(updates, counts, self.averaging)

    def _validate(self, model: FLModel) -> None:
        """The sites score the global model and their personalised ones; only the figures come here.

        All sites that answered are asked, because the request also makes a site whose update was refused restore its
        earlier state. The figures of such a site belong to an older model and are left out.
        """
        counted = self.persistor.counted()
        for site, reply in self._ask(AppConstants.TASK_VALIDATION, model, self._answered).items():
            if counted.get(site) != self.round:
                continue
            try:
                metrics = {name: _number(value) for name, value in reply.metrics.items()}
            except Exception as error:
                self._fail(site, str(error))
                continue
            for name, value in metrics.items():
                whose, _, metric = name.partition("/")
                if whose in ("global", "personalised"):  # what is noted of "local" bounds and counts a site's updates
                    self._note(site, whose, {metric: value})

    def _select(self, model: FLModel) -> None:
        """Every site with a personalised model selects its final one, and reports the shift of its validation cases."""
        self.round = self.rounds
        model.current_round = self.rounds - 1
        counted = self.persistor.counted()
        sites = [site for site in self.sites if site in counted]
        shares, shifts, statistics, published = {}, {}, [], {}
        for site, reply in self._ask(AppConstants.TASK_VALIDATION, model, sites, SELECT).items():
            try:
                if self.publish and reply.params:
                    published[site] = check_update(site, reply.params, model.params)
                if reply.meta.get("error"):  # the moving average stays, as in one process
                    continue
                told = {name: _number(value) for name, value in reply.metrics.items()}
                shares[site] = told["share"]
            except Exception as error:
                self._fail(site, str(error))
                continue
            if counted[site] == self.rounds:  # as in one process
                if math.isfinite(told.get("shift", math.nan)):
                    shifts[site] = told["shift"]
                if "global" in told and "own" in told:
                    statistics.append({"site": site, "global": told["global"], "own": told["own"]})
        dice: dict[str, dict[str, float]] = {}
        if self.publish:
            judges = [site for site in shares if counted[site] == self.rounds and site not in self._failed()]
            dice = self._cross_site({GLOBAL: model.params, **published}, judges)
            self.persistor.save_published(published, dice, self.fl_ctx)
        scores = expert_scores(dice, list(shifts.values()))
        self.persistor.save_selected(shares if self.shares else {}, scores, statistics, self.fl_ctx)

    def _cross_site(
        self, models: Mapping[str, Mapping[str, Tensor]], judges: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        """Validation Dice of each model at the sites that it was not made for; a site that fails judges nothing."""
        dice: dict[str, dict[str, float]] = {}
        for name, weights in models.items():
            asked = FLModel(params=dict(weights), current_round=self.rounds - 1)
            others = [site for site in judges if site != name and site not in self._failed()]
            dice[name] = {}
            for site, reply in self._ask(AppConstants.TASK_VALIDATION, asked, others, SCORE).items():
                try:
                    dice[name][site] = _number(reply.metrics["dice"])
                except Exception as error:
                    self._fail(site, str(error))
        failed = self._failed()
        return {name: {site: dice for site, dice in at.items() if site not in failed} for name, at in dice.items()}

    def _failed(self) -> set[str]:
        """The sites that have failed in this round."""
        return {row["site"] for row in self.persistor.failures if row["round"] == self.round}

    def _ask(self, task: str, model: FLModel, sites: Sequence[str], last: str = "") -> dict[str, FLModel]:
        """The answers of some sites, in their order; one that has none, or fails, is noted and left out.

        A site whose settling failed is noted and may have sent its moving average all the same.

        Args:
            task: FLARE's name of it.
            model: sent with it.
            sites: that are asked.
            last: which of the tasks after the last round it is: SELECT or SCORE.
        """
        selects = last == SELECT
        there = {client.name for client in self.engine.get_clients()}
        targets = [site for site in sites if site in there]
        model.meta = {COUNTED: self.persistor.counted(), LAST: last}
        timeout = self.round_timeout * (max(1, self.own_rounds) if selects else 1)
        replies = []
        if targets:  # to FLARE, no targets are all clients
            replies = self.send_model_and_wait(task_name=task, data=model, targets=targets, timeout=timeout)
        if self.abort_signal.triggered:
            raise InputError(f"round {self.round}: the job was ended from outside.")
        by_site = {reply.meta["client_name"]: reply for reply in replies}
        answers = {}
        for site in sites:
            if site not in by_site:
                self._fail(site, f"no answer to '{task}'" + ("." if site in targets else ": it is not connected."))
            elif error := by_site[site].meta.get("error"):
                kind = str(error) if str(error).isidentifier() else "an error"  # a class's name, not any text
                self._fail(site, f"{kind[:40]} at '{task}'; the site's own training.log tells more.")
                if selects and by_site[site].params:
                    answers[site] = by_site[site]
            else:
                answers[site] = by_site[site]
        return answers

    def _fail(self, site: str, reason: str) -> None:
        if site in self._failed():
            return  # it failed to train, and then to score
        self.warning(f"Round {self.round}: site '{site}' is left out: {reason}")
        self.persistor.failures.append({"round": self.round, "site": site, "reason": reason})
        self._note(site, "local", {"failed": 1.0})

    def _note(self, site: str, model: str, metrics: Mapping[str, float]) -> None:
        self.persistor.history += figures(self.round, site, model, metrics)


def _number(value: Any) -> float:
    """A number that a site sent besides weights; anything else is refused."""
    if isinstance(value, (bool, torch.Tensor)) or not isinstance(value, (int, float)) or math.isinf(value):
        raise InputError(f"a number is expected, but {type(value).__name__} {str(value)[:40]!r} was sent.")
    return float(value)
