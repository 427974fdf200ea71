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
"""An estimate of the Dice of a mask without a reference, from the agreement of its views.

A straight line from agreement to Dice is fitted to the validation cases of the inside sites, each segmented without the
site's own expert, as an outside site would be, and also as virtual scanners would have taken them. The interval is made
of the errors at the sites that the line was not fitted to (split conformal prediction with sites left out; Vovk et al.
2005), because errors between sites, not between cases, are what an outside site meets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from shared_iopfl.models.manifest import read_checked
from shared_iopfl.models.weights import Weights, digest
from shared_iopfl.routing.settings import RoutingSettings
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.reading import parse_json
from shared_iopfl.utils.tables import json_text

LEVEL = 0.9
Pairs = Mapping[str, Sequence[tuple[float, float]]]  # site -> (quality, Dice) of its masks


@dataclass(frozen=True)
class Calibration:
    """A line from the quality of a mask to its Dice, with the interval of its errors at other sites.

    Attributes:
        intercept, slope: Of the line; the slope is not negative.
        low, high: Errors of the line at sites left out of it, the lowest and highest within `level`.
        level: Share of the masks of left-out sites between these two errors.
        sites, masks: Number of sites and of masks behind it.
        error: Mean absolute error at the sites left out.
        settings: Routing settings of the masks. With other settings, a quality means another Dice.
        models: Name -> digest of the global model and of the experts (see :func:`~shared_iopfl.models.weights.digest`).
        target_size: Usual size of the target at the inside sites (see
            :func:`~shared_iopfl.evaluation.second_look.target_size`); 0 if it is unknown.
    """

    intercept: float
    slope: float
    low: float
    high: float
    level: float = LEVEL
    sites: int = 0
    masks: int = 0
    error: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    target_size: float = 0.0

    def estimate(self, quality: float) -> tuple[float, float, float]:
        """Return the expected Dice of a mask, and the ends of its interval, in [0, 1].

        Args:
            quality: Agreement of the views of the scan, in [0, 1].
        """
        expected = float(np.clip(self.intercept + self.slope * quality, 0, 1))
        return expected, max(0.0, expected + self.low), min(1.0, expected + self.high)

    def applies_to(self, inferer: Any) -> bool:
        """Whether an inferer segments each scan with the settings that the calibration was made with."""
        settings = getattr(inferer, "settings", None)
        return (
            isinstance(settings, RoutingSettings)
            and getattr(inferer, "mode", "") == "episodic"
            and _plain(settings) == self.settings
        )

    def made_with(self, models: Mapping[str, Weights]) -> bool:
        """Whether all these models are among those that the calibration was made with.

        Args:
            models: Name -> state_dict of the global model and of the experts.
        """
        return all(self.models.get(name) == digest(weights) for name, weights in models.items())


def _plain(settings: RoutingSettings) -> dict[str, Any]:
    """The settings as JSON returns them."""
    return json.loads(json_text(asdict(settings)))


def fit(pairs: Pairs, settings: RoutingSettings, level: float = LEVEL, cases: int | None = None) -> Calibration:
    """Fit the line to all sites, and its interval with each site left out in turn.

    Args:
        pairs: Quality and Dice of the masks of each site.
        settings: Routing settings of the masks.
        level: Share of the masks of left-out sites that the interval contains.
        cases: Number of different cases behind the masks; None: each mask is a case of its own. The masks of one case
            by several virtual scanners err alike, so that the interval is widened as for so many errors: its ends are
            the quantiles (cases + 1) / cases times as far out, with few cases the largest errors themselves.

    Raises:
        InputError: If fewer than two sites have masks with a quality.
    """
    pairs = {site: of_site for site, of_site in pairs.items() if of_site}
    if len(pairs) < 2:
        raise InputError(
            "a calibration needs labelled cases of at least two inside sites, segmented with several views: the "
            f"quality and Dice of {len(pairs)} were found."
        )
    errors = []
    for site, of_site in pairs.items():
        intercept, slope = _line([pair for other in pairs if other != site for pair in pairs[other]])
        errors += [dice - float(np.clip(intercept + slope * quality, 0, 1)) for quality, dice in of_site]
    cases = cases or len(errors)
    outside = max(0.0, ((1 - level) / 2 * (cases + 1) - 1) / cases)  # share of the errors beyond each end
    low, high = np.quantile(errors, [outside, 1 - outside])
    intercept, slope = _line([pair for of_site in pairs.values() for pair in of_site])
    error = float(np.mean(np.abs(errors)))
    return Calibration(
        intercept, slope, float(low), float(high), level, len(pairs), len(errors), error, _plain(settings)
    )


def _line(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope by least squares; a slope below 0 would reward disagreement, and is 0 instead."""
    quality, dice = np.asarray(pairs, dtype=float).T
    spread = float(np.var(quality))
    slope = max(0.0, float(np.cov(quality, dice, bias=True)[0, 1]) / spread) if spread > 0 else 0.0
    return float(dice.mean()) - slope * float(quality.mean()), slope


def read_calibration(path: str) -> Calibration | None:
    """Read a calibration, or return None if there is no such file.

    Raises:
        InputError: If the file is not a calibration.
    """
    content = read_checked(path) if path else None
    if content is None:
        return None
    values = parse_json(content, path)
    known = {each.name for each in fields(Calibration)}
    numbers = known - {"settings", "models"}
    if isinstance(values, dict):
        values = {"models": {}, "target_size": 0.0, **values}  # earlier versions wrote neither
    if (
        not (isinstance(values, dict) and set(values) == known)
        or not all(isinstance(values[name], dict) for name in known - numbers)
        or not all(isinstance(values[name], (int, float)) and np.isfinite(values[name]) for name in numbers)
    ):
        raise InputError(f"{path} is not a calibration: make it again with iopfl calibrate.")
    return Calibration(**values)


def usual_target_size(path: str) -> float:
    """Return the usual size of the target in a calibration, 0 if it is unknown or there is no such file."""
    calibration = read_calibration(path)
    return calibration.target_size if calibration is not None else 0.0
