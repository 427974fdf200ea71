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
"""The test-time routing inferer, which routes a scan through the experts and segments it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from shared_iopfl.inferers.members import MeanOfNetworks, members_of
from shared_iopfl.inferers.self_training import SelfTraining
from shared_iopfl.inferers.start import BriefWeights, RoutedCopy, States, expert_of, find_start
from shared_iopfl.inferers.views import ViewsOfScans
from shared_iopfl.models.files import GLOBAL, USUAL_SHIFT
from shared_iopfl.models.manifest import SCORES
from shared_iopfl.models.weights import Weights
from shared_iopfl.routing.adaptation import Adaptation, Objective
from shared_iopfl.routing.distances import scan_distances
from shared_iopfl.routing.network import RoutedNetwork
from shared_iopfl.routing.objectives import Output
from shared_iopfl.routing.settings import LARGE_SHIFT, RoutingSettings
from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.stacks import SCAN_SLICES, Network, bounded, evenly, scan_slices

logger = logging.getLogger(__name__)
Mode = Literal["episodic", "site", "off"]
# bounds on the slices that the statistics of a site are measured on, in one forward: 128 slices of 128 x 128
SITE_SLICES, SITE_PIXELS = 128, 2**21


class TestTimeRoutingInferer(ViewsOfScans):
    """Routes each scan through the space of the experts, as `RoutingSettings` describe.

    The inferer is called with the global model. Neither this network nor the global random state is changed, and after
    a scan everything that was learnt from it is discarded, so that a mask depends only on the scan, the experts and the
    seed. Calls from several threads are processed one after another.

    Args:
        experts: Personalised models, site -> state_dict; with the weights of the network, as "global", they are the
            routing space. None or empty: the routing space is the global model alone.
        mode: "episodic": each scan is routed on its own; "site": the network that :meth:`fit` made from the scans of a
            site segments all of them; "off": plain inference.
        settings: Settings of the routing; None for the defaults.
        output: "softmax" for exclusive classes, "sigmoid" for overlapping targets.
        flips: Spatial axes of the network input along which the anatomy may be mirrored.
        rotations: Whether quarter turns fit the anatomy.
        scores: Published scores of the models, from :func:`~shared_iopfl.models.files.load_scores`. They contain the
            usual shift, which defines a large shift for ``statistics`` "auto" and for the review list.
        slices: Neighbouring slices per network input, as in `StackInferer`.
        batch_size: Network inputs per forward, as in `StackInferer`. With routes per volume or with statistics of the
            scan, all inputs of a scan are in one forward, so that its mask does not depend on the batch size.
        seed: Seed of routers and views.
        objective: Objective of adaptation, which replaces that of the settings: a module or function of the network,
            the images (N, C_in, *spatial) and a `View`, whose value is a scalar with gradient.

    Attributes:
        reports: Reports of the last scans (at most 1024), oldest first; see :meth:`route_scan`.
        site_network: Network of the site, in mode "site".
        usual_shift: Usual shift of the inside sites; 0 if it is unknown.
    """

    __test__ = False  # tells pytest that this is not a class of tests

    def __init__(
        self,
        experts: States | None = None,
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
        self.experts: dict[str, Weights] = {name: BriefWeights(state) for name, state in (experts or {}).items()}
        self.routed_copy = RoutedCopy(self.settings, seed)
        self.adaptation = Adaptation(self.settings, self.views, output, batch_size, seed, objective)
        self.usual_shift = (scores or {}).get(USUAL_SHIFT, 0.0)
        self.reports: deque[dict[str, Any]] = deque(maxlen=1024)
        self.site_network: nn.Module | None = None
        self.site_shift: float | None = None  # mean shift of the scans of the site, if `fit` measured it
        self._lock = threading.RLock()
        self._warned: set[str] = set()  # experts and missing figures of which one warning has been given

    def __call__(self, inputs: Tensor, network: Network, *args: Any, **kwargs: Any) -> Tensor:
        """Segment scans, each of which is routed on its own.

        If the network is itself one of several experts (a MONAI Label client names the model file of a site), it was
        chosen on purpose: inference with it is plain, and a warning says so.

        Args:
            inputs: Scans (B, C_in, *spatial).
            network: Global model; with mode "off" any function of network inputs.
            args: Not used.
            kwargs: Not used.

        Returns:
            Logits (B, C, *spatial).

        Raises:
            InputError: If the logits are not finite; the message names the scan.
        """
        if self.mode == "off":
            return super().__call__(inputs, network)
        if self.mode == "episodic" and (name := expert_of(network, self.experts)):
            if name not in self._warned:
                logger.warning("the network is the model of '%s', an expert: plain inference, without routing", name)
                self._warned.add(name)
            return super().__call__(inputs, network)
        with self._lock:
            if self.mode == "site":
                served = [self._predict_for_site(stack) for stack in self.stacks(inputs)]
            elif isinstance(network, nn.Module):
                served = [self.route_scan(stack, network) for stack in self.stacks(inputs)]
            else:
                raise ValueError(f"test-time routing needs an nn.Module to route, but got {type(network).__name__}.")
            self.reports.extend(report for _, report in served)
            return self._join([output for output, _ in served], inputs)

    def route_scan(self, stack: Tensor, network: nn.Module) -> tuple[Tensor, dict[str, Any]]:
        """Route and segment one scan.

        Args:
            stack: Network inputs (N, C_in, *spatial) of the scan.
            network: Global model.

        Returns:
            Logits (N, C, *spatial), and a report: ``decision`` ("start" or "adapted"), ``reason``, ``experts``,
            ``layers``, ``routes`` (layers x experts), ``statistics`` (shares of the scan's own), ``seconds``,
            ``areas``; ``shift`` if it was measured; ``quality`` if there were several predictions (see
            :func:`~shared_iopfl.routing.objectives.view_agreement`); and after adaptation ``objective_start``,
            ``objective_end``, ``agreement``.
        """
        began = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            stack = stack.clone()  # autograd, in adaptation, does not accept inference tensors
            some = scan_slices(stack, SCAN_SLICES)
            routed, report = self._begin([some], network)
            logits, predicted = self._predict(stack, self._networks(routed, some, report["statistics"]), some)
            report.update(predicted, routes=routed.last_routes().tolist())
            if self.settings.steps > 0:
                logits = self._adapt(routed, some, stack, logits, report)
            routed.reset()
        report["seconds"] = round(time.perf_counter() - began, 3)
        return logits, report

    def fit(self, scans: Iterable[Tensor], network: nn.Module) -> dict[str, Any]:
        """Make the network of a site from its unlabelled scans, for mode "site".

        The result is in :attr:`site_network`: a plain network or, for several shares of statistics, a `MeanOfNetworks`.

        Args:
            scans: Scans of the site, in batches (B, C_in, *spatial).
            network: Global model.

        Returns:
            A report as from :meth:`route_scan`, for the site as a whole, with the number of ``scans``.

        Raises:
            InputError: If there is no scan, or the routes differ between samples or volumes.
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
            shares = report["statistics"]
            if settings.steps > 0:
                start, _ = self._predict(some, self._networks(routed, some, shares))
                self._adapt(routed, some, some, start, report)
            members = list(self._networks(routed, some, shares))
            report["routes"] = routed.last_routes().tolist()
            self.site_network = members[0] if len(members) == 1 else MeanOfNetworks(members, self.output)
            if settings.self_training:
                training = SelfTraining(settings.self_training, self.views, self.output, self.batch_size, self.seed)
                self.site_network = training.train_on(
                    members[-1], stacks, lambda stack: self.route_scan(stack, network)[0], any(shares)
                )
                report.update(decision="self-trained", reason=f"{settings.self_training} steps on masks of the site")
            self.site_shift = report.get("shift")
            routed.reset()
            report["seconds"] = round(time.perf_counter() - began, 3)
        return report

    def _predict_for_site(self, stack: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The logits (N, C, *spatial) of one scan by the network of the site, and a report."""
        if self.site_network is None:
            raise InputError("mode 'site' needs a network of the site: give site_model, or call fit() first.")
        networks = members_of(self.site_network.to(stack.device))
        logits, predicted = self._predict(stack, networks, scan_slices(stack, SCAN_SLICES))
        shift = {} if self.site_shift is None else {"shift": self.site_shift}
        return logits, {"decision": "site", **shift, **predicted}

    def _begin(self, samples: Sequence[Tensor], network: nn.Module) -> tuple[RoutedNetwork, dict[str, Any]]:
        """The routed network at its starting routes for slices of each scan, and the first part of the report."""
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
        return routed, {
            "decision": "start",
            "reason": "no adaptation was requested",
            "experts": list(routed.experts),
            "layers": list(routed.layers),
            **({} if shift is None else {"shift": round(shift, 4)}),
            "statistics": list(self._shares(routed, shift)),
        }

    def _distances(self, some: Tensor, network: nn.Module, models: States) -> Tensor:
        """The distance of a scan, by some of its slices, from each model (E,)."""
        return scan_distances(network, models, some, self.batch_size)

    def _shares(self, routed: RoutedNetwork, shift: float | None) -> tuple[float, ...]:
        """The shares of the scan's own statistics; a network without running ones uses its own for any setting."""
        is_far = shift is not None and 0 < LARGE_SHIFT * self.usual_shift < shift
        depends = shift is not None and self.settings.statistics == "auto" and routed.can_blend
        if depends and not self.usual_shift and USUAL_SHIFT not in self._warned:
            logger.warning(
                "the models come without '%s' (%s in their folder): statistics 'auto' cannot tell which scan is far "
                "from the training data, and all are segmented by the stored statistics alone",
                USUAL_SHIFT,
                SCORES,
            )
            self._warned.add(USUAL_SHIFT)
        return self.settings.shares(is_far and routed.can_blend) if routed.tracked_norms else (0.0,)

    def _adapt(
        self, routed: RoutedNetwork, some: Tensor, stack: Tensor, start: Tensor, report: dict[str, Any]
    ) -> Tensor:
        """Adapt on some slices; return the logits of the stack and update the report; see `Adaptation.guarded`."""
        shares = report["statistics"]
        routed.set_statistics(sum(shares) / len(shares))
        batches = list(self._batches(some, routed))
        logits, outcome = self.adaptation.guarded(
            routed, some, batches, start, lambda: self._predict(stack, self._networks(routed, some, shares), some)
        )
        report.update(outcome)
        return logits
