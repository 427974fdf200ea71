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
"""Synthetic fundus photographs around the optic disc, with differences between cameras."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from monai.transforms import Compose, RandAdjustContrast, RandGaussianNoise
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from shared_iopfl.data.phantoms.noise import smooth_noise
from shared_iopfl.data.phantoms.styles import style_of

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class FundusStyle:
    """Appearance of the photographs of a site's camera and patients; colours are red, green and blue from 0 to 1."""

    retina: Colour
    rim: Colour
    cup: Colour
    vessels: float  # share of the light that the vessels absorb, 0 to 1
    cup_to_disc: float  # mean ratio of the diameters
    atrophy: float  # share of eyes with a pale crescent beside the disc
    texture: float  # relative variation of the retina's brightness
    vignette: float  # loss of light towards the corners of the photograph, 0 to 1
    gamma: float
    haze: float  # share of uniform light that a cloudy lens adds, 0 to 1
    blur: float  # standard deviation in disc radii
    noise: float  # standard deviation of the sensor's noise
    jpeg: float  # quality of the compression, 1 to 95
    margin: float  # distance from the cup's edge to the readers' outline, disc radii; negative: the outline is inside


# E, the outside site of the demo, is between B and C.
FUNDUS_STYLES: Mapping[str, FundusStyle] = {
    "A": FundusStyle(
        retina=(0.72, 0.40, 0.20), rim=(0.92, 0.62, 0.36), cup=(0.98, 0.86, 0.58), vessels=0.55, cup_to_disc=0.45,
        atrophy=0.2, texture=0.10, vignette=0.2, gamma=0.9, haze=0.05, blur=0.02, noise=0.01, jpeg=92, margin=0.05,
    ),
    "B": FundusStyle(
        retina=(0.34, 0.18, 0.07), rim=(0.66, 0.34, 0.08), cup=(0.74, 0.52, 0.12), vessels=0.50, cup_to_disc=0.65,
        atrophy=0.1, texture=0.10, vignette=0.5, gamma=1.1, haze=0.0, blur=0.05, noise=0.02, jpeg=80, margin=-0.05,
    ),
    "C": FundusStyle(
        retina=(0.30, 0.20, 0.13), rim=(0.62, 0.40, 0.28), cup=(0.78, 0.66, 0.46), vessels=0.65, cup_to_disc=0.50,
        atrophy=0.6, texture=0.25, vignette=0.4, gamma=1.0, haze=0.0, blur=0.02, noise=0.03, jpeg=60, margin=0.04,
    ),
    "D": FundusStyle(
        retina=(0.62, 0.36, 0.34), rim=(0.78, 0.56, 0.50), cup=(0.92, 0.80, 0.72), vessels=0.45, cup_to_disc=0.45,
        atrophy=0.3, texture=0.18, vignette=0.3, gamma=1.0, haze=0.2, blur=0.06, noise=0.02, jpeg=75, margin=-0.06,
    ),
    "E": FundusStyle(
        retina=(0.32, 0.19, 0.10), rim=(0.64, 0.37, 0.18), cup=(0.76, 0.60, 0.30), vessels=0.58, cup_to_disc=0.58,
        atrophy=0.4, texture=0.18, vignette=0.45, gamma=1.05, haze=0.0, blur=0.035, noise=0.025, jpeg=70, margin=0.0,
    ),
}  # fmt: skip


def fundus_style(site: str, seed: int = 0) -> FundusStyle:
    """Return the style of a site; see `style_of`."""
    return style_of(site, FUNDUS_STYLES, seed)


