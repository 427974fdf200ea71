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
"""The settings of test-time routing, and presets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from shared_iopfl.routing.routers import Activation
from shared_iopfl.utils.checks import AUTO, Rule, either, number, several, switch, whole
from shared_iopfl.utils.errors import InputError


@dataclass(frozen=True)
class ObjectiveSettings:
    """Weights and views of the objective that adaptation minimises; see `RoutingObjective` and `ViewSampler`.

    Attributes:
        consistency: Weight of the consistency between views.
        entropy: Weight of the entropy.
        shape: Weight of the shape constraint.
        window: Window of the shape constraint, as a fraction of the image side.
        noise: Standard deviation of the noise of the views.
        intensity: Largest change of the views' gain and offset.
    """

    consistency: float = 1.0
    entropy: float = 0.1
    shape: float = 0.0
    window: float = 21 / 384
    noise: float = 0.1
    intensity: float = 0.1

    def __post_init__(self) -> None:
        """Raise `InputError` for a value that is not allowed."""
        for name, rule in OBJECTIVE_LIMITS.items():
            if not rule.holds(value := getattr(self, name)):
                raise InputError(f"routing setting objective.{name} must be {rule.allowed}, but is {value!r:.80}.")


@dataclass(frozen=True)
class RoutingSettings:
    """How a scan is routed.

    By default the weights of the experts are averaged, the scan is segmented by this soup in all views that fit the
    anatomy, and the probabilities are averaged. Other settings define other methods, among them that of the paper; see
    :func:`preset`.

    Attributes:
        start: Starting routes: "uniform" (the soup); "distance" (the nearest experts by batch-norm statistics);
            "global" (the global model, and 0.001 of each other expert, without which adaptation could not move the
            routes); or "random" (as in the paper).
        temperature: Temperature of distance routes; a small value selects the nearest expert alone.
        per: Routes per "sample" (as in the paper), per "volume", or per "layer" without a router.
        activation: "softmax", or "sigmoid" as in the paper; normalised in both cases.
        route_norms: Whether norm layers are mixed; in the paper they are those of the global model.
        statistics: Share of the scan's own batch-norm statistics, in [0, 1]; the rest are the running ones. In mode
            "site" they are the statistics of all scans of the site. For several shares, the predictions are averaged
            (InTEnt, Dong et al. 2024). "auto" uses 0, and the shares 0 and 0.5 for a scan with a large shift, which the
            running statistics do not describe. The prostate bundle uses 0.5, as the slices of a volume are enough to
            measure its own statistics.
        views: "average": the predictions of all views that fit the anatomy are averaged; "judge": the scan is predicted
            as it is, and the agreement of the views on some slices judges the mask; or "none".
        affine: Whether adaptation may shift the weight and bias of the norm layers.
        steps: Optimiser steps of adaptation; 0 predicts from the starting routes.
        learning_rate: Learning rate of Adam in adaptation.
        agreement: Lowest Dice of the masks before and after adaptation for which the latter is accepted.
        self_training: Training steps on the masks of the site's scans, in mode "site"; 0 for none.
        objective: Objective of adaptation; in a dictionary of settings, its values replace those of the preset.
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
        """Raise `InputError` for a value that is not allowed."""
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), [c for c in get_args(hint) if isinstance(c, str)]
            if choices and not (isinstance(value, str) and value in choices):
                raise InputError(f"unknown {name} '{value}': choose one of {', '.join(choices)}.")
            rule = switch if hint is bool else LIMITS.get(name)
            if rule is not None and not rule.holds(value):
                raise InputError(f"routing setting {name} must be {rule.allowed}, but is {value!r:.80}.")
        terms = self.objective
        if self.steps and not (terms.consistency or terms.entropy or terms.shape):
            raise InputError("adaptation needs an objective: give consistency, entropy or shape a weight, or steps=0.")

    def shares(self, is_far: bool = False) -> tuple[float, ...]:
        """Return the shares of the scan's own statistics, each of which gives a prediction.

        Args:
            is_far: Whether the scan's shift is large.
        """
        shares: Any = self.statistics
        if shares == AUTO:
            return FAR_SHARES if is_far else (0.0,)
        return tuple(shares) if isinstance(shares, Sequence) else (shares,)


LARGE_SHIFT = 3  # in units of the usual shift; single photographs of inside sites reach 2.7
FAR_SHARES = (0.0, 0.5)
SHARE = number(0, 1)
LIMITS: dict[str, Rule] = {
    "temperature": number(1e-3),
    "statistics": either(
        SHARE, several("a list of such numbers", SHARE, fewest=1), Rule("'auto'", lambda value: value == AUTO)
    ),
    "steps": whole(0),
    "learning_rate": number(0),
    "agreement": number(0, 1),
    "self_training": whole(0),
}
OBJECTIVE_LIMITS: dict[str, Rule] = {
    **dict.fromkeys(("consistency", "entropy", "shape", "noise", "intensity"), number(0)),
    "window": number(0, 1),
}

PRESETS: dict[str, RoutingSettings] = {
    "default": RoutingSettings(),
    # the released method of Jiang et al. 2023 with known defects fixed: all experts are in all layers; the routers have
    # a nonlinearity, are trained in all layers, and their output is normalised; the terms are scaled and the target is
    # detached; each step draws a new view; the scored output is without dropout; and no label selects the step that is
    # scored. The weights of the terms have the released proportions (shape 1e-3 of the entropy).
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
    # the uniform mixture of the routing space, with one forward
    "soup": RoutingSettings(views="none"),
    # the default, followed by gradient steps on the routes
    "adapted": RoutingSettings(steps=10),
    # for a site: a network that is trained on the masks that the default predicts for its scans
    "self_trained": RoutingSettings(self_training=400),
}
# presets that a bundle may adjust to its images; the others are defined by publications
ADJUSTED = ("default", "adapted", "self_trained")


def preset(
    name: str = "default", overrides: Mapping[str, Any] | None = None, bundle: Mapping[str, Any] | None = None
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
    """The overrides as a dictionary, after a check that `kind` has these settings."""
    if not isinstance(overrides, Mapping | None):
        what = f"routing setting {prefix.rstrip('.')}" if prefix else "routing"
        raise InputError(f"{what} must be a dictionary, setting -> value, but is {overrides!r:.80}.")
    known = {each.name for each in fields(kind)}
    unknown = sorted(set(overrides or {}) - known, key=str)
    if unknown:
        raise InputError(f"unknown routing setting '{prefix}{unknown[0]}': choose among {', '.join(sorted(known))}.")
    return dict(overrides or {})
