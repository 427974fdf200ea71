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
"""The settings of test-time routing, and the presets by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from shared_iopfl.routing.routers import Activation
from shared_iopfl.utils.checks import Rule, number, switch, whole
from shared_iopfl.utils.errors import InputError


@dataclass(frozen=True)
class ObjectiveSettings:
    """Weights and views of the objective that adaptation minimises; see `RoutingObjective`.

    Attributes:
        consistency, entropy, shape: weights of the terms.
        window: of the shape constraint, as a fraction of the image side.
        noise, intensity: strength of the drawn views; see `ViewSampler`.
    """

    consistency: float = 1.0
    entropy: float = 0.1
    shape: float = 0.0
    window: float = 21 / 384
    noise: float = 0.1
    intensity: float = 0.1

    def __post_init__(self) -> None:
        """Raise `InputError` for a value outside its range."""
        for name, rule in OBJECTIVE_LIMITS.items():
            if not rule.holds(value := getattr(self, name)):
                raise InputError(f"routing setting objective.{name} must be {rule.allowed}, but is {value!r:.80}.")


@dataclass(frozen=True)
class RoutingSettings:
    """How a scan is routed.

    By default the experts' weights are mixed in equal parts, the scan is segmented by the mixture in all views that fit
    the anatomy, and the probabilities are averaged. The rest is for other methods, the paper's among them;
    :func:`preset` knows them.

    Attributes:
        start: where the routes begin: "uniform" (the soup), "distance" (the experts nearest by batch-norm statistics),
            "global" (the global model, but for 0.001 an expert, so that adaptation can move) or "random" (the paper).
        temperature: of distance routes; small leans on the nearest expert alone.
        per: routes a "sample" (the paper), a "volume", or a "layer" without a router.
        activation: "softmax", or (the paper) "sigmoid"; normalised either way.
        route_norms: mix the norm layers as well; False keeps the global model's (the paper).
        statistics: share of the scan's own batch-norm statistics, the rest being the running ones; in mode "site",
            those of all its scans. The prostate bundle takes one half, as a volume is large enough to measure its own.
            Of several shares the predictions are averaged (InTEnt, Dong et al. 2024). "auto": 0, and the average of 0
            and 0.5 for a scan whose shift is large, as the running statistics do not describe it.
        views: "average" the prediction over all views that fit the anatomy; "judge" the mask by how far they agree on
            the slices that the scan is measured on, and predict the scan as it is; or "none".
        affine: adaptation may shift the norm layers' weight and bias.
        steps: optimiser steps of adaptation; 0 predicts from the starting routes.
        learning_rate: of Adam.
        agreement: the adapted mask must have at least this Dice with the starting one.
        self_training: in mode "site", steps of training on the masks of the site's scans; 0: none.
        objective: of adaptation; given as a dictionary, the values replace those of the preset.
    """

    start: Literal["uniform", "distance", "global", "random"] = "uniform"
    temperature: float = 1.0
    per: Literal["sample", "volume", "layer"] = "layer"
    activation: Activation = "softmax"
    route_norms: bool = True
    statistics: float | Sequence[float] | Literal["auto"] = "auto"
    views: Literal["average", "judge", "none"] = "average"
    affine: bool = False
    steps: int = 0
    learning_rate: float = 1e-2
    agreement: float = 0.9
    self_training: int = 0
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)

    def __post_init__(self) -> None:
        """Raise `InputError` for a value outside its range: a misspelt start would else be another start in silence."""
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), [c for c in get_args(hint) if isinstance(c, str)]
            if choices and not (isinstance(value, str) and value in choices):
                raise InputError(f"unknown {name} '{value}': choose one of {', '.join(choices)}.")
            rule = switch if hint is bool else LIMITS.get(name)
            if rule is not None and not rule.holds(value):
                raise InputError(f"routing setting {name} must be {rule.allowed}, but is {value!r:.80}.")
        shares = self.shares()
        if not shares or not all(SHARE.holds(share) for share in shares):
            raise InputError(
                f"routing setting statistics must be {SHARE.allowed}, a list of such numbers, or 'auto', but is "
                f"{self.statistics!r:.80}."
            )
        terms = self.objective
        if self.steps and not (terms.consistency or terms.entropy or terms.shape):
            raise InputError("adaptation needs an objective: give consistency, entropy or shape a weight, or steps=0.")

    def shares(self, is_far: bool = False) -> tuple[float, ...]:
        """The shares of the scan's own statistics that predictions are made with.

        Args:
            is_far: whether the scan's shift is large.
        """
        shares: Any = self.statistics
        if shares == "auto":
            return FAR_SHARES if is_far else (0.0,)
        return tuple(shares) if isinstance(shares, Sequence) and not isinstance(shares, str) else (shares,)


LARGE_SHIFT = 3  # times the usual one: single photographs of inside sites reach 2.7
FAR_SHARES = (0.0, 0.5)
SHARE = number(0, 1)
LIMITS: dict[str, Rule] = {
    "temperature": number(1e-3),
    "steps": whole(0),
    "learning_rate": number(0),
    "agreement": number(0, 1),
    "self_training": whole(0),
}
OBJECTIVE_LIMITS: dict[str, Rule] = {
    "consistency": number(0),
    "entropy": number(0),
    "shape": number(0),
    "window": number(0, 1),
    "noise": number(0),
    "intensity": number(0),
}

PRESETS: dict[str, RoutingSettings] = {
    "default": RoutingSettings(),
    # Jiang et al. 2023 as released, with known defects fixed: every expert in every layer, routers with a nonlinearity,
    # trained at all depths and normalised; terms on their own scales, target detached; a new view each step; dropout
    # off in the scored output; no label picks the pass. The weights keep the released proportions (shape 1e-3 of the
    # entropy).
    "paper": RoutingSettings(
        start="random",
        per="sample",
        activation="sigmoid",
        route_norms=False,
        statistics=1.0,
        views="none",
        affine=True,
        steps=10,
        learning_rate=1e-3,
        agreement=0.0,
        objective=ObjectiveSettings(consistency=0.1, entropy=10.0, shape=0.01, noise=0.5, intensity=0.0),
    ),
    # the uniform mixture of the routing space as it stands
    "soup": RoutingSettings(views="none"),
    # the default, then a careful refinement of the routes alone
    "adapted": RoutingSettings(steps=10),
    # for a site: a network trained on the masks that the default makes of its scans
    "self_trained": RoutingSettings(self_training=400),
}


# presets that a bundle adjusts to its images; the others are defined by their publications
ADJUSTED = ("default", "adapted", "self_trained")


def preset(
    name: str = "default",
    overrides: Mapping[str, Any] | None = None,
    bundle: Mapping[str, Any] | None = None,
) -> RoutingSettings:
    """Return the settings of a preset, with some of them replaced.

    Args:
        name: Name of the preset.
        overrides: Settings that replace those of the preset and of the bundle.
        bundle: Settings that the bundle gives to `ADJUSTED` presets, such as the share of a volume's own statistics.

    Raises:
        InputError: For an unknown preset or setting; the message names the known ones.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"unknown preset '{name}': choose one of {', '.join(PRESETS)}.")
    changed = _known(bundle, RoutingSettings) if name in ADJUSTED else {}
    changed |= _known(overrides, RoutingSettings)
    if "objective" in changed:
        terms = _known(changed["objective"], ObjectiveSettings, "objective.")
        changed["objective"] = replace(PRESETS[name].objective, **terms)
    return replace(PRESETS[name], **changed)


def _known(overrides: Any, kind: type, prefix: str = "") -> dict[str, Any]:
    """The overrides, if they are a dictionary of the settings that `kind` has."""
    if not isinstance(overrides, Mapping | None):
        what = f"routing setting {prefix.rstrip('.')}" if prefix else "routing"
        raise InputError(f"{what} must be a dictionary, setting -> value, but is {overrides!r:.80}.")
    known = {each.name for each in fields(kind)}
    unknown = sorted(set(overrides or {}) - known, key=str)
    if unknown:
        raise InputError(f"unknown routing setting '{prefix}{unknown[0]}': choose among {', '.join(sorted(known))}.")
    return dict(overrides or {})
