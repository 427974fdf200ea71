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

Each term is a mean over the batch, on a scale of its own (0 to about 1) that depends on neither batch nor image size,
so that a weight means the same everywhere. Two kinds of output are served alike: exclusive classes (softmax, the first
one background) and overlapping targets (sigmoid).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Output = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class View:
    """One view of a batch (B, C, *spatial): geometry that can be undone, and intensity changes that need not be.

    Attributes:
        flips: spatial axes to flip, 0 the first.
        quarter_turns: turns by 90 degrees in the plane of the first two spatial axes (which must be of equal length
            unless the number is even).
        gain: factor on the intensities.
        offset: added to the intensities.
        noise: standard deviation of Gaussian noise, in units of the (normalised) intensities.
        seed: of the noise.
    """

    flips: tuple[int, ...] = ()
    quarter_turns: int = 0
    gain: float = 1.0
    offset: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def apply(self, images: Tensor) -> Tensor:
        """The view of `images`."""
        images = torch.rot90(images, self.quarter_turns, (2, 3)) if self.quarter_turns else images
        images = images.flip([2 + axis for axis in self.flips]) if self.flips else images
        if self.gain != 1.0 or self.offset != 0.0:
            images = images * self.gain + self.offset
        if self.noise > 0:
            # drawn on the CPU, so that a seed means the same on every device
            drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(self.seed))
            images = images + self.noise * drawn.to(images)
        return images

    def undo(self, outputs: Tensor) -> Tensor:
        """Bring what a network made of the view back to where the pixels came from."""
        outputs = outputs.flip([2 + axis for axis in self.flips]) if self.flips else outputs
        return torch.rot90(outputs, -self.quarter_turns, (2, 3)) if self.quarter_turns else outputs


@dataclass(frozen=True)
class ViewSampler:
    """The views that fit an anatomy, and how to draw from them.

    Attributes:
        flips: spatial axes that may be flipped: for a prostate left-right only, never up-down.
        rotations: whether quarter turns fit.
        noise: standard deviation of the noise of a drawn view.
        intensity: a drawn view's gain lies in ``1 +- intensity`` and its offset in ``+- intensity``.
    """

    flips: Sequence[int] = ()
    rotations: bool = False
    noise: float = 0.1
    intensity: float = 0.1

    def draw(self, generator: torch.Generator, square: bool = True) -> View:
        """A random view; each possible flip with probability one half. `square` False leaves out odd quarter turns."""

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
        """Every distinct view of pure geometry, the identity first: what a prediction is averaged over."""
        axes, turns = list(self.flips), [0]
        if self.rotations:
            turns = [0, 1, 2, 3] if square else [0, 2]
            if 0 in axes and 1 in axes:
                axes.remove(1)  # both flips of the plane are its half turn
        subsets: list[tuple[int, ...]] = [()]
        for axis in axes:
            subsets += [(*subset, axis) for subset in subsets]
        return [View(flips=subset, quarter_turns=turn) for subset in subsets for turn in turns]


def probabilities(logits: Tensor, output: Output) -> Tensor:
    """Probabilities (B, C, *spatial) of exclusive classes or overlapping targets, in full precision."""
    return torch.softmax(logits.float(), dim=1) if output == "softmax" else torch.sigmoid(logits.float())


def mean_prediction(logits: Sequence[Tensor], output: Output) -> Tensor:
    """Several predictions (B, C, *spatial) as one: the logarithm (or logit) of their mean probability."""
    mean = torch.stack([probabilities(one, output) for one in logits]).mean(0).clamp(1e-7, 1 - 1e-7)
    return mean.log() if output == "softmax" else mean.logit()


def is_square(images: Tensor) -> bool:
    """Whether the plane of the first two spatial axes may be turned by 90 degrees."""
    return images.shape[2] == images.shape[3]


def view_agreement(logits: Sequence[Tensor], mean: Tensor, output: Output) -> float:
    """How far several predictions of one scan agree with their mean: without a label, the best sign of a bad mask.

    Args:
        logits: the predictions (N, C, *spatial), of a volume all its slices.
        mean: what :func:`mean_prediction` made of them.
        output: of the network.

    Returns:
        The quality, in [0, 1]: the Dice of each prediction's mask with the mean's, averaged over predictions and
        targets; 0 for a target that the mean's mask lacks, as nothing found is nothing to trust.
    """
    agreed = _masks(mean, output)
    axes = [axis for axis in range(agreed.ndim) if axis != 1]
    dice = torch.stack(
        [
            2 * (agreed & seen).sum(axes) / (agreed.sum(axes) + seen.sum(axes)).clamp(min=1)
            for seen in (_masks(one, output) for one in logits)
        ]
    )
    return round(float(dice.mean()), 4)


