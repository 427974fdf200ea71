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
"""The results of a federation by NVIDIA FLARE: files of the server, final scores, published site models."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from shared_iopfl.evaluation.scoring import Scoring
from shared_iopfl.federation.flare.job import read_state
from shared_iopfl.federation.flare.persistor import CHECKPOINT, RESULTS
from shared_iopfl.federation.simulation import Federation
from shared_iopfl.federation.updates import check_update
from shared_iopfl.federation.updates import draw as draw_history
from shared_iopfl.models.files import load_weights, model_path, save_atomically
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import whole_file
from shared_iopfl.utils.names import check_sites
from shared_iopfl.utils.tables import read_rows


def collect(result: Path, output_dir: Path, federation: Federation, run: str | None = None) -> dict[str, Any] | None:
    """Bring what the server wrote last to the output folder, as which it is laid out.

    Args:
        result: a folder in which the server's run lies, at any depth.
        output_dir: of the run.
        federation: what is run.
        run: take no other run's; None: the last one's.

    Returns:
        The checkpoint, if there is one.
    """
    found = sorted(result.rglob(f"{RESULTS}/{CHECKPOINT}"), key=lambda path: path.stat().st_mtime)
    if not found:
        return None
    state = read_state(found[-1], federation)
    if run is not None and state["run"] != run:  # of an earlier run in the same workspace
        return None
    results = found[-1].parent
    for path in sorted(path for path in results.rglob("*") if path.is_file()):
        with whole_file(output_dir / path.relative_to(results)) as temporary:
            shutil.copyfile(path, temporary)
    return state


def draw(output_dir: Path) -> None:
    """TensorBoard events of the history, as the one-process run writes them."""
    folder = output_dir / "tensorboard"
    try:
        with SummaryWriter(str(folder)) as board:
            draw_history(board, read_rows(output_dir / "history.csv"))
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error}).") from error


def score(scoring: Scoring, output_dir: Path, dataset_dir: Path, sites: Sequence[str], device: str | None) -> None:
    """On one machine: every site's test cases, by the global model and by the site's own, from where the site keeps it.

    A site that has none, as it failed every round, is left out.
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
    """Publish personalised models: copy them from where their sites keep them to ``models``, as experts for others.

    Args:
        output_dir: of the run; at a site, its own.
        sites: whose models; nothing is published unnamed.

    Returns:
        The published files.

    Raises:
        InputError: where a site has no personalised model, or it does not fit the global one.
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
    """Sites' names, as which FLARE's clients and files can be called."""
    if isinstance(sites, str) or not sites:
        raise InputError(f"sites must be a list of names, such as \"['BIDMC','HK']\", but is {sites!r}.")
    for site in sites:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", str(site)) or str(site).lower() == "server":
            raise InputError(f"site {site!r} cannot be a client of FLARE: use letters, digits, '-' and '_'.")
    return check_sites(str(site) for site in sites)
