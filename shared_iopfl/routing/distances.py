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
"""Distances of a scan from the experts by batch-norm statistics, and the routes that follow from them.

Forward passes only, no training. The batch norms of an expert store the statistics of its training data. A scan is run
through each expert once, and the statistics of each batch norm's *input* are compared with the stored ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from shared_iopfl.models.weights import copy_network
from shared_iopfl.routing.layers import channel_statistics
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.stacks import bounded

LEAST_SPREAD = 0.03  # of the mean distance: on real sites the experts' distances spread by 0.09 of it and more


class _Moments:
    """Sums over all that passes one batch norm, so that a volume's statistics do not depend on the batch size."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.squares = torch.zeros(channels, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor) -> None:
        mean, var = channel_statistics(inputs.float())
        count = inputs.numel() // inputs.shape[1]
        mean, var = mean.double(), var.double()
        self.count += count
        self.sum += count * mean
        self.squares += count * (var + mean**2)

    def variance(self) -> Tensor:
        mean = self.sum / self.count
        return (self.squares / self.count - mean**2).clamp_min(0)


@torch.no_grad()
def distribution_distance(
    network: nn.Module, experts: Mapping[str, Mapping[str, Tensor]], batches: Iterable[Tensor]
) -> Tensor:
    """The distance between a scan's features and the statistics stored in each expert's batch norms.

    For a batch norm with C channels: ``d = mean_c (log var_c(scan) - log running_var_c)^2``, as measured on real sites
    (squared log ratio of variances; the means added nothing). A constant channel, whose logarithm is unbounded, is
    counted with the largest distance of the others.

    Args:
        network: the architecture; untouched.
        experts: the routing space, name -> state_dict.
        batches: one scan's network inputs, in batches (B, C, *spatial); read once for each expert.

    Returns:
        Distances (E, N) of each expert at each of the N batch norms with running statistics that the scan passes, in
        the network's order.

    Raises:
        InputError: where the network has no batch norm with running statistics, or a variance is not valid.
    """
    # frozen, because autocast would keep the half-precision copies of the first expert's weights for all the others
    probe = copy_network(network).eval().requires_grad_(False)
    moments: dict[str, _Moments] = {}
    norms: dict[str, nn.modules.batchnorm._BatchNorm] = {}

    def watch(name: str, layer: nn.modules.batchnorm._BatchNorm) -> None:
        norms[name] = layer
        layer.register_forward_pre_hook(lambda _, inputs: moments[name].add(inputs[0]))

    for name, layer in probe.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_var is not None:
            watch(name, layer)
    if not norms:
        raise InputError(
            "distance routes need batch norms with running statistics, and the network has none: use start='uniform'."
        )
    batches = list(batches)
    rows, finite, names = [], [], []
    for expert, state in experts.items():
        probe.load_state_dict(state)
        moments.update({name: _Moments(layer.num_features, batches[0].device) for name, layer in norms.items()})
        for batch in batches:
            probe(batch)
        distances = []
        for name, layer in norms.items():
            if not moments[name].count:  # a branch that prediction leaves out
                continue
            remembered = state[f"{name}.running_var" if name else "running_var"].to(batches[0].device).double()
            seen = moments[name].variance()
            squares = (torch.log(seen + layer.eps) - torch.log(remembered + layer.eps)) ** 2
            # a channel that is constant, in the scan or in what is remembered, counts as the farthest other one
            alive = torch.minimum(seen, remembered) > layer.eps
            farthest = squares.masked_fill(~alive, 0).max()
            distances.append(torch.where(alive.any(), squares.minimum(farthest), squares).mean())
            finite.append(torch.isfinite(squares).all())
            names.append((name, expert))
        rows.append(torch.stack(distances))
    # one synchronisation for all: each one makes an accelerator wait
    if not (answers := torch.stack(finite).cpu()).all():
        name, expert = names[answers.tolist().index(False)]
        raise InputError(
            f"the features of a scan at '{name}' cannot be compared with those of the expert '{expert}': they, "
            "or the variances that it remembers, are no finite numbers from 0."
        )
    return torch.stack(rows).float().cpu()


def scan_distances(
    network: nn.Module, experts: Mapping[str, Mapping[str, Tensor]], slices: Tensor, batch_size: int
) -> Tensor:
    """How far a scan is from each expert (E,), the mean over the batch norms; the first expert's is the scan's shift.

    Inside, where the usual shift is measured, and outside, where a scan is held against it, this one function is used,
    on slices that :func:`~shared_iopfl.utils.stacks.scan_slices` takes.

    Args:
        network, experts: as for :func:`distribution_distance`.
        slices: of the scan (N, C_in, *spatial).
        batch_size: network inputs a forward, or fewer where they are large.
    """
    return distribution_distance(network, experts, slices.split(bounded(batch_size, slices))).mean(1)


def distance_routes(distances: Tensor, temperature: float = 1.0) -> Tensor:
    """Routes that lean on the nearest experts: ``softmax(-z / temperature)``.

    ``z`` is the distance, averaged over the batch norms and standardised over the experts: its difference from their
    mean m, divided by ``sqrt(spread^2 + (0.03 m)^2)``, so that differences which are small beside the distances
    themselves hardly move the routes, and equal distances not at all.

    Args:
        distances: (E,) or (E, N), from :func:`distribution_distance`; for a site, the mean over its scans.
        temperature: small: the nearest expert alone; large: the uniform mixture.

    Returns:
        Routes (E,) that sum to one; with equal distances, uniform.
    """
    mean = distances.reshape(len(distances), -1).mean(1)
    spread = mean.std(correction=0)
    unit = torch.hypot(spread, LEAST_SPREAD * mean.mean())
    z = (mean - mean.mean()) / unit if unit > 0 else torch.zeros_like(mean)
    return torch.softmax(-z / temperature, dim=0)