class Fundus:
    """A colour picture of the retina that is drawn structure by structure.

    Positions are in disc radii from the middle of the disc: `across` towards the macula, `down` towards the feet.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        disc: Sequence[float],
        radius: float,
        temporal: int,
        random_state: np.random.RandomState,
    ) -> None:
        self.shape, self.disc, self.radius, self.temporal = shape, disc, radius, temporal
        self.random_state = random_state
        rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
        self.across = temporal * (columns - disc[1]) / radius
        self.down = (rows - disc[0]) / radius
        self.image = np.zeros((*shape, 3), np.float32)

    def noise(self, scale: float) -> np.ndarray:
        """Return a smooth random field with blobs of the given size in disc radii; see `smooth_noise`."""
        return smooth_noise(self.random_state, self.shape, [max(2, int(n / self.radius / scale)) for n in self.shape])

    def ellipse(self, across: float, down: float, width: float, height: float, uneven: float) -> np.ndarray:
        """Return the approximate distance (disc radii) to an ellipse with these half-axes, negative inside."""
        u, v = self.across - across, self.down - down
        wave = uneven * smooth_noise(self.random_state, self.shape, [max(4, int(n / self.radius)) for n in self.shape])
        return (np.hypot(u / width, v / height) - 1) * min(width, height) + wave

    def paint(self, distance: np.ndarray, colour: Colour | np.ndarray, softness: float, opacity: float = 1.0) -> None:
        """Draw a structure where its distance is below 0, with an edge of the given softness in disc radii."""
        inside = opacity / (1 + np.exp(np.clip(distance / softness, -30, 30)))
        self.image += inside[..., None] * (np.asarray(colour, np.float32) - self.image)

    def draw_vessels(self, strength: float) -> None:
        """Draw arteries and veins, which leave the disc upwards and downwards and curve around the macula."""
        for kind, light in ((1.0, (0.80, 0.30, 0.25)), (1.35, (0.55, 0.22, 0.25))):  # veins are wider and darker
            tree = Image.new("L", (2 * self.shape[1], 2 * self.shape[0]))
            for side in (-1, 1):
                self._grow(tree, side * np.pi / 2 + 0.35 * self.random_state.randn(), side * 0.25, 0.085 * kind)
                for _ in range(2):  # small vessels on the nasal side
                    self._grow(tree, side * self.random_state.uniform(1.7, 2.9), side * np.pi, 0.04 * kind)
                self._grow(tree, side * self.random_state.uniform(0.3, 0.9), 0.0, 0.03 * kind)
            covered = np.asarray(tree.resize(self.shape[::-1], Image.Resampling.BOX), np.float32)[..., None] / 255
            self.image *= 1 - strength * covered * (1 - np.asarray(light, np.float32))

    def _grow(self, tree: Image.Image, heading: float, goal: float, width: float) -> None:
        """Draw a vessel with its branches: random walks that turn from a heading to a goal (radians, 0 temporal)."""
        draw, random_state = ImageDraw.Draw(tree), self.random_state
        start = random_state.normal((-0.15, 0.0), 0.08)
        walks = [(start, heading, width)]
        reach = max(self.shape) / self.radius * 1.2
        while walks:
            place, heading, width = walks.pop()
            while width > 0.012 and np.abs(place).max() < reach:
                heading += 0.15 * random_state.randn()
                if np.hypot(*place) > 1.2:
                    heading += 0.03 * np.sin(goal - heading)
                further = place + 0.15 * np.array((np.cos(heading), np.sin(heading)))
                ends = [
                    (2 * (self.disc[1] + self.temporal * self.radius * u), 2 * (self.disc[0] + self.radius * v))
                    for u, v in (place, further)
                ]
                draw.line(ends, fill=255, width=max(1, round(4 * width * self.radius)))
                place = further
                width *= 0.988
                if random_state.rand() < 0.07 and np.hypot(*place) > 1:
                    turn = random_state.choice((-1, 1)) * random_state.uniform(0.4, 0.8)
                    walks.append((place, heading + turn, 0.65 * width))


def fundus_case(
    style: FundusStyle, size: int, random_state: np.random.RandomState, photograph: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one eye, photographed at a site of the given style.

    Args:
        style: Style of the site.
        size: Height of the picture in pixels.
        random_state: Source of all random numbers of the eye and the picture.
        photograph: Draw the whole photograph, a third wider than high, instead of a square crop around the disc.

    Returns:
        The picture (uint8, height x width x 3) and its mask (uint8, height x width: 0 background, 1 disc rim, 2 cup).
    """
    vary = lambda low, high: float(random_state.uniform(low, high))  # noqa: E731
    temporal = int(random_state.choice((-1, 1)))  # in the picture of a left eye, the macula is on the right
    if photograph:
        shape = (size, round(size * 4 / 3))
        radius = shape[1] / vary(8.5, 10.5) / 2
        disc = (size * vary(0.45, 0.55), shape[1] * (0.5 - temporal * vary(0.15, 0.19)))
    else:
        shape = (size, size)
        radius = size * vary(0.34, 0.48) / 2
        disc = (size * vary(0.42, 0.58), size * vary(0.42, 0.58))
    fundus = Fundus(shape, disc, radius, temporal, random_state)

    tint = np.asarray([vary(0.88, 1.12)] * 3) * random_state.uniform(0.94, 1.06, 3)  # of the eye
    choroid = 1 + style.texture * (0.7 * fundus.noise(0.25) + 0.5 * fundus.noise(1.0))
    fundus.image[:] = choroid[..., None] * np.asarray(style.retina) * tint
    macula = np.hypot(fundus.across - 5.0, fundus.down - 0.6)
    fundus.image *= (1 - 0.45 * np.exp(-((macula / 1.3) ** 2)))[..., None]

    outline = fundus.ellipse(0, 0, vary(0.88, 0.97), 1.0, 0.05)
    ratio = float(np.clip(style.cup_to_disc + vary(-0.15, 0.15), 0.25, 0.8))
    cup = fundus.ellipse(vary(0, 0.12), vary(-0.06, 0.06), ratio * vary(0.92, 1.05), ratio, 0.05)
    cup = np.maximum(cup, outline + 0.06)  # the rim is complete
    rim_colour, cup_colour = np.asarray(style.rim) * tint, np.asarray(style.cup) * tint
    if random_state.rand() < style.atrophy:
        crescent = fundus.ellipse(vary(0.15, 0.35), vary(-0.1, 0.1), 1.05, 1.05, 0.1)
        fundus.paint(crescent, 0.5 * (fundus.image + rim_colour), 0.04)
    fundus.paint(outline, rim_colour * (1 + 0.08 * fundus.noise(0.4)[..., None]), 0.04)
    fundus.paint(np.maximum(outline, 0.1 - fundus.across), cup_colour, 0.25, 0.25)  # the temporal rim is paler
    fundus.paint(cup, cup_colour * (1 + 0.06 * fundus.noise(0.12)[..., None]), 0.07)
    fundus.draw_vessels(style.vessels)

    mask = np.where(cup < style.margin, 2, np.where(outline < 0, 1, 0)).astype(np.uint8)
    return _photograph(fundus, style, photograph), mask


