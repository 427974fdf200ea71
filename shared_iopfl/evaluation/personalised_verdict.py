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
"""Comparison of a run's personalised models with its global model, by the scores in its folder.

After few rounds a site's personalised model may be worse than the global one: the local models that it averages have
not converged, and the rounds at the site alone (``own_rounds``) overfit to its few cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from shared_iopfl.evaluation.scores import finite_mean, number, read_json, read_scores, show
from shared_iopfl.utils.tables import read_rows

Dice = Mapping[str, Mapping[str, float]]  # {site: {model: mean}}


def personalised_verdict(output_dir: str | Path) -> str:
    """Return a line that advises against personalised models no better than the global one; otherwise "".

    The reasons, in this order: all sites kept the global model, as their validation cases preferred it
    (``models/shares.json``); the personalised models have a lower Dice on the test cases (``metrics.csv``); or, without
    both, on the validation cases of the last round (``history.csv``). Each is a mean over the sites that have both
    models.

    Args:
        output_dir: Folder of a federation.
    """
    folder = Path(output_dir)
    shares = read_json(folder / "models" / "shares.json")
    tested = {
        site: {model: finite_mean(of_cases.values()) for model, of_cases in by_model.items()}
        for (role, site), by_model in read_scores(folder).get("dice", {}).items()
        if role == "inside"
    }
    last = _last_round(folder / "history.csv")
    why = ""
    if shares and not any(shares.values()):
        why = "the validation cases of all sites prefer the global model, and each site has kept that"
    elif _both(tested):
        why = _lower(tested, "test cases")
    elif not shares:
        why = _lower(last, "validation cases of the last round")
    if not why:
        return ""
    return f"personalised models: not worth using{_how_long(folder)}: {why}; use model.pt, or federate for more rounds"


def print_personalised_verdict(output_dir: str | Path) -> str:
    """Print the line of `personalised_verdict`, if there is one, and return it."""
    line = personalised_verdict(output_dir)
    if line:
        print(line)
    return line


def _both(dice: Dice) -> list[Mapping[str, float]]:
    """Return the scores of the sites that have a value for both models."""
    wanted = ("global", "personalised")
    return [models for models in dice.values() if all(math.isfinite(models.get(name, math.nan)) for name in wanted)]


def _lower(dice: Dice, where: str) -> str:
    sites = _both(dice)
    if not sites:
        return ""
    own, shared = (fmean(models[name] for models in sites) for name in ("personalised", "global"))
    if own >= shared:
        return ""
    count = f"mean of {len(sites)} sites" if len(sites) > 1 else "one site"
    return f"Dice {show('dice', own)} against {show('dice', shared)} of the global model ({where}, {count})"


def _last_round(path: Path) -> dict[str, dict[str, float]]:
    rows = [row for row in read_rows(path, "round site model metric value") if row["metric"] == "val_mean_dice"]
    last = max((number(row["round"], path) for row in rows), default=0)
    dice: dict[str, dict[str, float]] = {}
    for row in rows:
        if number(row["round"], path) == last:
            dice.setdefault(row["site"], {})[row["model"]] = number(row["value"], path)
    return dice


def _how_long(folder: Path) -> str:
    settings: Any = read_json(folder / "run.json").get("settings")
    rounds, own = (settings.get(name) if isinstance(settings, dict) else None for name in ("rounds", "own_rounds"))
    if not isinstance(rounds, int):
        return ""
    text = f" after {rounds} round{'s' * (rounds != 1)}"
    return f"{text} and {own} more at each site alone (own_rounds)" if isinstance(own, int) and own else text
