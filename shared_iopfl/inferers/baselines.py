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
"""Inferers of the other outside methods: views, ensemble, batch statistics, TENT, DaWin; routes from labels.

Outside, without labels, as inferers that are called as `StackInferer` is: views, ensemble, batch-norm statistics, TENT,
DaWin; and with labels, as a bound, :func:`labelled_routes`. Others (soup, AdaMerging) are settings of
`TestTimeRoutingInferer`, in ``compare.json``. The methods inside are in :mod:`shared_iopfl.handlers.methods`.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared_iopfl.inferers.views import check_output
from shared_iopfl.models.files import GLOBAL
from shared_iopfl.models.weights import Weights, check_experts, copy_network
from shared_iopfl.routing.adaptation import descend
from shared_iopfl.routing.network import RoutedNetwork, collapse, route
from shared_iopfl.routing.objectives import Output, ViewSampler, entropy, is_square, mean_prediction, probabilities
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.stacks import Network, StackInferer, evenly

States = Mapping[str, Weights]


class ScanInferer(StackInferer):
    """Serves one scan after the other; nothing of it stays, and neither network nor random state is touched.

    Args:
        output: "softmax" for exclusive classes, "sigmoid" for overlapping targets.
        slices, batch_size: as in `StackInferer`.
    """

    def __init__(self, output: Output = "softmax", slices: int | None = 3, batch_size: int = 16) -> None:
        super().__init__(slices, batch_size)
        self.output = check_output(output)
        self.mode = "off"  # what the recorders of an evaluation ask of an inferer: nothing is routed,
        self.reports: deque[dict[str, Any]] = deque()  # nothing to report
        self._checked: weakref.ref[nn.Module] | None = None

    def __call__(self, inputs: Tensor, network: Network, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (B, C, *spatial) of scans (B, C_in, *spatial)."""
        if not isinstance(network, nn.Module):
            raise ValueError(f"{type(self).__name__} needs an nn.Module, but got {type(network).__name__}.")
        with torch.inference_mode(False), torch.no_grad():
            return self._join([self.predict(stack, network) for stack in self.stacks(inputs)], inputs)

    def predict(self, stack: Tensor, network: nn.Module) -> Tensor:
        """Logits (N, C, *spatial) of one scan's network inputs (N, C_in, *spatial)."""
        raise NotImplementedError

    def _route(self, stack: Tensor, network: nn.Module, experts: States, **settings: Any) -> RoutedNetwork:
        """The routed network, held against the plain one at the first scan that passes: see `check_routed`."""
        known = self._checked is not None and self._checked() is network
        routed = route(network, experts, sample=None if known else stack, **settings)
        self._checked = weakref.ref(network)
        return routed


