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

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from shared_iopfl.routing.routers import Activation
from shared_iopfl.utils.checks import Rule, number, switch, whole
from shared_iopfl.utils.errors import InputError

__all__ = ["PRESETS", "RoutingSettings", "preset"]


@dataclass(frozen=True)
class RoutingSettings:
    """How a scan is routed. The defaults are what measured best on real sites; :func:`preset` knows others.

    Attributes:
        start: where the routes begin: "distance" (the experts nearest by batch-norm statistics, as far as
            `usual_shift` lets them), "uniform" (the soup), "global" (the global model, but for 0.001 an expert, so that
            adaptation can move) or "random" (the paper).
        temperature: of distance routes; small leans on the nearest expert alone.
        trust: of distance routes: weight of one Dice point of an expert's published score, where scores are at hand.
        per: routes a "sample" (the paper), a "volume", or a "layer" without a router.
        activation: "softmax", or (the paper) "sigmoid"; normalised either way.
        route_norms: mix the norm layers as well; False keeps the global model's (the paper).
        statistics: batch norm with running (0), the scan's own (1) or blended statistics.
        prior: how many slices (or pictures) the running statistics count for: of `statistics` the part
            ``n / (n + prior)`` is used for the n of a scan, in mode "site" of all its scans, so that one photograph
            moves them little and a volume or a folder much (Schneider et al. 2020).
        choose_statistics: in mode "site", use of `statistics`, as far as `usual_shift` lets it, all, a half, a quarter
            or nothing: the share with which the views of the site's scans agree best (issue 4). A site's scans may
            differ from the running statistics for other reasons than their scanner (more large cups); then the views
            agree less.
        usual_shift: how large a shift has no effect. The shift is the scan's distance from the global model, in units
            of the mean distance of the inside sites' validation cases, which the federation publishes. The fraction
            ``max(0, 1 - usual_shift / shift)`` of `statistics` is used, and the routes are interpolated by it between
            those without distances and the distance routes. 0: all of both, whatever the shift.
        affine: adaptation may shift the norm layers' weight and bias.
        steps: optimiser steps of adaptation; 0 predicts from the starting routes.
        learning_rate: of Adam.
        dropout: of the routers, during adaptation only.
        consistency, entropy, shape: weights of the objective's terms.
        window: of the shape constraint, as a fraction of the image side.
        noise, intensity: strength of the drawn views.
        adapt_slices: measure and adapt on at most this many slices, evenly spaced over the volume.
        average_views: average the prediction over all views that fit the anatomy.
        judge_views: where it is not averaged, predict the views all the same, to judge the mask's quality by them.
        agreement: guard: the adapted mask must have at least this Dice with the starting one.
    """

    start: Literal["distance", "uniform", "global", "random"] = "distance"
    temperature: float = 1.0
    trust: float = 1.0
    per: Literal["sample", "volume", "layer"] = "layer"
    activation: Activation = "softmax"
    route_norms: bool = True
    statistics: float = 1.0
    prior: float = 4.0
    choose_statistics: bool = True
    usual_shift: float = 1.0
    affine: bool = False
    steps: int = 0
    learning_rate: float = 1e-3
    dropout: float = 0.0
    consistency: float = 1.0
    entropy: float = 0.1
    shape: float = 0.0
    window: float = 21 / 384
    noise: float = 0.1
    intensity: float = 0.1
    adapt_slices: int = 16
    average_views: bool = True
    judge_views: bool = False
    agreement: float = 0.9

    def __post_init__(self) -> None:
        """Raise `InputError` for a value outside its range: a misspelt start would else be another start in silence."""
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if choices and not (isinstance(value, str) and value in choices):
                raise InputError(f"unknown {name} '{value}': choose one of {', '.join(choices)}.")
            rule = switch if hint is bool else LIMITS.get(name)
            if rule is not None and not rule.holds(value):
                raise InputError(f"routing setting {name} must be {rule.allowed}, but is {value!r:.80}.")
        if self.steps and not (self.consistency or self.entropy or self.shape):
            raise InputError("adaptation needs an objective: give consistency, entropy or shape a weight, or steps=0.")


LIMITS: dict[str, Rule] = {
    "temperature": number(1e-3),
    "trust": number(0),
    "statistics": number(0, 1),
    "prior": number(0),
    "usual_shift": number(0),
    "steps": whole(0),
    "learning_rate": number(0),
    "dropout": number(0, 0.99),
    "consistency": number(0),
    "entropy": number(0),
    "shape": number(0),
    "window": number(0, 1),
    "noise": number(0),
    "intensity": number(0),
    "adapt_slices": whole(1),
    "agreement": number(0, 1),
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
        prior=0.0,
        usual_shift=0.0,
        affine=True,
        steps=10,
        dropout=0.2,
        consistency=0.1,
        entropy=10.0,
        shape=0.01,
        noise=0.5,
        intensity=0.0,
        adapt_slices=32,
        average_views=False,
        agreement=0.0,
    ),
    # the uniform mixture of the routing space as it stands
    "soup": RoutingSettings(start="uniform", statistics=0.0, average_views=False),
    # the default, then a careful refinement of the routes alone
    "adapted": RoutingSettings(steps=10, learning_rate=1e-2),
}


def preset(name: str = "default", overrides: Mapping[str, Any] | None = None) -> RoutingSettings:
    """The settings called `name`, with some of them replaced.

    Raises:
        InputError: for an unknown preset or setting, naming the known ones.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError(f"unknown preset '{name}': choose one of {', '.join(PRESETS)}.")
    if not isinstance(overrides, Mapping | None):
        raise InputError(f"routing must be a dictionary, setting -> value, but is {overrides!r:.80}.")
    known = {field.name for field in fields(RoutingSettings)}
    unknown = sorted(set(overrides or {}) - known, key=str)
    if unknown:
        raise InputError(f"unknown routing setting '{unknown[0]}': choose among {', '.join(sorted(known))}.")
    return replace(PRESETS[name], **dict(overrides or {}))