def _photograph(fundus: Fundus, style: FundusStyle, whole: bool) -> np.ndarray:
    """Return the camera's picture of the retina: illumination, haze, focus, noise, field of view and compression."""
    random_state, (height, width) = fundus.random_state, fundus.shape
    rows, columns = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    angle = random_state.uniform(0, 2 * np.pi)
    light = 1 + 0.15 * (np.cos(angle) * rows + np.sin(angle) * columns)
    light *= 1 - style.vignette * (rows**2 + columns**2) / 2
    image = fundus.image * light[..., None]
    haze = style.haze * random_state.uniform(0.5, 1.5)
    image = (1 - haze) * image + haze * image.mean(axis=(0, 1))
    blur = style.blur * fundus.radius * random_state.uniform(0.7, 1.3)
    image = gaussian_filter(image, (blur, blur, 0), mode="nearest")  # MONAI's filter would darken the borders
    camera = Compose(
        [
            RandAdjustContrast(prob=1, gamma=(0.92 * style.gamma, 1.08 * style.gamma)),
            RandGaussianNoise(prob=1, std=style.noise, sample_std=False),
        ]
    ).set_random_state(state=random_state)
    image = np.asarray(camera(np.clip(image, 0, 1).transpose(2, 0, 1).astype(np.float32))).transpose(1, 2, 0)
    if whole:  # the field of view is round, on black
        rows, columns = np.mgrid[:height, :width]
        outside = np.hypot(rows - (height - 1) / 2, columns - (width - 1) / 2) > 0.485 * height
        image[outside] = 0.01
    picture = Image.fromarray(np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8))
    compressed = BytesIO()
    picture.save(compressed, "JPEG", quality=round(style.jpeg))
    return np.array(Image.open(compressed).convert("RGB"))
