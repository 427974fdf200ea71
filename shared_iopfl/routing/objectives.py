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
"""The objective of test-time routing, without labels: consistency between views, shape constraint, entropy.

Each term is a mean over the batch between 0 and about 1 that does not depend on the size of the batch or the images, so
that a weight has the same meaning for all of them. Outputs are exclusive classes (softmax, the first class is the
background) or overlapping targets (sigmoid).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Output = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class View:
    """A view of a batch of images: flips and turns, which can be undone, and changes of intensity.

    Attributes:
        flips: Spatial axes to flip, counted from 0.
        quarter_turns: Number of turns by 90 degrees in the plane of the first two spatial axes; if it is odd, these
            must have equal length.
        gain: Factor of the intensities.
        offset: Number that is added to the intensities.
        noise: Standard deviation of Gaussian noise, in units of the normalised intensities.
        seed: Seed of the noise.
    """

    flips: tuple[int, ...] = ()
    quarter_turns: int = 0
    gain: float = 1.0
    offset: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def apply(self, images: Tensor) -> Tensor:
        """Return the view of images (B, C, *spatial)."""
        images = torch.rot90(images, self.quarter_turns, (2, 3)) if self.quarter_turns else images
        images = images.flip([2 + axis for axis in self.flips]) if self.flips else images
        if self.gain != 1.0 or self.offset != 0.0:
            images = images * self.gain + self.offset
        if self.noise > 0:
            # drawn on the CPU, so that a seed gives the same noise on every device
            drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(self.seed))
            images = images + self.noise * drawn.to(images)
        return images

    def undo(self, outputs: Tensor) -> Tensor:
        """Return outputs (B, C, *spatial) for the view in the geometry of the original images."""
        outputs = outputs.flip([2 + axis for axis in self.flips]) if self.flips else outputs
        return torch.rot90(outputs, -self.quarter_turns, (2, 3)) if self.quarter_turns else outputs


@dataclass(frozen=True)
class ViewSampler:
    """The views that fit an anatomy, and how to draw from them.

    Attributes:
        flips: Spatial axes that may be flipped; for a prostate the left-right axis only.
        rotations: Whether quarter turns fit the anatomy.
        noise: Standard deviation of the noise of a drawn view.
        intensity: Largest change of a drawn view: its gain is in ``1 +- intensity``, its offset in ``+- intensity``.
    """

    flips: Sequence[int] = ()
    rotations: bool = False
    noise: float = 0.1
    intensity: float = 0.1

    def draw(self, generator: torch.Generator, square: bool = True) -> View:
        """Draw a random view, with each flip at a probability of one half.

        Args:
            generator: Source of random numbers.
            square: Whether the images are square; otherwise odd quarter turns are left out.
        """

        def uniform(size: float) -> float:
            return float(size * (2 * torch.rand((), generator=generator) - 1))

        return View(
            flips=tuple(axis for axis in self.flips if torch.rand((), generator=generator) < 0.5),
            quarter_turns=int(torch.randint(4 if square else 2, (), generator=generator)) * (1 if square else 2)
            if self.rotations
            else 0,
            gain=1 + uniform(self.intensity),
            offset=uniform(self.intensity),
            noise=self.noise,
            seed=int(torch.randint(2**31, (), generator=generator)),
        )

    def all(self, square: bool = True) -> list[View]:
        """Return all distinct views by flips and turns, over which a prediction is averaged; the identity comes first.

        Args:
            square: Whether the images are square; otherwise odd quarter turns are left out.
        """
        axes, turns = list(self.flips), [0]
        if self.rotations:
            turns = [0, 1, 2, 3] if square else [0, 2]
            if 0 in axes and 1 in axes:
                axes.remove(1)  # two flips of the plane are a half turn
        subsets: list[tuple[int, ...]] = [()]
        for axis in axes:
            subsets += [(*subset, axis) for subset in subsets]
        return [View(flips=subset, quarter_turns=turn) for subset in subsets for turn in turns]


def probabilities(logits: Tensor, output: Output) -> Tensor:
    """Return the probabilities (B, C, *spatial) of logits (B, C, *spatial), in full precision."""
    return torch.softmax(logits.float(), dim=1) if output == "softmax" else torch.sigmoid(logits.float())


def mean_prediction(logits: Sequence[Tensor], output: Output) -> Tensor:
    """Average predictions: return the logarithm (softmax) or logit (sigmoid) of their mean probability.

    Args:
        logits: Logits (B, C, *spatial) of each prediction.
        output: Kind of the network's output.

    Returns:
        Logits (B, C, *spatial).
    """
    mean = torch.stack([probabilities(one, output) for one in logits]).mean(0).clamp(1e-7, 1 - 1e-7)
    return mean.log() if output == "softmax" else mean.logit()


def is_square(images: Tensor) -> bool:
    """Whether the first two spatial axes of images (B, C, *spatial) have equal length, as a quarter turn requires."""
    return images.shape[2] == images.shape[3]


def view_agreement(logits: Sequence[Tensor], mean: Tensor, output: Output) -> float:
    """Measure the agreement of several predictions of a scan, which without labels is the best sign of a bad mask.

    Args:
        logits: Logits (N, C, *spatial) of each prediction, for all slices of a volume.
        mean: Result of :func:`mean_prediction` for them.
        output: Kind of the network's output.

    Returns:
        The quality, in [0, 1]: the Dice of the masks of the predictions with the mask of the mean, averaged over
        predictions and targets. It is 0 for a target that is empty in the mask of the mean.
    """
    agreed = target_masks(mean, output)
    axes = [axis for axis in range(agreed.ndim) if axis != 1]
    masks = (target_masks(one, output) for one in logits)
    dice = [2 * (agreed & mask).sum(axes) / (agreed.sum(axes) + mask.sum(axes)).clamp(min=1) for mask in masks]
    return round(float(torch.stack(dice).mean()), 4)


def target_areas(logits: Tensor, output: Output) -> list[float]:
    """Return the fraction of pixels of each target in the mask of logits (N, C, *spatial)."""
    masks = target_masks(logits, output).float()
    areas = masks.mean([axis for axis in range(masks.ndim) if axis != 1])
    return [round(area, 6) for area in areas.tolist()]


def target_masks(logits: Tensor, output: Output) -> Tensor:
    """Return the masks (N, T, *spatial) of logits (N, C, *spatial), with one channel per target."""
    if output == "sigmoid":
        return logits > 0
    return torch.stack([logits.argmax(1) == target for target in range(1, logits.shape[1])], dim=1)


def foreground(probability: Tensor, output: Output) -> Tensor:
    """Return the channels of targets: all for overlapping targets, all but the background for exclusive classes."""
    return probability[:, 1:] if output == "softmax" else probability


def entropy(probability: Tensor, output: Output) -> Tensor:
    """Compute the mean entropy per pixel, divided by that of a uniform prediction.

    Args:
        probability: Probabilities (B, C, *spatial).
        output: Kind of the network's output.

    Returns:
        The entropy, in [0, 1].
    """

    def plogp(p: Tensor) -> Tensor:
        return torch.special.entr(p.clamp(1e-7, 1.0))

    if output == "softmax":
        return plogp(probability).sum(1).mean() / math.log(probability.shape[1])
    return (plogp(probability) + plogp(1 - probability)).mean() / math.log(2)


def contour_band(targets: Tensor, window: float = 21 / 384) -> Tensor:
    """Compute the shape constraint: the mean local range of the foreground probability.

    ``max-pool(p) + max-pool(-p)`` with a square window (Jiang et al. 2023) is large in a band around each contour. Its
    mean is small for one compact target with a sharp contour, and large for ragged and scattered targets.

    Args:
        targets: Foreground probabilities (B, T, *spatial).
        window: Side of the window as a fraction of the mean image side (21 pixels of 384); at least 3 pixels.
    """
    spatial = targets.shape[2:]
    size = max(3, round(window * sum(spatial) / len(spatial)) // 2 * 2 + 1)
    pool = F.max_pool2d if len(spatial) == 2 else F.max_pool3d
    return (pool(targets, size, 1, size // 2) + pool(-targets, size, 1, size // 2)).mean()


@dataclass
class RoutingObjective:
    """The weighted sum of the terms for one view of a batch.

    ``consistency * MSE(view, target) + entropy * H + shape * band``, where the target is the prediction of the same
    network for the plain images, detached. The terms are those of Jiang et al. (2023), scaled as described above.

    Attributes:
        output: "softmax" for exclusive classes, "sigmoid" for overlapping targets.
        consistency: Weight of the consistency between views.
        entropy: Weight of the entropy.
        shape: Weight of the shape constraint.
        window: Window of the shape constraint, as a fraction of the image side.
    """

    output: Output = "softmax"
    consistency: float = 1.0
    entropy: float = 0.1
    shape: float = 0.0
    window: float = 21 / 384

    def __call__(self, network: Callable[[Tensor], Tensor], images: Tensor, view: View) -> Tensor:
        """Compute the objective.

        Args:
            network: Function that returns logits (B, C, *spatial).
            images: Network inputs (B, C_in, *spatial).
            view: View that is compared with the plain images.

        Returns:
            A scalar with gradient.
        """
        return sum(self.terms(network, images, view), images.new_zeros(()))

    def terms(self, network: Callable[[Tensor], Tensor], images: Tensor, view: View) -> Iterator[Tensor]:
        """Compute the summands of the objective: one for the forward of the plain images, one for that of the view.

        As the target is detached, the summands share no graph: the memory is that of a single forward if `backward` is
        called on each of them before the next one is requested. Arguments are those of :meth:`__call__`.
        """
        of_plain = bool(self.entropy or self.shape)
        with torch.set_grad_enabled(of_plain and torch.is_grad_enabled()):
            plain = probabilities(network(images), self.output)
        target, total = plain.detach(), plain.new_zeros(())
        if self.entropy:
            total = total + self.entropy * entropy(plain, self.output)
        if self.shape:
            total = total + self.shape * contour_band(foreground(plain, self.output), self.window)
        del plain  # so that its graph is freed in the caller's backward
        if of_plain:
            yield total
        del total
        if self.consistency:
            seen = probabilities(view.undo(network(view.apply(images))), self.output)
            yield self.consistency * F.mse_loss(seen, target)
