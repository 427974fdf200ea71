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
"""Self-training: the network of a site learns from the masks that routing predicts for the site's unlabelled scans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from monai.losses import DiceLoss
from torch import Tensor, nn
from torch.nn.functional import affine_grid, binary_cross_entropy, grid_sample
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shared_iopfl.models.weights import copy_network
from shared_iopfl.routing.objectives import Output, ViewSampler, is_square, probabilities
from shared_iopfl.utils.stacks import bounded, evenly

AVERAGING = 0.98  # decay of the moving average, which covers about the last fifty steps
ANGLE, SCALE, SHIFT = 0.25, 0.15, 0.1  # largest rotation (radians), zoom, and shift (of half the image side)
TRAINING_PIXELS = 2**26  # pixels of all network inputs that are kept for training: 4096 inputs of 128 x 128


@dataclass
class SelfTraining:
    """Trains a network on the scans of its site, with the probabilities that routing predicts as targets.

    Routing predicts each scan on its own. A network that learns these predictions under random rotations, zooms and
    changes of intensity keeps what they have in common over all scans of the site. No label is used. Self-training is
    common in source-free domain adaptation (e.g. Liang et al. 2020, arXiv 2002.08546).

    Args:
        steps: Number of steps of Adam.
        views: Sampler of flips, quarter turns, noise and changes of intensity.
        output: Kind of the network's output.
        batch_size: Network inputs per step; fewer are used if they are large.
        seed: Seed of batches and views.
        learning_rate: Learning rate of Adam.
    """

    steps: int
    views: ViewSampler
    output: Output
    batch_size: int
    seed: int
    learning_rate: float = 3e-4

    def train_on(
        self, network: nn.Module, stacks: Sequence[Tensor], predict: Callable[[Tensor], Tensor], own_statistics: bool
    ) -> nn.Module:
        """Train on as many inputs of each scan as fit in memory; see :meth:`train`.

        Args:
            network: Plain network at which training starts; it is not changed.
            stacks: Network inputs (N, C_in, H, W) of each scan.
            predict: Function that returns the logits (N, C, H, W) of a scan.
            own_statistics: Whether batch norm learns the statistics of the site.
        """
        pairs = []
        for stack in stacks:
            count = bounded(len(stack), stack, TRAINING_PIXELS // len(stacks))
            pairs.append((evenly(stack, count), evenly(probabilities(predict(stack), self.output), count)))
        images, targets = (torch.cat(parts) for parts in zip(*pairs))
        return self.train(network, images, targets, own_statistics)

    def train(self, network: nn.Module, images: Tensor, targets: Tensor, own_statistics: bool) -> nn.Module:
        """Train a copy of a network, without dropout.

        Args:
            network: Plain network at which training starts; it is not changed.
            images: Network inputs (N, C_in, H, W) of all scans.
            targets: Probabilities (N, C, H, W).
            own_statistics: Whether batch norm learns the statistics of the site, as suits a routing that uses those of
                the scan; otherwise it keeps the stored ones.

        Returns:
            The exponential moving average of the network over the steps, in evaluation mode.
        """
        student = copy_network(network).eval().requires_grad_(True)
        for layer in student.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.train(own_statistics)
        averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING), use_buffers=True)
        averaged.update_parameters(student)
        optimizer = torch.optim.Adam(student.parameters(), lr=self.learning_rate)
        dice = DiceLoss(batch=True)
        generator = torch.Generator().manual_seed(self.seed)
        size = min(bounded(max(2, self.batch_size), images), len(images))
        order = torch.empty(0, dtype=torch.long)
        # in full precision, as in adaptation
        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
            for _ in range(self.steps):
                if len(order) < size:
                    order = torch.cat([order, torch.randperm(len(images), generator=generator)])
                batch, order = order[:size].to(images.device), order[size:]
                inputs, expected = _moved(images[batch], targets[batch], generator)
                view = self.views.draw(generator, is_square(inputs))
                found = probabilities(view.undo(student(view.apply(inputs))), self.output).clamp(1e-6, 1 - 1e-6)
                optimizer.zero_grad(set_to_none=True)
                (dice(found, expected) + binary_cross_entropy(found, expected)).backward()
                optimizer.step()
                averaged.update_parameters(student)
        return averaged.module.eval().requires_grad_(False)


def _moved(images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rotate, zoom and shift each image and its target (N, C, H, W) at random; the border is repeated."""

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(*shape, generator=generator) - 1

    angle, scale = ANGLE * uniform(len(images)), 1 + SCALE * uniform(len(images))
    rows = [scale * angle.cos(), -scale * angle.sin()], [scale * angle.sin(), scale * angle.cos()]
    matrix = torch.stack([torch.stack(row, 1) for row in rows], 1)
    matrix = torch.cat([matrix, SHIFT * uniform(len(images), 2, 1)], 2).to(images)
    grid = affine_grid(matrix, list(images.shape), align_corners=False)
    moved = (grid_sample(each, grid, padding_mode="border", align_corners=False) for each in (images, targets))
    return next(moved), next(moved)
