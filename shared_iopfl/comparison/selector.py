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
"""Training of FedSM's selector: federated averaging of a classifier, where each site has images of one class only."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from monai.data.utils import set_rnd
from monai.utils import CommonKeys, convert_to_tensor
from torch import Tensor, nn

from shared_iopfl.federation.averaging import average_updates

STEPS, LEARNING_RATE = 4, 3e-3


def train_selector(network: nn.Module, loaders: Mapping[str, Any], rounds: int, seed: int = 0) -> dict[str, Tensor]:
    """Train a classifier of sites by rounds of federated averaging, in which all sites have the same weight.

    All images of a site have the same class, so that training at one site alone soon gives a network that names no
    other site. A round therefore has at most four steps, and the moments of Adam are averaged as the weights are, which
    the authors of FedSM found to be necessary. Nothing else would leave a site. Weighted by its number of cases, a
    large site would be named for most scans.

    Args:
        network: The classifier, which is trained in place. Its classes are the sites in alphabetical order.
        loaders: site -> loader of its training batches, with images (B, C, H, W) under "image"; it has a generator.
        rounds: Number of rounds.
        seed: Seed of shuffling and augmentation; the global random state is not changed.

    Returns:
        The state_dict of the network on the CPU.
    """
    sites = sorted(loaders)
    for site in sites:
        loaders[site].generator.manual_seed(seed)
        set_rnd(loaders[site].dataset, seed=seed)
    equal = dict.fromkeys(sites, 1.0)
    weights: Mapping[str, Tensor] = copy.deepcopy(network.state_dict())
    moments: dict[int, dict[str, Tensor]] = {}
    for _ in range(rounds):
        local_weights, local_moments = {}, {}
        for number, site in enumerate(sites):
            network.load_state_dict(weights)
            optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(moments)})
            for batch in islice(loaders[site], STEPS):
                _step(network, optimizer, batch[CommonKeys.IMAGE], number)
            local_weights[site] = copy.deepcopy(network.state_dict())
            local_moments[site] = optimizer.state_dict()["state"]
        weights = average_updates(local_weights, equal)
        moments = {
            index: average_updates({site: local_moments[site][index] for site in sites}, equal)
            for index in local_moments[sites[0]]
        }
    network.load_state_dict(weights)
    return {key: tensor.cpu() for key, tensor in weights.items()}


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, number: int) -> None:
    """One step on images of the site with this number."""
    device = next(network.parameters()).device
    images = convert_to_tensor(images, torch.float32, device, track_meta=False)
    optimizer.zero_grad()
    classes = torch.full((len(images),), number, device=device)
    nn.functional.cross_entropy(network(images), classes).backward()
    optimizer.step()