class ViewsInferer(ScanInferer):
    """Test-time augmentation: the network's mean probability over all flips and turns that fit the anatomy.

    Args:
        flips: spatial axes of the network input along which the anatomy may be mirrored.
        rotations: whether quarter turns fit the anatomy.
        output, slices, batch_size: as in `ScanInferer`.
    """

    def __init__(self, flips: Sequence[int] = (), rotations: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.views = ViewSampler(tuple(flips), rotations)

    def predict(self, stack: Tensor, network: nn.Module) -> Tensor:
        """Logits (N, C, *spatial) of a stack of network inputs (N, C_in, *spatial)."""
        plain = copy_network(network).eval()
        views = self.views.all(is_square(stack))
        return mean_prediction([view.undo(self._forward(view.apply(stack), plain)) for view in views], self.output)


class EnsembleInferer(ScanInferer):
    """The mean probability of the global model and all experts, each run on its own.

    Args:
        experts: the personalised models, site -> state_dict.
        output, slices, batch_size: as in `ScanInferer`.
    """

    def __init__(self, experts: States | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.experts = dict(experts or {})

    def predict(self, stack: Tensor, network: nn.Module) -> Tensor:
        """Logits (N, C, *spatial) of a stack of network inputs (N, C_in, *spatial)."""
        return mean_prediction(self._each(stack, network), self.output)

    def _space(self, network: nn.Module) -> dict[str, Mapping[str, Tensor]]:
        return {GLOBAL: network.state_dict(), **self.experts}

    def _each(self, stack: Tensor, network: nn.Module) -> list[Tensor]:
        """Every expert's own logits."""
        check_experts(network, self._space(network))
        # frozen, because autocast would keep the half-precision copies of the first expert's weights for all the others
        expert = copy_network(network).eval().requires_grad_(False)
        outputs = []
        for state in self._space(network).values():
            expert.load_state_dict(state)
            outputs.append(self._forward(stack, expert))
        return outputs


class DaWinInferer(EnsembleInferer):
    """DaWin (Oh et al. 2024): weights mixed for each scan by how sure each expert is of it; forward only.

    ``r = softmax(-H / temperature)`` with H the mean entropy of an expert's own prediction. In a segmentation most
    pixels are sure whatever the expert, the entropies differ little, and at temperature 1 the mixture is close to
    uniform.

    Args:
        experts: the personalised models, site -> state_dict.
        temperature: small leans on the surest expert alone.
        output, slices, batch_size: as in `ScanInferer`.
    """

    def __init__(self, experts: States | None = None, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(experts, **kwargs)
        self.temperature = temperature

    def predict(self, stack: Tensor, network: nn.Module) -> Tensor:
        """Logits (N, C, *spatial) of a stack of network inputs (N, C_in, *spatial)."""
        outputs = self._each(stack, network)
        doubt = torch.stack([entropy(probabilities(logits, self.output), self.output) for logits in outputs])
        routes = torch.softmax(-doubt / self.temperature, dim=0)
        return self._forward(stack, collapse(self._route(stack, network, self._space(network)), routes).eval())


class BatchStatisticsInferer(ScanInferer):
    """The global model with batch norm by the scan's own statistics (Nado et al. 2020), or blended (Schneider et al.).

    Args:
        share: of the scan's own statistics, in [0, 1]; the rest is the running ones'.
        adapt_slices: the statistics are those of at most this many of its slices, evenly spaced.
        output, slices, batch_size: as in `ScanInferer`.
    """

    def __init__(self, share: float = 1.0, adapt_slices: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= share <= 1:
            raise InputError(f"the share of the scan's own statistics must be from 0 to 1, but is {share}.")
        self.share = share
        self.adapt_slices = adapt_slices

    def predict(self, stack: Tensor, network: nn.Module) -> Tensor:
        """Logits (N, C, *spatial) of a stack of network inputs (N, C_in, *spatial)."""
        return self._forward(stack, self.adapted(stack, network))

    def adapted(self, stack: Tensor, network: nn.Module) -> nn.Module:
        """The plain network that the global one becomes for a scan; any batch size gives the same mask."""
        # a space of one expert: there is nothing to route, only its norm layers to blend and to shift
        space = {GLOBAL: network.state_dict()}
        routed = self._route(stack, network, space, affine=True, statistics=self.share)
        some = evenly(stack, self.adapt_slices)
        self._learn(routed, some)
        routed(some)
        return collapse(routed).eval()

    def _learn(self, routed: RoutedNetwork, images: Tensor) -> None:
        """Train the routed network on the scan; nothing here."""


class TentInferer(BatchStatisticsInferer):
    """TENT (Wang et al. 2021), episodic: the norm layers of the global model learn to be sure of the scan at hand.

    Batch norm goes by the scan's statistics; the norm layers' weight and bias are trained by Adam to lower the entropy
    of the prediction, a batch a step, and forgotten after the scan.

    Args:
        steps: of the optimiser.
        learning_rate: of Adam.
        share, adapt_slices, output, slices, batch_size: as in `BatchStatisticsInferer`.
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
    """The bound: one set of layer-wise routes for a site, fitted with its labels. No hospital outside could do it.

    Args:
        network: the architecture; untouched.
        experts: the routing space, name -> state_dict, the global model among them.
        batches: the site's (images, labels) at the network's resolution, (B, C_in, *spatial) and (B, C, *spatial).
        loss: of training, from logits and labels.
        steps: of the optimiser, a batch each, all in turn.
        learning_rate: of Adam, for the logits of the routes; falls to 0.

    Returns:
        The state of the plain network that the routes make.
    """
    batches = list(batches)
    if not batches:
        raise InputError("labelled routes need at least one labelled batch of the site; got none.")
    with torch.inference_mode(False), torch.enable_grad():
        routed = route(network, experts, per="layer", sample=batches[0][0])
        optimizer = torch.optim.Adam(routed.trainable(), lr=learning_rate)
        # otherwise the last batch would dominate
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for step in range(steps):
            images, labels = batches[step % len(batches)]
            optimizer.zero_grad()
            loss(routed(images), labels).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        routed(batches[0][0])  # the routes after the last step
        return {key: tensor.detach() for key, tensor in collapse(routed).state_dict().items()}