def target_areas(logits: Tensor, output: Output) -> list[float]:
    """The share of the pixels that the mask of a prediction (N, C, *spatial) gives to each target."""
    masks = _masks(logits, output).float()
    areas = masks.mean([axis for axis in range(masks.ndim) if axis != 1])
    return [round(area, 6) for area in areas.tolist()]


def _masks(logits: Tensor, output: Output) -> Tensor:
    """(N, T, *spatial), a channel a target."""
    if output == "sigmoid":
        return logits > 0
    return torch.stack([logits.argmax(1) == target for target in range(1, logits.shape[1])], dim=1)


def foreground(probability: Tensor, output: Output) -> Tensor:
    """The channels that are targets: all but the first (background) of exclusive classes, all overlapping ones."""
    return probability[:, 1:] if output == "softmax" else probability


def entropy(probability: Tensor, output: Output) -> Tensor:
    """Mean entropy of a pixel in [0, 1], 1 where every class (or, for overlapping targets, yes and no) is as likely."""

    def plogp(p: Tensor) -> Tensor:
        return torch.special.entr(p.clamp(1e-7, 1.0))

    if output == "softmax":
        return plogp(probability).sum(1).mean() / math.log(probability.shape[1])
    return (plogp(probability) + plogp(1 - probability)).mean() / math.log(2)


def contour_band(targets: Tensor, window: float = 21 / 384) -> Tensor:
    """The shape constraint: mean local range of the foreground probability, a band around each target's contour.

    ``max-pool(p) + max-pool(-p)`` with a square window (Jiang et al. 2023): small for one compact target with a firm
    contour, large for ragged and scattered ones.

    Args:
        targets: foreground probabilities (B, T, *spatial).
        window: side of the window as a fraction of the mean image side (21 pixels of 384), at least 3 pixels.
    """
    spatial = targets.shape[2:]
    size = max(3, round(window * sum(spatial) / len(spatial)) // 2 * 2 + 1)
    pool = F.max_pool2d if len(spatial) == 2 else F.max_pool3d
    return (pool(targets, size, 1, size // 2) + pool(-targets, size, 1, size // 2)).mean()


@dataclass
class RoutingObjective:
    """The weighted sum of the terms for one view of a batch.

    ``consistency * MSE(view, target) + entropy * H + shape * band``, the target being what the same network says of the
    plain images, detached. (Jiang et al. 2023, equation of the test-time routing; the scales are ours, see the module.)

    Attributes:
        output: "softmax" for exclusive classes, "sigmoid" for overlapping targets.
        consistency, entropy, shape: weights of the terms.
        window: of the shape constraint, a fraction of the image side.
        views: what views are drawn.
    """

    output: Output = "softmax"
    consistency: float = 1.0
    entropy: float = 0.1
    shape: float = 0.0
    window: float = 21 / 384
    views: ViewSampler = field(default_factory=ViewSampler)

    def __call__(self, network: Callable[[Tensor], Tensor], images: Tensor, view: View) -> Tensor:
        """The objective, a scalar with gradient.

        Args:
            network: gives logits (B, C, *spatial).
            images: (B, C_in, *spatial).
            view: drawn from :attr:`views`.
        """
        return sum(self.terms(network, images, view), images.new_zeros(()))

    def terms(self, network: Callable[[Tensor], Tensor], images: Tensor, view: View) -> Iterator[Tensor]:
        """The objective's summands, one for each forward: of the images as they are, and of their view.

        Their graphs share nothing, the target being detached: backward through one before asking for the next, and the
        memory is that of one forward.
        """
        of_plain = bool(self.entropy or self.shape)
        with torch.set_grad_enabled(of_plain and torch.is_grad_enabled()):
            plain = probabilities(network(images), self.output)
        target, total = plain.detach(), plain.new_zeros(())
        if self.entropy:
            total = total + self.entropy * entropy(plain, self.output)
        if self.shape:
            total = total + self.shape * contour_band(foreground(plain, self.output), self.window)
        del plain  # its graph must not outlive the caller's backward
        if of_plain:
            yield total
        del total
        if self.consistency:
            seen = probabilities(view.undo(network(view.apply(images))), self.output)
            yield self.consistency * F.mse_loss(seen, target)
