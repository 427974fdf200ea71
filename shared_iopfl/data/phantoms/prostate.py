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
"""Synthetic axial T2 MRI of the male pelvis, with differences between hospitals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from monai.transforms import (
    Compose,
    KeepLargestConnectedComponent,
    RandAdjustContrast,
    RandBiasField,
    RandGaussianSmooth,
    RandGibbsNoise,
    RandRicianNoise,
)

from shared_iopfl.data.phantoms.noise import smooth_noise
from shared_iopfl.data.phantoms.styles import style_of

# left-right, anterior-posterior and head-foot extent in mm, for any number of slices
FIELD_OF_VIEW = (124.0, 124.0, 48.0)
TISSUES = ("fat", "muscle", "marrow", "fluid", "peripheral", "central")


@dataclass(frozen=True)
class ProstateStyle:
    """Appearance of the scans of a site's scanner and patients; tissue values are relative signals, about 0 to 1.

    Every field is a number, so that the style of another site can be a mixture of the given ones.
    """

    fat: float
    muscle: float
    marrow: float
    fluid: float  # urine, seminal vesicles, veins
    peripheral: float  # peripheral zone
    central: float  # central gland
    lumen: float  # contents of the rectum: gas or an air balloon is dark, stool or a water balloon is bright
    rectum: float  # radius of the rectum, or of the endorectal coil's balloon in it, mm
    press: float  # depth to which the rectum or the balloon dents the prostate, mm
    hot_spot: float  # signal gain next to the endorectal coil; 0 without coil
    gland: float  # mean half-width of the prostate, mm
    flatness: float  # anterior-posterior over left-right extent of the prostate
    position: float  # mean distance of the prostate behind the middle of the image, mm
    bias: float  # largest coefficient of the smooth bias field
    gamma: float
    blur: float  # standard deviation of the in-plane blur, mm
    ringing: float  # Gibbs ringing, 0 to 1
    noise: float  # standard deviation of the Rician noise
    units: float  # raw units of a signal of 1
    margin: float  # distance from the gland to the readers' outline, mm; negative: the outline is inside


# A and D have no endorectal coil, B and C have one. The coil of E, the outside site of the demo, is many times as
# sensitive, with more noise. The readers' outlines differ by about a millimetre.
PROSTATE_STYLES: Mapping[str, ProstateStyle] = {
    "A": ProstateStyle(
        fat=0.80, muscle=0.18, marrow=0.50, fluid=1.0, peripheral=0.72, central=0.45, lumen=0.05, rectum=13, press=2,
        hot_spot=0, gland=25, flatness=0.80, position=0, bias=0.05, gamma=1.0, blur=0.4, ringing=0.1, noise=0.02,
        units=600, margin=1.2,
    ),
    "B": ProstateStyle(
        fat=0.45, muscle=0.15, marrow=0.32, fluid=0.90, peripheral=0.90, central=0.58, lumen=0.05, rectum=18, press=4,
        hot_spot=2, gland=25, flatness=0.78, position=-4, bias=0.1, gamma=1.1, blur=0.5, ringing=0.2, noise=0.03,
        units=1500, margin=-1.0,
    ),
    "C": ProstateStyle(
        fat=0.48, muscle=0.16, marrow=0.36, fluid=0.88, peripheral=0.84, central=0.58, lumen=0.35, rectum=17, press=4,
        hot_spot=1, gland=23, flatness=0.88, position=-3, bias=0.1, gamma=1.0, blur=0.7, ringing=0.3, noise=0.02,
        units=900, margin=1.0,
    ),
    "D": ProstateStyle(
        fat=0.50, muscle=0.25, marrow=0.36, fluid=0.95, peripheral=0.66, central=0.32, lumen=0.30, rectum=13, press=2,
        hot_spot=0, gland=24, flatness=0.85, position=2, bias=0.1, gamma=0.9, blur=1.1, ringing=0.4, noise=0.045,
        units=200, margin=-1.2,
    ),
    "E": ProstateStyle(
        fat=0.46, muscle=0.155, marrow=0.34, fluid=0.89, peripheral=0.88, central=0.58, lumen=0.18, rectum=18, press=4,
        hot_spot=24, gland=24, flatness=0.82, position=-4, bias=0.1, gamma=1.06, blur=0.6, ringing=0.25, noise=0.05,
        units=400, margin=0,
    ),
}  # fmt: skip


def prostate_style(site: str, seed: int = 0) -> ProstateStyle:
    """Return the style of a site; see `style_of`."""
    return style_of(site, PROSTATE_STYLES, seed)


class Pelvis:
    """An image of a pelvis that is drawn structure by structure, each over the previous ones.

    Positions are in mm from the middle of the field of view: x to the patient's left, y to the back, z to the head.
    They are distorted slightly by a smooth random field, so that no structure is a perfect ellipsoid.
    """

    def __init__(self, size: Sequence[int], random_state: np.random.RandomState) -> None:
        self.size = tuple(size)
        self.random_state = random_state
        axes = [((np.arange(n) + 0.5) / n - 0.5) * extent for n, extent in zip(size, FIELD_OF_VIEW)]
        grid = np.meshgrid(*axes, indexing="ij")
        self.x, self.y, self.z = (
            (place + amount * self.noise(4, 4, 2)).astype(np.float32) for place, amount in zip(grid, (5, 5, 2))
        )
        self.edge = 0.35 * FIELD_OF_VIEW[0] / size[0]  # mm: a boundary takes about one voxel
        self.image = np.zeros(self.size, np.float32)

    def vary(self, low: float, high: float) -> float:
        """Return a random number between two numbers."""
        return float(self.random_state.uniform(low, high))

    def noise(self, *cells: int) -> np.ndarray:
        """Return a smooth random field over the image; see `smooth_noise`."""
        return smooth_noise(self.random_state, self.size, cells)

    def texture(self, value: float, amount: float, cells: int) -> np.ndarray:
        """Return a tissue with a mean signal, a relative variation, and a number of blobs across the image."""
        return value * (1 + amount * self.noise(cells, cells, max(2, self.size[2] // 2)))

    def ellipsoid(self, centre: Sequence[float], axes: Sequence[float], tilt: float = 0.0) -> np.ndarray:
        """Return the approximate distance (mm) to an ellipsoid, negative inside; `tilt` is in degrees, in plane."""
        x, y, z = self.x - centre[0], self.y - centre[1], self.z - centre[2]
        cos, sin = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
        u, v = cos * x + sin * y, cos * y - sin * x
        return (np.sqrt((u / axes[0]) ** 2 + (v / axes[1]) ** 2 + (z / axes[2]) ** 2) - 1) * min(axes)

    def paint(self, distance: np.ndarray, value: float | np.ndarray) -> None:
        """Draw a structure where its distance is below 0, with a soft edge."""
        inside = 1 / (1 + np.exp(np.clip(distance / self.edge, -30, 30)))
        self.image += inside * (value - self.image)


def prostate_case(
    style: ProstateStyle, size: Sequence[int], random_state: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one patient, scanned at a site of the given style.

    Args:
        style: Style of the site.
        size: Number of voxels to the left, to the back and to the head.
        random_state: Source of all random numbers of the patient and the scan.

    Returns:
        The scan in raw intensities (int16) and its prostate mask (uint8, 0 or 1), which is connected and empty in the
        end slices.
    """
    style = replace(style, **{name: getattr(style, name) * random_state.uniform(0.94, 1.06) for name in TISSUES})
    style = replace(style, lumen=style.lumen * random_state.uniform(0.8, 1.2))
    pelvis = Pelvis(size, random_state)
    _draw_surroundings(pelvis, style)
    rectum, label = _draw_organs(pelvis, style)
    return _scan(pelvis.image, rectum, style, random_state), label


