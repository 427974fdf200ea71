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
"""The results of a federation: final models, their scores at other sites, and the usual shift.

They are written to ``models/``, ``scores.json``, ``shares.json``, ``cross_site.csv`` and ``statistics.csv``. A site
that fails here scores no models; the scores of the other sites remain.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from shared_iopfl.federation.client import time_limit
from shared_iopfl.federation.state import FederationState
from shared_iopfl.federation.updates import FAILURES, last_rounds
from shared_iopfl.handlers.norm_statistics import STATISTICS
from shared_iopfl.models.files import GLOBAL, USUAL_SHIFT, model_path, save_atomically
from shared_iopfl.models.manifest import CALIBRATION
from shared_iopfl.models.weights import Weights
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import write_json, write_rows

CROSS_SITE, MATRIX = "cross_site.csv", ("model", "site", "dice")


def publish(run: FederationState) -> None:
    """Write the final models, and how well each of them does at the inside sites for which it was not made.

    Raises:
        InputError: If a site failed every round, after the models of the other sites have been written.
    """
    folder = run.output_dir / "models"
    delivered = last_rounds(run.history)
    present = [site for site in run.sites if site in delivered]
    if run.own_rounds or run.shares:
        select_personalised(run, present)
    models = {GLOBAL: run.weights, **{site: run.clients[site].personalised for site in present}}
    for name, weights in models.items():
        save_atomically(dict(weights), model_path(str(folder), GLOBAL if name == GLOBAL else "personalised", name))
    for site in set(run.sites) - set(present):  # a model of an earlier run
        Path(model_path(str(folder), "personalised", site)).unlink(missing_ok=True)
    (folder / CALIBRATION).unlink(missing_ok=True)  # it was fitted to the models that were here before
    scorers = [site for site in present if site not in run.failures.of(run.round)]
    write_json(folder / "scores.json", cross_site_scores(run, models, scorers))
    compare_statistics(run, scorers)
    if absent := [site for site in run.sites if site not in delivered]:
        raise InputError(
            f"site '{absent[0]}' failed all {run.rounds} rounds and has no personalised model; {folder} has the models "
            f"of the other sites, and {run.output_dir / FAILURES} gives the reasons."
        )


def select_personalised(run: FederationState, sites: Sequence[str]) -> None:
    """Let each site select its personalised model; a site where this fails keeps its moving average."""
    shares = {}
    for site in tqdm(sites, desc="own rounds", unit="site", disable=not run.own_rounds):
        client = run.clients[site]
        before = copy.deepcopy(client.state_dict())
        with _left_out_if_it_fails(run, site, max(1, run.own_rounds)):
            shares[site] = client.select_personalised(run.weights, run.own_rounds, run.shares)
        if site not in shares:
            client.load_state_dict(before)
    if run.shares:
        write_json(run.output_dir / "models" / "shares.json", shares)


def cross_site_scores(
    run: FederationState, models: Mapping[str, Weights], scorers: Sequence[str]
) -> dict[str, float | None]:
    """Score each model at the other sites on their validation cases, and write ``cross_site.csv``.

    Args:
        run: The federation.
        models: "global" or name of a site -> weights of the model.
        scorers: Sites that score the models. A site that fails scores none.

    Returns:
        The content of ``scores.json``, see :func:`expert_scores`.
    """
    dice: dict[str, dict[str, float]] = {name: {} for name in models}
    shifts: list[float] = []
    for site in scorers:
        client = run.clients[site]
        with _left_out_if_it_fails(run, site, len(models)):
            found = {n: client.validate(w)["val_mean_dice"] for n, w in models.items() if n != site}
            shift = client.shift(run.weights)
            for name, value in found.items():
                dice[name][site] = value
            shifts += [] if shift is None else [shift]
    write_matrix(run.output_dir, dice)
    return expert_scores(dice, shifts)


def write_matrix(folder: Path, dice: Mapping[str, Mapping[str, float]]) -> None:
    """Write ``cross_site.csv``.

    Args:
        folder: Folder of the run.
        dice: model -> site -> validation Dice, without the model's own site.
    """
    rows = [{"model": n, "site": site, "dice": value} for n, at in dice.items() for site, value in at.items()]
    write_rows(folder / CROSS_SITE, MATRIX, rows)


def expert_scores(dice: Mapping[str, Mapping[str, float]], shifts: Sequence[float]) -> dict[str, float | None]:
    """Compute the content of ``scores.json``: one score per model, and the usual shift.

    Since some sites are more difficult than others, a personalised model is compared with the global model at each of
    the other sites: its score is the global model's mean over all sites plus the mean of these differences.

    Args:
        dice: model -> site -> validation Dice, without the model's own site.
        shifts: Shifts of the sites' validation cases from the global model.

    Returns:
        Model -> score in [0, 1], and "usual_shift"; None for values that could not be measured.
    """
    of_global = dice.get(GLOBAL, {})
    level = fmean(of_global.values()) if of_global else math.nan
    scores = {
        name: level + fmean(value - of_global[site] for site, value in at.items()) if of_global and at else math.nan
        for name, at in dice.items()
    }
    shift = fmean(shifts) if shifts else math.nan
    # what could not be measured is None: it is not the lowest possible score, and JSON has no NaN
    known = {name: min(1.0, max(0.0, score)) if math.isfinite(score) else None for name, score in scores.items()}
    return {**known, USUAL_SHIFT: shift if math.isfinite(shift) else None}


def compare_statistics(run: FederationState, scorers: Sequence[str]) -> None:
    """Write ``statistics.csv``: Dice of the global model with its running statistics and with those of each site."""
    rows = []
    for site in scorers:
        with _left_out_if_it_fails(run, site, 2):
            if dice := run.clients[site].dice_by_statistics(run.weights):
                rows.append({"site": site, **dice})
    write_rows(run.output_dir / STATISTICS, ("site", "global", "own"), rows)


@contextmanager
def _left_out_if_it_fails(run: FederationState, site: str, times: int) -> Iterator[None]:
    """Record that a site fails or exceeds `times` the time limit of a round, and continue with the other sites."""
    try:
        with time_limit(site, run.site_timeout * times):
            yield
    except Exception as error:
        run.failures.add(run.round, site, error)
        run.failures.write(run.output_dir)
