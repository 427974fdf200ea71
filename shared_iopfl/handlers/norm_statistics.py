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
"""The statistics that batch norm uses during local training: batch, global or blended.

In plain FedAvg every site normalises by the statistics of its own batches while it trains, and is then served by the
average of all sites' running statistics, which fit none of them: a pooled training of the same network has no such gap
(Zhong et al. 2023, arXiv 2303.06530). ``norm_statistics`` of ``train.json`` chooses what a site trains by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from shared_iopfl.models.weights import copy_network
from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.stacks import evenly
from shared_iopfl.utils.tables import read_rows

STATISTICS = "statistics.csv"  # of a federation: see `print_statistics`
NormStatistics = Literal["batch", "global", "blend"]


def batch_norms(network: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The batch norms of a network that hold running statistics, by name, found by module type."""
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None
    }


class NormStatisticsHandler:
    r"""Chooses the statistics that batch norm normalises by while a site trains.

    - "batch": those of each batch, as published FedAvg does;
    - "global": from `start_epoch` on, the running statistics that came with the global weights, which then stay as they
      are (FixBN, Zhong et al. 2023, arXiv 2303.06530). Each site then trains the very function that the global model
      is, and their average fits its statistics;
    - "blend": as "global", but in half of the steps, drawn at random, mixed with those of the batch,
      :math:`s \, \mu_{global} + (1 - s) \, \mu_{batch}` with :math:`s \sim U(0, 1)`, the variances likewise, with one
      share for all layers of a step: the network becomes robust to other statistics than the global ones.

    Before `start_epoch` every choice trains by batch statistics: the running ones of a new network are arbitrary.

    Args:
        network: the network that is trained; its batch norms are found by module type. Other norms have no running
            statistics, and are left alone.
        statistics: "batch", "global" or "blend".
        start_epoch: the first epoch, counted over all rounds from 0, in which the choice holds; it holds to the end,
            own rounds of a site included, so that the experts agree in their statistics.
        seed: of the shares that are drawn, with the epoch; the global random state is not touched.

    Raises:
        InputError: for an unknown choice.
    """

    def __init__(
        self,
        network: nn.Module,
        statistics: NormStatistics = "batch",
        start_epoch: int = 0,
        seed: int = 0,
    ) -> None:
        check_values({"norm_statistics": statistics})
        self.network = network
        self.statistics = statistics
        self.start_epoch = start_epoch
        self.seed = seed
        self.generator = torch.Generator()
        self.share = 1.0  # of the global statistics, in this step
        self._hooks: list[Any] = []

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        if self.statistics == "batch":
            return
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        if self.statistics == "blend":
            engine.add_event_handler(Events.ITERATION_STARTED, self.draw)
        engine.add_event_handler(Events.COMPLETED, self.stop)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def start(self, engine: Engine) -> None:
        """Take hold of the batch norms, once it is time; the trainer puts the whole network in training mode."""
        epoch = engine.state.epoch - 1  # ignite counts a running epoch from 1
        if epoch >= self.start_epoch:
            self.stop(engine)
            self.generator.manual_seed(1000 * self.seed + epoch)
            self._hooks = [
                layer.register_forward_pre_hook(self._normalise) for layer in batch_norms(self.network).values()
            ]

    def draw(self, engine: Engine) -> None:
        """Draw the share of the global statistics for this iteration."""
        half, share = torch.rand(2, generator=self.generator).tolist()
        self.share = 1.0 if half < 0.5 else share

    def stop(self, engine: Engine) -> None:
        """Leave the batch norms as they were: what is scored, copied or sent has no hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def fail(self, engine: Engine, error: Exception) -> None:
        """Remove the hooks and raise the error."""
        self.stop(engine)
        raise error

    def _normalise(self, layer: nn.modules.batchnorm._BatchNorm, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        layer.eval()  # by its running statistics, which stay as they are
        if self.share == 1.0:
            return None
        # shifted and scaled such that the layer, by its running statistics, normalises by the blended ones
        running_mean, running_var = cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)
        wide = inputs[0].float()
        var, mean = torch.var_mean(wide, [dim for dim in range(wide.ndim) if dim != 1], correction=0)
        mean, var = torch.lerp(mean, running_mean, self.share), torch.lerp(var, running_var, self.share)
        scale = torch.sqrt((running_var + layer.eps) / (var + layer.eps))
        shape = (1, -1, *(1,) * (wide.ndim - 2))
        shift = running_mean - mean * scale
        return ((wide * scale.reshape(shape) + shift.reshape(shape)).to(inputs[0].dtype),)


@torch.no_grad()
def with_own_statistics(network: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """The state of a network with the running statistics of its batch norms measured anew on some inputs.

    Args:
        network: untouched; on the device of the batches.
        batches: network inputs (B, C, *spatial); of several scans each, for a variance that holds what differs between
            scans.
    """
    probe = copy_network(network)
    update_bn(batches, probe)
    return probe.state_dict()


def mixed_batches(stacks: Sequence[Tensor], count: int = 64, size: int = 16) -> Sequence[Tensor]:
    """Batches for :func:`with_own_statistics` that hold inputs of several scans each.

    Args:
        stacks: the network inputs (N, C, *spatial) of each scan.
        count: inputs in all, about as many of each scan.
        size: of a batch.
    """
    inputs = evenly(torch.cat([evenly(stack, count // len(stacks) + 1) for stack in stacks]), count)
    # in an order of its own, so that each batch holds slices of several cases
    return inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))].split(size)


def print_statistics(output_dir: str | Path) -> str:
    """Print, from a federation's ``statistics.csv``, how the global model does by its statistics and by a site's own.

    Args:
        output_dir: of the run; where nothing could be measured, nothing is printed.

    Returns:
        The text that was printed.
    """
    lines = [
        f"{row['site']}: Dice {100 * float(row['global']):.1f} by the global statistics, "
        f"{100 * float(row['own']):.1f} by its own"
        for row in read_rows(Path(output_dir) / STATISTICS)
    ]
    text = "\n".join(["norm statistics, global model on validation cases", *lines]) if lines else ""
    if text:
        print(text)
    return text
