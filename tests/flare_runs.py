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
"""Common parts of the tests with NVIDIA FLARE: tiny sites, the one-process run, and comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared_iopfl.data.phantoms.sites import make_prostate_sites
from shared_iopfl.federation.simulation import Federation
from shared_iopfl.utils.tables import read_rows

REPOSITORY = Path(__file__).parents[1]
BUNDLE = REPOSITORY / "bundles" / "prostate_iopfl"
SITES = ["A", "B"]
TINY: dict[str, Any] = {
    "image_size": 32,
    "features": [4, 4, 4, 4, 4, 4],
    "passes": 1,
    "seed": 5,  # its networks differ in their Dice on the validation cases
    "val_interval": 1,
    "server_momentum": 0.5,
    "own_rounds": 1,
    # not 0, which gives the global model, and not 1, which may give an update that was sent
    "shares": [0.5],
    "tensorboard": False,
}
OF_THE_FEDERATION = ("server_momentum", "own_rounds", "shares")  # the others are settings of the training


def make_sites(folder: Path, sites: Sequence[str] = SITES) -> Path:
    """Make sites with different numbers of cases, each with training, validation and test cases."""
    make_prostate_sites(folder, sites=sites, cases=4, size=(32, 32, 8))
    for name in ("Case03.nii.gz", "Case03_segmentation.nii.gz"):
        (folder / sites[0] / name).unlink()
    return folder


def one_process(
    output_dir: Path,
    dataset_dir: Path,
    rounds: int = 2,
    bundle: Path = BUNDLE,
    sites: Sequence[str] = SITES,
    **own: Any,
) -> Federation:
    own = {**{name: TINY[name] for name in OF_THE_FEDERATION}, **own}
    overrides = {name: value for name, value in TINY.items() if name not in OF_THE_FEDERATION}
    overrides |= {"dataset_dir": str(dataset_dir), "device": "cpu", "val_interval": 0, "save_checkpoints": False}
    federation = Federation(str(bundle), sites, rounds, str(output_dir), overrides=overrides, seed=TINY["seed"], **own)
    federation.run()
    return federation


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def matrix(output_dir: Path) -> dict[tuple[str, str], float]:
    """The Dice of ``cross_site.csv``, by model and site."""
    return {(row["model"], row["site"]): float(row["dice"]) for row in read_rows(output_dir / "cross_site.csv")}


def figures(output_dir: Path) -> list[tuple[str, ...]]:
    rows = [row for row in read_rows(output_dir / "history.csv") if row["metric"] != "seconds"]
    return sorted(tuple(row.values()) for row in rows)
