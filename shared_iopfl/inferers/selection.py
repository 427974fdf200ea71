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
"""FedSM's inferer: a small classifier recognises the inside site that a scan resembles, whose model then segments it.

FedSM is the method of Xu et al., "Closing the Generalization Gap of Cross-silo Federated Medical Image Segmentation",
CVPR 2022 (arXiv 2203.10144). This follows the description; no code of the authors is used.
"""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets import DenseNet
from torch import Tensor, nn

from shared_iopfl.inferers.baselines import EnsembleInferer
from shared_iopfl.inferers.start import States
from shared_iopfl.models.files import GLOBAL
from shared_iopfl.models.weights import Weights, check_experts
from shared_iopfl.utils.checks import number
from shared_iopfl.utils.errors import InputError

SELECTOR = "selector"  # name of the inferer in ``baselines.json``
SELECTOR_FILE = "selector.pt"  # name of the selector's file beside the models


def site_classifier(channels: int, sites: int, seed: int = 0) -> nn.Module:
    """Make a small DenseNet that recognises the site of a network input; the global random state is not changed.

    It has group norm, because batch norm would normalise the images of each site by the site's own statistics during
    training, which hides how the sites differ.

    Args:
        channels: Number of channels of a network input.
        sites: Number of sites.
        seed: Seed of the weights.
    """
    norm = ("group", {"num_groups": 4})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DenseNet(2, channels, sites, init_features=16, growth_rate=8, block_config=(2, 2, 2), norm=norm)


class SelectorInferer(EnsembleInferer):
    """FedSM's model selector: each scan is segmented by the personalised model of the most probable site.

    The probability of a site is averaged over the slices of the scan. If the highest probability is below `gamma`, the
    global model segments the scan.

    Args:
        experts: Personalised models of all sites that the selector was trained on, site -> state_dict.
        selector: State of a `site_classifier`, whose classes are the sites in alphabetical order.
        gamma: Lowest probability for which a personalised model is used, in [0, 1]; the default is that of the authors'
            evaluation.
        kwargs: Arguments of `ScanInferer`.

    Raises:
        InputError: If the selector does not fit the sites, or gamma is out of range.
    """

    def __init__(self, experts: States, selector: Weights, gamma: float = 0.9, **kwargs: Any) -> None:
        super().__init__(experts, **kwargs)
        if not (rule := number(0, 1)).holds(gamma):
            raise InputError(f"gamma of the selector must be {rule.allowed}, but is {gamma}.")
        self.gamma = gamma
        self.sites = sorted(self.experts)
        first, *_, last = selector.values()
        if len(last) != len(self.sites):
            raise InputError(
                f"the selector knows {len(last)} sites, but there are personalised models of {len(self.sites)} "
                f"({', '.join(self.sites)}): use the models of all sites that it was trained on, or train it again."
            )
        self.selector = site_classifier(first.shape[1], len(self.sites)).eval().requires_grad_(False)
        check_experts(self.selector, {SELECTOR: selector})
        self.selector.load_state_dict(selector)

    def select(self, stack: Tensor) -> str:
        """Return the site whose model segments a scan, or "global".

        Args:
            stack: Network inputs (N, C_in, H, W) of the scan.
        """
        probability, site = self._forward(stack, self.selector.to(stack.device)).softmax(1).mean(0).max(0)
        return self.sites[int(site)] if probability >= self.gamma else GLOBAL

    def predict(self, stack: Tensor, network: nn.Module) -> Tensor:
        """Predict one scan; see :meth:`ScanInferer.predict`."""
        chosen = self.select(stack)
        (logits,) = self._each(stack, network, {chosen: self._space(network)[chosen]})
        return logits
