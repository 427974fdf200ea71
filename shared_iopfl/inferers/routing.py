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
"""The test-time routing inferer: a scan is routed through the experts and segmented."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from shared_iopfl.inferers.members import MeanOfNetworks, members_of
from shared_iopfl.inferers.self_training import SelfTraining, training_inputs
from shared_iopfl.inferers.start import BriefWeights, RoutedCopy, expert_of, find_start
from shared_iopfl.inferers.views import ViewsOfScans
from shared_iopfl.models.files import GLOBAL, USUAL_SHIFT
from shared_iopfl.models.manifest import SCORES
from shared_iopfl.routing.adaptation import Adaptation, Objective, mask_agreement, objection_to
from shared_iopfl.routing.distances import scan_distances
from shared_iopfl.routing.network import RoutedNetwork, collapse
from shared_iopfl.routing.objectives import Output
from shared_iopfl.routing.settings import LARGE_SHIFT, RoutingSettings
from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.stacks import SCAN_SLICES, Network, bounded, evenly, scan_slices

logger = logging.getLogger(__name__)
Mode = Literal["episodic", "site", "off"]
SITE_PIXELS = 2**21  # of the slices that a site's statistics are measured on, one forward: 128 of 128 x 128
SITE_SLICES = 128


class TestTimeRoutingInferer(ViewsOfScans):
    """Routes each scan through the space of the experts; see `RoutingSettings` for how.

    The network it is called with is the global model and stays untouched, as does the global random state; what a scan
    taught is forgotten after it, so that a mask depends on the scan, the experts and the seed alone. Calls from several
    threads are served one after another. Runs under ``no_grad`` and ``inference_mode`` alike.

    Args:
        experts: the personalised models, site -> state_dict; with the network's own weights, as "global", they are the
            routing space. None or empty: plain inference.
        mode: "episodic": adapt to each scan alone; "site": serve from the network that :meth:`fit` made of a site's
            scans; "off": plain inference.
        settings: see `RoutingSettings`.
        output: "softmax" for exclusive classes, "sigmoid" for overlapping targets.
        flips: spatial axes of the network input along which the anatomy may be mirrored.
        rotations: whether quarter turns fit the anatomy.
        scores: what the federation published (:func:`~shared_iopfl.models.files.load_scores`); the usual shift among
            it tells which shift is large: for ``statistics`` "auto", and for the review list.
        slices, batch_size: as in `StackInferer`; with routes a volume or the scan's own statistics, prediction takes a
            scan whole, so that its mask does not depend on the batch size.
        seed: of routers and views.
        objective: what adaptation minimises, in place of the objective of the settings: a module or function of the
            network, the images (N, C_in, *spatial) and a `View`, whose value is a scalar with gradient.

    Attributes:
        reports: what was done for the last scans (at most 1024), oldest first; see :meth:`route_scan`. In mode "site",
            how far the predictions that were averaged agree.
        usual_shift: inside the federation; 0 where it is unknown.
    """

    __test__ = False  # a name in the method's words, not a pytest class

    def __init__(
        self,
        experts: Mapping[str, Mapping[str, Tensor]] | None = None,
        mode: Mode = "episodic",
        settings: RoutingSettings | None = None,
        output: Output = "softmax",
        flips: Sequence[int] = (),
        rotations: bool = False,
        scores: Mapping[str, float] | None = None,
        slices: int | None = 3,
        batch_size: int = 16,
        seed: int = 0,
        objective: Objective | None = None,
    ) -> None:
        super().__init__(settings or RoutingSettings(), output, flips, rotations, slices, batch_size)
        check_values({"seed": seed})
        if mode not in get_args(Mode):
            raise InputError(f"unknown mode '{mode}': choose one of {', '.join(get_args(Mode))}.")
        if mode == "episodic" and self.settings.self_training:
            raise InputError("self-training learns from all scans of a site: choose mode 'site', or self_training=0.")
        self.mode: Mode = mode
        self.seed = seed
        self.experts: dict[str, Mapping[str, Tensor]] = {
            name: BriefWeights(state) for name, state in (experts or {}).items()
        }
        self.routed_copy = RoutedCopy(self.settings, seed)
        self.adaptation = Adaptation(self.settings, self.views, output, batch_size, seed, objective)
        self.usual_shift = (scores or {}).get(USUAL_SHIFT, 0.0)
        self.reports: deque[dict[str, Any]] = deque(maxlen=1024)
        self.site_network: nn.Module | None = None
        self.site_shift: float | None = None  # of the site as a whole, where `fit` measured it
        self._lock = threading.RLock()
        self._said: set[str] = set()  # what was warned of, each once: experts served as they are, no usual shift

    def __call__(self, inputs: Tensor, network: Network, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (B, C, *spatial) of scans (B, C_in, *spatial); each scan of the batch is routed on its own.

        Without experts the global model is the whole routing space, and statistics and views are as set.

        A network that is one expert among others was chosen as it is (a MONAI Label client names a site's model file):
        plain inference, which a warning says.

        Raises:
            InputError: naming the scan, where the logits are not finite.
        """
        if self.mode == "off":
            return super().__call__(inputs, network)
        if self.mode == "episodic" and (name := expert_of(network, self.experts)):
            if name not in self._said:
                logger.warning(
                    "the network is the model of '%s', an expert: plain inference by it, nothing is routed", name
                )
                self._said.add(name)
            return super().__call__(inputs, network)
        with self._lock:
            if self.mode == "site":
                if self.site_network is None:
                    raise InputError("mode 'site' needs a network of the site: give site_model, or call fit() first.")
                site = self.site_network.to(inputs.device)
                known = {"decision": "site", **({} if self.site_shift is None else {"shift": self.site_shift})}
                found = [
                    self._predict(stack, members_of(site), scan_slices(stack, SCAN_SLICES))
                    for stack in self.stacks(inputs)
                ]
                served = [(logits, {**known, **agreed}) for logits, agreed in found]
            elif isinstance(network, nn.Module):
                served = [self.route_scan(stack, network) for stack in self.stacks(inputs)]
            else:
                raise ValueError(f"test-time routing needs an nn.Module to route, but got {type(network).__name__}.")
            self.reports.extend(report for _, report in served if report)
            return self._join([output for output, _ in served], inputs)

    def route_scan(self, stack: Tensor, network: nn.Module) -> tuple[Tensor, dict[str, Any]]:
        """Route one scan.

        Args:
            stack: its network inputs (N, C_in, *spatial).
            network: the global model.

        Returns:
            Logits (N, C, *spatial), and a report: ``decision`` ("start" or "adapted"), ``reason``, ``experts``,
            ``layers``, ``routes`` (layers x experts), ``statistics`` (the shares of the scan's own), ``shift`` where
            it was measured, ``seconds``, ``areas`` and, where several predictions were averaged, ``quality`` (see
            :func:`~shared_iopfl.routing.objectives.view_agreement`), and where it was adapted ``objective_start``,
            ``objective_end``, ``agreement``.
        """
        began = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            stack = stack.clone()  # an inference tensor could not take part in adaptation
            some = scan_slices(stack, SCAN_SLICES)
            routed, report = self._begin([some], network)
            logits, agreed = self._predict(stack, self._networks(routed, some, report["statistics"]), some)
            report.update(agreed, routes=routed.last_routes().tolist())
            if self.settings.steps > 0:
                logits = self._adapt_guarded(routed, some, stack, logits, report)
            routed.reset()
        report["seconds"] = round(time.perf_counter() - began, 3)
        return logits, report

    def fit(self, scans: Iterable[Tensor], network: nn.Module) -> dict[str, Any]:
        """Make a network for a site from its unlabelled scans, and serve it in mode "site".

        Args:
            scans: batches (B, C_in, *spatial) of the site's scans.
            network: the global model.

        Returns:
            A report as from :meth:`route_scan`, for the site as a whole, with the number of ``scans``. The network is
            :attr:`site_network`: a plain one, or with several shares of statistics a `MeanOfNetworks`.

        Raises:
            InputError: where the settings leave no plain network (routes a sample or a volume).
        """
        settings = self.settings
        if settings.per != "layer":
            raise InputError(
                f"mode 'site' makes one plain network, but the routes differ from {settings.per} to {settings.per}: "
                "choose another preset than 'paper' (or routing setting per='layer'), or mode 'episodic'."
            )
        with self._lock, torch.inference_mode(False), torch.no_grad():
            began = time.perf_counter()
            stacks = [stack for batch in scans for stack in self.stacks(batch)]
            samples = [scan_slices(stack, SCAN_SLICES).clone() for stack in stacks]
            if not samples:
                raise InputError("mode 'site' needs at least one scan of the site; got none.")
            routed, report = self._begin(samples, network)
            some = evenly(torch.cat(samples), bounded(SITE_SLICES, samples[0], SITE_PIXELS))
            report["scans"] = len(samples)
            if settings.steps > 0:
                start, _ = self._predict(some, self._networks(routed, some, report["statistics"]))
                self._adapt_guarded(routed, some, some, start, report)
            members = list(self._networks(routed, some, report["statistics"]))
            report["routes"] = routed.last_routes().tolist()
            self.site_network = members[0] if len(members) == 1 else MeanOfNetworks(members, self.output)
            if settings.self_training:
                self.site_network = self._self_trained(members[-1], stacks, network, any(report["statistics"]))
                report.update(decision="self-trained", reason=f"{settings.self_training} steps on masks of the site")
            self.site_shift = report.get("shift")
            routed.reset()
            report["seconds"] = round(time.perf_counter() - began, 3)
        return report

    def _self_trained(self, start: nn.Module, stacks: Sequence[Tensor], network: nn.Module, own: bool) -> nn.Module:
        """A network that learned the masks which routing makes of each scan; `own`: statistics of the site as well."""
        steps = self.settings.self_training
        training = SelfTraining(steps, self.views, self.output, self.batch_size, self.seed)
        pairs = []
        for stack in stacks:
            count = training.inputs_per_scan(len(stacks), stack)
            pairs.append(training_inputs(stack, self.route_scan(stack, network)[0], count, self.output))
        images, targets = (torch.cat(parts) for parts in zip(*pairs))
        return training.train(start, images, targets, own)

    def _begin(self, samples: Sequence[Tensor], network: nn.Module) -> tuple[RoutedNetwork, dict[str, Any]]:
        """The routed network at its start for some slices of a scan, or of each of a site's; and the report so far."""
        space = {GLOBAL: network.state_dict(), **self.experts}
        routed = self.routed_copy.of(network, space, samples[0][len(samples[0]) // 2 :][:1])
        routes, shift = find_start(
            samples,
            lambda some, models: self._distances(some, network, models),
            space,
            self.settings,
            bool(routed.tracked_norms),
        )
        routed.start_from(routes)
        report: dict[str, Any] = {
            "decision": "start",
            "reason": "no adaptation asked for",
            "experts": list(routed.experts),
            "layers": list(routed.layers),
            **({} if shift is None else {"shift": round(shift, 4)}),
            "statistics": list(self._shares(routed, shift)),
        }
        return routed, report

    def _distances(self, some: Tensor, network: nn.Module, models: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """How far some slices of a scan are from each model (E,)."""
        return scan_distances(network, models, some, self.batch_size)

    def _shares(self, routed: RoutedNetwork, shift: float | None) -> tuple[float, ...]:
        """The shares of own statistics; a network without running ones uses its own whatever the setting."""
        is_far = shift is not None and 0 < LARGE_SHIFT * self.usual_shift < shift
        depends = shift is not None and self.settings.statistics == "auto" and routed.can_blend
        if depends and not self.usual_shift and USUAL_SHIFT not in self._said:
            logger.warning(
                "the models come with no '%s' (%s in their folder): statistics 'auto' cannot tell which scan is far "
                "from the training data, and all are segmented by the stored statistics alone",
                USUAL_SHIFT,
                SCORES,
            )
            self._said.add(USUAL_SHIFT)
        return self.settings.shares(is_far and routed.can_blend) if routed.tracked_norms else (0.0,)

    def _networks(self, routed: RoutedNetwork, some: Tensor, shares: Sequence[float]) -> Iterator[nn.Module]:
        """The network for each share of own statistics, each to be used before the next is asked for."""
        for share in shares:
            routed.set_statistics(share)
            yield self._plain_for(routed, some)

    def _plain_for(self, routed: RoutedNetwork, some: Tensor) -> nn.Module:
        """The plain network that a routed one is for a scan, known by some of its slices; plain speed, any batch size.

        Where the routes themselves depend on the slice (``per`` sample or volume) it stays as it is.
        """
        if self.settings.per != "layer":
            return routed
        if routed.blends:
            routed(some)
        return collapse(routed).eval()

    def _adapt_guarded(
        self, routed: RoutedNetwork, some: Tensor, stack: Tensor, start: Tensor, report: dict[str, Any]
    ) -> Tensor:
        """Adapt on some slices; return the logits of the stack, or those at the start where the guard says no."""
        shares = report["statistics"]
        routed.set_statistics(sum(shares) / len(shares))
        batches = list(self._batches(some, routed))
        before = self.adaptation.value(routed, batches)
        self.adaptation.adapt(routed, some)
        after = self.adaptation.value(routed, batches)
        logits, agreed = self._predict(stack, self._networks(routed, some, shares), some)
        agreement = mask_agreement(start, logits, self.output)
        report.update(objective_start=before, objective_end=after, agreement=agreement)
        objection = objection_to(logits, before, after, agreement, self.settings)
        if objection is None:
            report.update(agreed, decision="adapted", reason="objective improved")
            report["routes"] = routed.last_routes().tolist()
            return logits
        report["reason"] = objection
        routed.reset()
        return start
