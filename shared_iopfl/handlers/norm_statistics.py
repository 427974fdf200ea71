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
"""The statistics that batch norm uses during local training: those of the batch, the global ones, or a blend.

In plain FedAvg every site normalises by the statistics of its batches during training, and the average of all sites'
running statistics, with which the global model then runs, fits none of them. Training of the same network on pooled
data has no such gap (Zhong et al. 2023, arXiv 2303.06530). The setting ``norm_statistics`` of ``train.json`` chooses
the statistics.
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
from shared_iopfl.routing.layers import batch_norms
from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.stacks import evenly
from shared_iopfl.utils.tables import read_rows

STATISTICS = "statistics.csv"  # table of a federation; see `print_statistics`
NormStatistics = Literal["batch", "global", "blend"]


class NormStatisticsHandler:
    r"""Chooses the statistics by which batch norm normalises while a site trains.

    - "batch": those of each batch, as in published FedAvg;
    - "global": from `start_epoch` on, the running statistics of the global model, which then do not change (FixBN,
      Zhong et al. 2023, arXiv 2303.06530). Each site then trains the function that the global model computes, and the
      average of the sites fits its statistics;
    - "blend": as "global", but in a random half of the steps blended with those of the batch,
      :math:`s \, \mu_{global} + (1 - s) \, \mu_{batch}` with :math:`s \sim U(0, 1)` (the variances likewise), and one
      share for all layers of a step. The network becomes robust to statistics other than the global ones.

    Before `start_epoch` every choice trains by batch statistics, because the running ones of a new network are
    arbitrary.

    Args:
        network: Network that is trained; its batch norms are found by module type. Other norm layers have no running
            statistics and are not changed.
        statistics: "batch", "global" or "blend".
        start_epoch: First epoch, counted from 0 over all rounds, in which the choice holds. It holds to the end, in a
            site's own rounds too, so that the experts agree in their statistics.
        seed: Seed of the random shares, together with the epoch; the global random state is not changed.

    Raises:
        InputError: If the choice is unknown.
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
        self.share = 1.0  # share of the global statistics in this step
        self._hooks: list[Any] = []

    def attach(self, engine: Engine) -> None:
        """Register the handler with an ignite engine."""
        if self.statistics == "batch":
            return
        engine.add_event_handler(Events.EPOCH_STARTED, self.start)
        if self.statistics == "blend":
            engine.add_event_handler(Events.ITERATION_STARTED, self.draw)
        engine.add_event_handler(Events.COMPLETED, self.stop)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def start(self, engine: Engine) -> None:
        """Register hooks with the batch norms from `start_epoch` on, after the trainer has set the training mode."""
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
        """Remove the hooks, so that a network that is scored, copied or sent has none."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def fail(self, engine: Engine, error: Exception) -> None:
        """Remove the hooks and raise the error."""
        self.stop(engine)
        raise error

    def _normalise(self, layer: nn.modules.batchnorm._BatchNorm, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        layer.eval()  # normalises by its running statistics and does not change them
        if self.share == 1.0:
            return None
        # the input is transformed such that normalising it by the running statistics equals using the blended ones
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
    """Measure the running statistics of a network anew.

    Args:
        network: Network, which is not changed; on the device of the batches.
        batches: Network inputs (B, C, *spatial); each batch should have inputs of several scans, so that the variance
            includes the differences between scans.

    Returns:
        The state_dict of the network with the statistics of these inputs.
    """
    probe = copy_network(network)
    update_bn(batches, probe)
    return probe.state_dict()


def mixed_batches(stacks: Sequence[Tensor], count: int = 64, size: int = 16) -> Sequence[Tensor]:
    """Make batches for :func:`with_own_statistics`, each with inputs of several scans.

    Args:
        stacks: Network inputs (N, C, *spatial) of each scan.
        count: Total number of inputs, with about as many from each scan.
        size: Number of inputs in each batch.
    """
    inputs = evenly(torch.cat([evenly(stack, count // len(stacks) + 1) for stack in stacks]), count)
    # in a fixed random order, so that each batch has slices of several scans
    return inputs[torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))].split(size)


def print_statistics(output_dir: str | Path) -> str:
    """Print the ``statistics.csv`` of a federation: the Dice of the global model with global and with own statistics.

    Args:
        output_dir: Folder of the run; without measurements there nothing is printed.

    Returns:
        The printed text.
    """
    lines = [
        f"{row['site']}: Dice {100 * float(row['global']):.1f} with the global statistics, "
        f"{100 * float(row['own']):.1f} with its own"
        for row in read_rows(Path(output_dir) / STATISTICS)
    ]
    text = "\n".join(["norm statistics, global model on validation cases", *lines]) if lines else ""
    if text:
        print(text)
    return text