def _draw_surroundings(pelvis: Pelvis, style: ProstateStyle) -> None:
    """Draw body outline, fat, muscles and bones."""
    vary = pelvis.vary
    fat = pelvis.texture(style.fat, 0.15, 24)
    muscle = pelvis.texture(style.muscle, 0.3, 40)
    marrow = pelvis.texture(style.marrow, 0.2, 30)
    cortex = 0.4 * style.muscle

    skin = pelvis.ellipsoid((0, vary(14, 20), 0), (130, vary(74, 80), 900))
    pelvis.paint(skin, cortex)
    pelvis.paint(skin + 2, fat)
    pelvis.paint(np.abs(skin + vary(13, 18)) - 3, muscle)  # the abdominal wall, and gluteus behind
    for side in (-1, 1):
        pelvis.paint(pelvis.ellipsoid((side * 56, 58, 0), (28, 16, 90), -25 * side), muscle)  # gluteus maximus
        hip = pelvis.ellipsoid((side * vary(62, 68), vary(-14, -6), 16), (21, 23, 27))  # head of the femur
        ischium = pelvis.ellipsoid((side * vary(54, 58), vary(14, 22), -20), (11, 17, 24), -20 * side)
        pubis = pelvis.ellipsoid((side * 22, vary(-46, -42), -18), (20, 9, 20), 18 * side)
        for bone in (hip, ischium, pubis):
            pelvis.paint(bone - 2, cortex)
            pelvis.paint(bone, marrow)
        pelvis.paint(pelvis.ellipsoid((side * vary(42, 46), 2, 0), (7, 42, 60), -12 * side), muscle)  # obturator
    # veins and small vessels in the fat: bright dots that no threshold separates from the gland
    veins = pelvis.noise(30, 30, max(2, pelvis.size[2] // 2))
    pelvis.paint(np.maximum(pelvis.ellipsoid((0, style.position, 4), (36, 34, 22)), 8 * (0.65 - veins)), style.fluid)
    if pelvis.random_state.rand() < 0.3:  # the bulb of the penis resembles the gland, and is below it
        pelvis.paint(pelvis.ellipsoid((0, style.position, -24), (11, 9, 8)), pelvis.texture(style.peripheral, 0.2, 40))


def _draw_organs(pelvis: Pelvis, style: ProstateStyle) -> tuple[np.ndarray, np.ndarray]:
    """Draw levator, bladder, seminal vesicles, rectum and prostate; return the distance to the rectum and the mask."""
    vary = pelvis.vary
    muscle = pelvis.texture(style.muscle, 0.3, 40)
    width = style.gland * vary(0.9, 1.1)
    half = (width, width * style.flatness * vary(0.9, 1.1), vary(10, 13.5))
    centre = (vary(-3, 3), style.position + vary(-4, 4), vary(-3, 2))

    # the rectum narrows to the anal canal below; it is behind the prostate and dents it
    radius = style.rectum * vary(0.85, 1.15)
    behind = centre[1] + half[1] + radius - style.press * vary(0.6, 1.4)
    across = np.hypot(pelvis.x - centre[0] - vary(-3, 3), (pelvis.y - behind) / vary(0.9, 1.1))
    rectum = across - radius * (0.35 + 0.65 / (1 + np.exp(-(pelvis.z + 15) / 2.5)))
    wall = vary(2, 3.5)

    levator = pelvis.ellipsoid((centre[0], centre[1] + 14, -26), (half[0] + 7, half[1] + 24, 34))
    pelvis.paint(np.abs(levator) - 1.3, muscle)

    dome = (vary(26, 36), vary(18, 26), 17)
    bladder = pelvis.ellipsoid((centre[0] + vary(-4, 4), centre[1] - 6, centre[2] + half[2] + 13), dome)
    pelvis.paint(bladder - vary(2, 4), muscle)
    pelvis.paint(bladder, style.fluid * (1 + 0.1 * pelvis.noise(3, 3, 2)))
    for side in (-1, 1):
        place = (centre[0] + side * 15, centre[1] + half[1] - 3, centre[2] + half[2] + 2)
        vesicle = pelvis.ellipsoid(place, (17, 6, 6.5), -12 * side)
        folds = 0.65 + 0.5 * pelvis.noise(44, 44, max(2, pelvis.size[2] // 2))
        pelvis.paint(vesicle, style.fluid * np.clip(folds, 0.15, 1))

    pelvis.paint(rectum - wall, pelvis.texture(1.3 * style.muscle, 0.3, 40))
    pelvis.paint(rectum, pelvis.texture(style.lumen, 0.2, 12))
    if style.hot_spot > 0.5:  # the coil's shaft
        pelvis.paint(across - 3, 0.02)

    prostate = np.maximum(pelvis.ellipsoid(centre, half) + 1.5 * pelvis.noise(7, 7, 4), wall + 1 - rectum)
    prostate[..., [0, -1]] = 10.0
    label = KeepLargestConnectedComponent(is_onehot=False)((prostate < style.margin)[None].astype(np.uint8))[0]
    _draw_prostate(pelvis, style, prostate, centre, half)
    return rectum, np.asarray(label).astype(np.uint8)


def _draw_prostate(
    pelvis: Pelvis, style: ProstateStyle, prostate: np.ndarray, centre: Sequence[float], half: Sequence[float]
) -> None:
    """Draw the peripheral zone, the central gland with nodules, stroma and urethra, and in some patients a tumour."""
    vary, random_state = pelvis.vary, pelvis.random_state
    pelvis.paint(prostate - 1.2, style.muscle)  # capsule
    pelvis.paint(prostate + 0.6, pelvis.texture(style.peripheral, 0.15, 30))
    share = vary(0.62, 0.82)  # relative size of the central gland, which is large with hyperplasia
    middle = (centre[0], centre[1] - 0.22 * half[1], centre[2] + 0.15 * half[2])
    central = np.maximum(pelvis.ellipsoid(middle, [share * h for h in half]) + pelvis.noise(8, 8, 4), prostate + 1)
    pelvis.paint(central - 0.7, 0.6 * style.central)
    pelvis.paint(central, pelvis.texture(style.central, 0.25, 40))
    for _ in range(random_state.randint(2, 7)):
        at = [m + vary(-0.45, 0.45) * h for m, h in zip(middle, half)]
        size = vary(3, 7)
        nodule = np.maximum(pelvis.ellipsoid(at, (size, size, size)), central)
        pelvis.paint(nodule - 0.8, 0.6 * style.central)
        pelvis.paint(nodule, style.central * vary(0.75, 1.4))
    front = (centre[0], centre[1] - half[1], centre[2])
    pelvis.paint(np.maximum(pelvis.ellipsoid(front, (0.5 * half[0], 5, half[2])), prostate), style.muscle)
    pelvis.paint(pelvis.ellipsoid((centre[0], centre[1], 0), (1.6, 2.2, 40)) + 9 * (prostate > 0), style.fluid)
    if random_state.rand() < 0.4:
        tumour = (centre[0] + vary(-0.7, 0.7) * half[0], centre[1] + 0.7 * half[1], centre[2] + vary(-4, 4))
        pelvis.paint(np.maximum(pelvis.ellipsoid(tumour, (5, 4, 4)), prostate), 0.8 * style.central)


def _scan(
    image: np.ndarray, rectum: np.ndarray, style: ProstateStyle, random_state: np.random.RandomState
) -> np.ndarray:
    """Return the scanner's image of the tissue signals: contrast, sensitivity, resolution, noise and raw units."""
    blur = style.blur * image.shape[0] / FIELD_OF_VIEW[0]
    in_plane, through = (0.8 * blur, 1.2 * blur), (0.01, 0.01)
    gain = 1 + style.hot_spot * np.exp(-np.maximum(rectum, 0) / 12.0)
    contrast = RandAdjustContrast(prob=1, gamma=(0.9 * style.gamma, 1.1 * style.gamma))
    contrast.set_random_state(state=random_state)
    camera = Compose(
        [
            RandBiasField(degree=3, coeff_range=(0.0, style.bias), prob=1),
            RandGaussianSmooth(sigma_x=in_plane, sigma_y=in_plane, sigma_z=through, prob=1),
            RandGibbsNoise(prob=1, alpha=(0.5 * style.ringing, style.ringing)),
            RandRicianNoise(prob=1, std=style.noise, sample_std=False),
        ]
    ).set_random_state(state=random_state)
    scan = camera(np.asarray(contrast(image[None])) * gain[None].astype(np.float32))
    return np.clip(np.rint(np.asarray(scan[0]) * style.units), -32768, 32767).astype(np.int16)
