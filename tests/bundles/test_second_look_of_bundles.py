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
"""A second look in the bundles: the mask of a scan whose target is small comes from a part of the scan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fl_bundles import BUNDLES, NAMES
from monai.bundle import ConfigParser
from monai.transforms import LoadImage

from shared_iopfl.evaluation import second_look
from shared_iopfl.utils.reading import read_json
from shared_iopfl.utils.tables import read_rows

MIDDLE = second_look.Part((0.25, 0.25), (0.75, 0.75))


def masks(folder: Path) -> list[np.ndarray]:
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix in (".gz", ".png")]
    return [np.asarray(LoadImage(image_only=True)(path)).squeeze() for path in paths]


@pytest.mark.parametrize("bundle", NAMES)
@pytest.mark.parametrize("mode", ["episodic", "site", "off"])
def test_a_mask_of_the_part_lies_in_place_in_the_scan(
    bundle: str,
    mode: str,
    tmp_path: Path,
    make_sites: Callable,
    random_models: Callable,
    run_config: Callable,
    monkeypatch: pytest.MonkeyPatch,
):
    """Inference and scoring alike, with any mode."""
    data = make_sites(bundle, tmp_path / "data")
    common = {"ckpt_dir": random_models(tmp_path / "models", bundle), "mode": mode, "one_component": False}
    own = {"smooth_outlines": False, "crop": "never"} if "fundus" in bundle else {}
    once = {**common, **own, "second_look": 0, "dataset_dir": data / "E"}
    run_config("inference", bundle, **once, output_dir=tmp_path / "once", overlays=False)

    monkeypatch.setattr(second_look, "target_size", lambda mask: 0.1)  # masks of these models are large
    monkeypatch.setattr(second_look, "part_around", lambda mask, scale: MIDDLE)
    twice = {**common, **own, "second_look": 1.0, "target_size": 1.0}
    run_config("inference", bundle, **twice, dataset_dir=data / "E", output_dir=tmp_path / "twice", overlays=False)
    scored = {"dataset_dir": data, "site": "E", "split": "all", "model": "x", "ckpt": common["ckpt_dir"] / "model.pt"}
    run_config("evaluate", bundle, **twice, **scored, output_dir=tmp_path / "scores")
    for whole, *parts in zip(*(masks(tmp_path / name) for name in ("once", "twice", "scores"))):
        outside = np.ones(whole.shape, bool)
        outside[8:24, 8:24] = False  # of 32 x 32 pixels
        assert whole[outside].any()
        for part in parts:
            assert part.shape == whole.shape and part.any() and not part[outside].any()
    if mode == "episodic":
        rows = read_rows(tmp_path / "twice" / "review.csv")
        assert rows and all("small target: segmented in 50% of the field of view" in row["reasons"] for row in rows)
        assert len(rows) == len(masks(tmp_path / "twice"))


@pytest.mark.parametrize("bundle", NAMES)
@pytest.mark.parametrize("run_name", [None, "a run of MONAI FL"])
def test_the_usual_size_is_that_of_the_models_and_not_of_those_that_a_federation_trains(
    bundle: str, run_name: str | None
):
    """A client of MONAI FL evaluates weights of the server in a bundle that may hold other models."""
    root = BUNDLES / bundle
    config = ConfigParser()
    config.read_config(str(root / "configs" / "evaluate.json"))
    config.update({"bundle_root": str(root), "run_name": run_name})
    calibrated = read_json(root / "models" / "calibration.json")["target_size"]
    assert config.get_parsed_content("target_size") == (0.0 if run_name else calibrated)
