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
"""The results of a federation with NVIDIA FLARE: files of the server, final scores, published personalised models."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared_iopfl.evaluation.scoring import Scoring
from shared_iopfl.federation.flare.job import read_state
from shared_iopfl.federation.flare.persistor import CHECKPOINT, RESULTS
from shared_iopfl.federation.simulation import Federation, tensorboard
from shared_iopfl.federation.updates import check_update
from shared_iopfl.federation.updates import draw as draw_history
from shared_iopfl.models.files import load_weights, model_path, save_atomically
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import whole_file
from shared_iopfl.utils.names import check_sites
from shared_iopfl.utils.tables import read_rows


def collect(result: Path, output_dir: Path, federation: Federation, run: str | None = None) -> dict[str, Any] | None:
    """Copy the newest results of the server to the output folder, which has the same layout.

    Args:
        result: Folder that contains the run of the server at any depth.
        output_dir: Output folder of the run.
        federation: The run.
        run: Identifier of the run whose results are accepted; None accepts any.

    Returns:
        The checkpoint, or None if there is none.
    """
    found = sorted(result.rglob(f"{RESULTS}/{CHECKPOINT}"), key=lambda path: path.stat().st_mtime)
    if not found:
        return None
    state = read_state(found[-1], federation)
    if run is not None and state["run"] != run:  # it belongs to an earlier run in the same workspace
        return None
    results = found[-1].parent
    for path in sorted(path for path in results.rglob("*") if path.is_file()):
        with whole_file(output_dir / path.relative_to(results)) as temporary:
            shutil.copyfile(path, temporary)
    return state


def draw(output_dir: Path) -> None:
    """Write the history as TensorBoard events, as the one-process run does."""
    with tensorboard(output_dir / "tensorboard") as board:
        draw_history(board, read_rows(output_dir / "history.csv"))


def score(scoring: Scoring, output_dir: Path, dataset_dir: Path, sites: Sequence[str], device: str | None) -> None:
    """Score the global model and each site's personalised model on the site's test cases, if all is on one machine.

    A site without a personalised model, because it failed every round, is left out.

    Args:
        scoring: The final scoring of the run.
        output_dir: Output folder of the run.
        dataset_dir: Folder of the sites.
        sites: Names of the sites.
        device: Device for the scoring; None keeps that of the config.
    """
    scoring.output_dir = str(output_dir)
    scoring.overrides |= {"dataset_dir": str(dataset_dir), **({"device": device} if device else {})}
    for site in scoring.tested(sites):
        folder = output_dir / "sites" / site
        if Path(model_path(str(folder), "personalised", site)).exists():
            common = {"role": "inside", "split": "test", "mode": "off"}
            scoring.score(site, "global", ckpt_dir=str(output_dir / "models"), **common)
            scoring.score(site, "personalised", ckpt_dir=str(folder), **common)


def publish_sites(output_dir: str, sites: Sequence[str]) -> list[Path]:
    """Publish personalised models: copy them from the folders of their sites to ``models``, as experts for others.

    Args:
        output_dir: Output folder of the run; at a site, its own.
        sites: Names of the sites whose models are published.

    Returns:
        Paths of the published files.

    Raises:
        InputError: If a site has no personalised model, or it does not fit the global model.
    """
    checked = {}
    for site in checked_names(sites):
        folder = Path(output_dir) / "sites" / site
        weights = load_weights(model_path(str(folder), "personalised", site))
        check_update(site, weights, load_weights(model_path(str(folder))))
        checked[site] = weights
    published = []
    for site, weights in checked.items():
        published.append(Path(model_path(str(Path(output_dir) / "models"), "personalised", site)))
        save_atomically(weights, published[-1])
    return published


def checked_names(sites: Sequence[str]) -> list[str]:
    """Return the names of sites if all can be names of FLARE's clients and of files.

    Raises:
        InputError: If they are not a list, or one of them is not allowed.
    """
    if isinstance(sites, str) or not sites:
        raise InputError(f"sites must be a list of names, such as \"['BIDMC','HK']\", but is {sites!r}.")
    for site in sites:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", str(site)) or str(site).lower() == "server":
            raise InputError(f"site {site!r} cannot be a client of FLARE: use letters, digits, '-' and '_'.")
    return check_sites(str(site) for site in sites)
