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
"""Inferers of the other outside methods: views, ensemble, batch statistics, TENT and DaWin; and routes from labels.

Further outside methods (soup, AdaMerging) are settings of `TestTimeRoutingInferer`, in ``compare.json``. The inside
methods are in :mod:`shared_iopfl.handlers.methods`.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared_iopfl.inferers.start import States
from shared_iopfl.inferers.views import check_output
from shared_iopfl.models.files import GLOBAL
from shared_iopfl.models.weights import Weights, check_experts, copy_network
from shared_iopfl.routing.adaptation import descend
from shared_iopfl.routing.network import RoutedNetwork, collapse, route
from shared_iopfl.routing.objectives import Output, ViewSampler, entropy, is_square, mean_prediction, probabilities
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.stacks import Network, StackInferer, evenly


class ScanInferer(StackInferer):
    """Segments one scan after another; neither the network nor the global random state is changed.

    Args:
        output: "softmax" for exclusive classes, "sigmoid" for overlapping targets.
        slices: Neighbouring slices per network input, as in `StackInferer`.
        batch_size: Network inputs per forward, as in `StackInferer`.
    """

    def __init__(self, output: Output = "softmax", slices: int | None = 3, batch_size: int = 16) -> None:
        super().__init__(slices, batch_size)
        self.output = check_output(output)
        # the recorders of an evaluation read both: no scan is routed, and there is nothing to report
        self.mode = "off"
        self.reports: deque[dict[str, Any]] = deque()
        self._checked: weakref.ref[nn.Module] | None = None

    def __call__(self, inputs: Tensor, network: Network, *args: Any, **kwargs: Any) -> Tensor:
        """Return logits (B, C, *spatial) of scans (B, C_in, *spatial)."""
        if not isinstance(network, nn.Module):
            raise ValueError(f"{type(self).__name__} needs an nn.Module, but got {type(network).__name__}.")
        with torch.inference_mode(False), torch.no_grad():
            return self._join([self.predict(stack, network) for stack in self.stacks(inputs)], inputs)

    def predict(self, stack: Tensor, network: nn.Module) -> Tensor:
        """Predict one scan.

        Args:
            stack: Network inputs (N, C_in, *spatial) of the scan.
            network: Global model.

        Returns:
            Logits (N, C, *spatial).
        """
        raise NotImplementedError

    def _route(self, stack: Tensor, network: nn.Module, experts: States, **settings: Any) -> RoutedNetwork:
        """The routed network, which is compared with the plain one at the first scan; see `check_routed`."""
        is_checked = self._checked is not None and self._checked() is network
        routed = route(network, experts, sample=None if is_checked else stack, **settings)
        self._checked = weakref.ref(network)
        return routed


class ViewsInferer(ScanInferer):
    """Test-time augmentation: the mean probability over all flips and turns that fit the anatomy.

    Args:
        flips: Spatial axes of the network input along which the anatomy may be mirrored.
        rotations: Whether quarter turns fit the anatomy.
        kwargs: Arguments of `ScanInferer`.
    """

    def __init__(self, flips: Sequence[int] = (), rotations: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.views = ViewSampler(tuple(flips), rotations)

    def predict(self, stack: Tensor, network: nn.Module) -> Tensor:
        """Predict one scan; see :meth:`ScanInferer.predict`."""
        plain = copy_network(network).eval()
        views = self.views.all(is_square(stack))
        return mean_prediction([view.undo(self._forward(view.apply(stack), plain)) for view in views], self.output)


class EnsembleInferer(ScanInferer):
    """The mean of the probabilities of the global model and of each personalised model.

    Args:
        experts: Personalised models, site -> state_dict.
        kwargs: Arguments of `ScanInferer`.
    """

    def __init__(self, experts: States | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.experts = dict(experts or {})

    def predict(self, stack: Tensor, network: nn.Module) -> Tensor:
        """Predict one scan; see :meth:`ScanInferer.predict`."""
        return mean_prediction(self._each(stack, network, self._space(network)), self.output)

    def _space(self, network: nn.Module) -> dict[str, Weights]:
        return {GLOBAL: network.state_dict(), **self.experts}

    def _each(self, stack: Tensor, network: nn.Module, space: States) -> list[Tensor]:
        """The logits of each expert of a routing space."""
        check_experts(network, space)
        # frozen, because autocast would keep the half-precision copies of the first expert's weights for all the others
        expert = copy_network(network).eval().requires_grad_(False)
        outputs = []
        for state in space.values():
            expert.load_state_dict(state)
            outputs.append(self._forward(stack, expert))
        return outputs


class DaWinInferer(EnsembleInferer):
    """DaWin (Oh et al. 2024): for each scan, the weights of the experts are mixed by the entropy of their predictions.

    ``r = softmax(-H / temperature)``, where H is the mean entropy of an expert's own prediction. In a segmentation all
    experts are certain of most pixels, so that the entropies differ little and the mixture at temperature 1 is close to
    uniform.

    Args:
        experts: Personalised models, site -> state_dict.
        temperature: A small value selects the most certain expert alone.
        kwargs: Arguments of `ScanInferer`.
    """

    def __init__(self, experts: States | None = None, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(experts, **kwargs)
        self.temperature = temperature

    def predict(self, stack: Tensor, network: nn.Module) -> Tensor:
        """Predict one scan; see :meth:`ScanInferer.predict`."""
        outputs = self._each(stack, network, self._space(network))
        entropies = torch.stack([entropy(probabilities(logits, self.output), self.output) for logits in outputs])
        routes = torch.softmax(-entropies / self.temperature, dim=0)
        return self._forward(stack, collapse(self._route(stack, network, self._space(network)), routes).eval())


class BatchStatisticsInferer(ScanInferer):
    """The global model with the scan's own batch-norm statistics (Nado et al. 2020) or blended ones.

    Blended statistics lie between those of the scan and the running ones (Schneider et al. 2020).

    Args:
        share: Share of the scan's own statistics, in [0, 1]; the rest are the running ones.
        adapt_slices: Largest number of slices, evenly spaced, that the statistics are measured on.
        kwargs: Arguments of `ScanInferer`.
    """

    def __init__(self, share: float = 1.0, adapt_slices: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= share <= 1:
            raise InputError(f"the share of the scan's own statistics must be from 0 to 1, but is {share}.")
        self.share = share
        self.adapt_slices = adapt_slices

    def predict(self, stack: Tensor, network: nn.Module) -> Tensor:
        """Predict one scan; see :meth:`ScanInferer.predict`."""
        return self._forward(stack, self.adapted(stack, network))

    def adapted(self, stack: Tensor, network: nn.Module) -> nn.Module:
        """Return the plain network for one scan, whose mask does not depend on the batch size.

        Args:
            stack: Network inputs (N, C_in, *spatial) of the scan.
            network: Global model.
        """
        # with a single expert, only the norm layers of the routed network change
        routed = self._route(stack, network, {GLOBAL: network.state_dict()}, affine=True, statistics=self.share)
        some = evenly(stack, self.adapt_slices)
        self._learn(routed, some)
        routed(some)
        return collapse(routed).eval()

    def _learn(self, routed: RoutedNetwork, images: Tensor) -> None:
        """Train the routed network on the scan, in subclasses."""


class TentInferer(BatchStatisticsInferer):
    """TENT (Wang et al. 2021), episodic: the norm layers of the global model are trained on each scan.

    Batch norm uses the statistics of the scan. Adam changes the weight and bias of the norm layers to lower the entropy
    of the prediction, with one batch per step; the result is discarded after the scan.

    Args:
        steps: Number of steps.
        learning_rate: Learning rate of Adam.
        kwargs: Arguments of `BatchStatisticsInferer`.
    """

    def __init__(self, steps: int = 10, learning_rate: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.steps = steps
        self.learning_rate = learning_rate

    def _learn(self, routed: RoutedNetwork, images: Tensor) -> None:
        def step(batch: Tensor) -> None:
            entropy(probabilities(routed(batch), self.output), self.output).backward()

        descend(routed, images, step, self.steps, self.batch_size, self.learning_rate)


def labelled_routes(
    network: nn.Module,
    experts: States,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    steps: int = 200,
    learning_rate: float = 0.05,
) -> dict[str, Tensor]:
    """Fit one set of routes per layer for a site with its labels: a bound for methods that have no labels.

    Args:
        network: Network that defines the architecture; it is not changed.
        experts: Routing space, name -> state_dict, with the global model.
        batches: Images (B, C_in, *spatial) and labels (B, C, *spatial) of the site, at the network's resolution.
        loss: Training loss, a function of logits and labels.
        steps: Number of steps; each uses the next batch.
        learning_rate: Learning rate of Adam for the logits of the routes, which decreases to 0.

    Returns:
        The state_dict of the plain network with these routes.
    """
    batches = list(batches)
    if not batches:
        raise InputError("labelled routes need at least one labelled batch of the site; got none.")
    with torch.inference_mode(False), torch.enable_grad():
        routed = route(network, experts, per="layer", sample=batches[0][0])
        optimizer = torch.optim.Adam(routed.trainable(), lr=learning_rate)
        # decreasing, because the last batch would otherwise dominate
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for step in range(steps):
            images, labels = batches[step % len(batches)]
            optimizer.zero_grad()
            loss(routed(images), labels).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        routed(batches[0][0])  # updates the routes, which `collapse` takes from the last forward
        return {key: tensor.detach() for key, tensor in collapse(routed).state_dict().items()}
