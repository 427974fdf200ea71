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

The batch norms of an expert store the statistics of the features that it was trained on. A scan is passed through each
expert once, without training, and the statistics of each batch norm's *input* are compared with the stored ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from shared_iopfl.models.weights import Weights, copy_network
from shared_iopfl.routing.layers import batch_norms, channel_statistics
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.stacks import bounded

LEAST_SPREAD = 0.03  # as a fraction of the mean distance; between experts of real sites the spread is 0.09 or more


class _Moments:
    """Sums over all inputs of a batch norm, so that the statistics of a volume do not depend on the batch size."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.squares = torch.zeros(channels, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor) -> None:
        mean, var = (each.double() for each in channel_statistics(inputs.float()))
        count = inputs.numel() // inputs.shape[1]
        self.count += count
        self.sum += count * mean
        self.squares += count * (var + mean**2)

    def variance(self) -> Tensor:
        mean = self.sum / self.count
        return (self.squares / self.count - mean**2).clamp_min(0)


@torch.no_grad()
def distribution_distance(network: nn.Module, experts: Mapping[str, Weights], batches: Iterable[Tensor]) -> Tensor:
    """Compute the distances between a scan's features and the statistics stored in each expert's batch norms.

    For a batch norm with C channels, ``d = mean_c (log var_c(scan) - log running_var_c)^2``. On real sites the squared
    log ratio of the variances was measured to be enough; the means did not improve the routes. For a constant channel,
    whose logarithm is unbounded, the largest distance of the other channels is used.

    Args:
        network: Network that defines the architecture; it is not changed.
        experts: Routing space, name -> state_dict.
        batches: Network inputs of one scan, in batches (B, C, *spatial).

    Returns:
        Distances (E, N) of each expert at each of the N batch norms with running statistics that the scan passes, in
        the order of the network.

    Raises:
        InputError: If the network has no batch norm with running statistics, or a variance is not valid.
    """
    # frozen, because autocast would keep the half-precision copies of the first expert's weights for all the others
    probe = copy_network(network).eval().requires_grad_(False)
    moments: dict[str, _Moments] = {}
    norms = batch_norms(probe)
    for name, layer in norms.items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: moments[name].add(inputs[0]))
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
            if not moments[name].count:  # the layer is in a branch that a forward in evaluation mode leaves out
                continue
            stored = state[f"{name}.running_var" if name else "running_var"].to(batches[0].device).double()
            seen = moments[name].variance()
            squares = (torch.log(seen + layer.eps) - torch.log(stored + layer.eps)) ** 2
            is_alive = torch.minimum(seen, stored) > layer.eps
            farthest = squares.masked_fill(~is_alive, 0).max()
            distances.append(torch.where(is_alive.any(), squares.minimum(farthest), squares).mean())
            finite.append(torch.isfinite(squares).all())
            names.append((name, expert))
        rows.append(torch.stack(distances))
    # one transfer for all answers, because an accelerator waits at each
    if not (answers := torch.stack(finite).cpu()).all():
        name, expert = names[answers.tolist().index(False)]
        raise InputError(
            f"the features of a scan at '{name}' cannot be compared with those of the expert '{expert}': some of them, "
            "or of the stored variances, are negative or not finite; check the scan, or download the models again."
        )
    return torch.stack(rows).float().cpu()


def scan_distances(network: nn.Module, experts: Mapping[str, Weights], slices: Tensor, batch_size: int) -> Tensor:
    """Compute the distance of a scan from each expert, as the mean over the batch norms.

    The distance from the first expert, the global model, is the scan's shift. The same function measures the usual
    shift inside and the shift of a scan outside, on the slices that :func:`~shared_iopfl.utils.stacks.scan_slices`
    selects, so that both can be compared.

    Args:
        network: Network that defines the architecture; it is not changed.
        experts: Routing space, name -> state_dict.
        slices: Slices of the scan, as network inputs (N, C_in, *spatial).
        batch_size: Network inputs per forward; fewer are used if they are large.

    Returns:
        Distances (E,).
    """
    return distribution_distance(network, experts, slices.split(bounded(batch_size, slices))).mean(1)


def distance_routes(distances: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute routes that prefer the nearest experts: ``softmax(-z / temperature)``.

    ``z`` is the distance, averaged over the batch norms and standardised over the experts: its difference from their
    mean m, divided by ``sqrt(spread^2 + (0.03 m)^2)``. Differences that are small in comparison with the distances
    themselves therefore hardly change the routes.

    Args:
        distances: Distances (E,) or (E, N) from :func:`distribution_distance`; for a site, the mean over its scans.
        temperature: A small value selects the nearest expert alone; a large one gives the uniform mixture.

    Returns:
        Routes (E,) that sum to one; they are uniform if all distances are equal.
    """
    mean = distances.reshape(len(distances), -1).mean(1)
    spread = mean.std(correction=0)
    unit = torch.hypot(spread, LEAST_SPREAD * mean.mean())
    z = (mean - mean.mean()) / unit if unit > 0 else torch.zeros_like(mean)
    return torch.softmax(-z / temperature, dim=0)
