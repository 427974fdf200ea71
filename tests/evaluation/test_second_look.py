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
"""A second look: which scans are segmented again, in which part, and that the mask lies in place in the scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, MetaTensor
from monai.transforms import Compose, Invertd, Resized
from tiny_scans import nifti

from shared_iopfl.data.loading import LoadCased
from shared_iopfl.evaluation.failed_scans import TolerantDataset, TolerantEvaluator, tolerant_collate
from shared_iopfl.evaluation.second_look import PART, CropToPartd, Part, SecondLook, part_around, target_size
from shared_iopfl.utils.errors import InputError

SIDE, SLICES = 16, 3  # of the network's input
USUAL = 0.5


class Bright(torch.nn.Module):
    """Foreground is what is bright. It counts its calls and keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[torch.Tensor] = []
        self.reports: list[dict[str, Any]] = []
        self.blind_after = 99  # calls after which it finds nothing

    def __call__(self, inputs: torch.Tensor, network: Any = None) -> torch.Tensor:
        self.shown.append(inputs)
        self.reports.append({"call": len(self.shown)})
        found = inputs - 0.5 if len(self.shown) <= self.blind_after else -torch.ones_like(inputs)
        return torch.cat([-found, found], 1)


def scan(x: slice, y: slice, side: int = 64) -> np.ndarray:
    values = np.zeros((side, side, SLICES), np.float32)
    values[x, y, 1:2] = 1
    return values


def look(folder: Path, inferer: Bright, threshold: float = 0.8, usual: float = USUAL) -> list[Any]:
    """Segment the scans of a folder; return their masks in the grid of the scan and the remarks."""
    transform = Compose(
        [LoadCased("image"), CropToPartd("image"), Resized("image", (SIDE, SIDE, -1), mode="trilinear")]
    )
    dataset = TolerantDataset([{"image": str(path)} for path in sorted(folder.glob("*.nii"))], transform)
    served: list[Any] = []

    def keep(data: dict) -> dict:
        served.append(((data["pred"].argmax(0) > 0).numpy(), data["image"].meta.get("remarks", "")))
        return data

    evaluator = TolerantEvaluator(
        output_dir=folder / "out",
        device=torch.device("cpu"),
        val_data_loader=DataLoader(dataset, batch_size=1, collate_fn=tolerant_collate),
        network=torch.nn.Identity(),
        inferer=inferer,
        postprocessing=Compose([Invertd("pred", transform, "image", nearest_interp=False), keep]),
        val_handlers=[SecondLook(usual, threshold, "softmax")],
    )
    evaluator.run()
    return served


def test_the_size_of_a_target_is_that_of_its_largest_slice():
    mask = torch.zeros(8, 8, 4)
    mask[:4, :4, 1], mask[0, 0, 2] = 1, 1
    assert target_size(mask) == pytest.approx(0.5)
    assert target_size(mask[:, :, 1]) == pytest.approx(0.5)


def test_a_part_contains_the_mask_with_a_margin_and_lies_within_the_scan():
    mask = torch.zeros(20, 20, 2)
    mask[0:4, 8:12] = 1
    assert part_around(mask, 0.4) == Part((0.0, pytest.approx(0.3)), (0.4, pytest.approx(0.7)))
    assert part_around(mask, 0.1) == Part((0.0, pytest.approx(0.375)), (0.25, pytest.approx(0.625)))  # not cut off
    assert part_around(mask, 1.0) is None


def test_a_small_target_is_segmented_again_in_its_usual_size_and_its_mask_lies_in_place(tmp_path: Path):
    """The first input shows 2 x 2 of its pixels, the second one as many as usual."""
    x, y = slice(8, 16), slice(40, 48)
    nifti(tmp_path / "a.nii", scan(x, y))
    inferer = Bright()
    ((mask, remarks),) = look(tmp_path, inferer)
    assert [target_size(shown[0, 0] > 0.5) for shown in inferer.shown] == [0.125, USUAL]
    assert np.array_equal(mask[..., 1], scan(x, y)[..., 1] > 0)
    assert remarks == "small target: segmented in 25% of the field of view"
    assert inferer.reports == [{"call": 2}]  # of the mask that is used


@pytest.mark.parametrize("options", [{}, {"threshold": 0.0}, {"usual": 0.0}])
def test_one_look_is_enough_for_a_usual_size_or_without_one(tmp_path: Path, options: dict[str, float]):
    small = bool(options)
    nifti(tmp_path / "a.nii", scan(slice(8, 16) if small else slice(8, 40), slice(8, 40)))
    inferer = Bright()
    ((_, remarks),) = look(tmp_path, inferer, **options)
    assert len(inferer.shown) == 1 and not remarks


def test_the_first_mask_is_kept_if_the_second_is_empty_and_an_empty_one_is_not_looked_at_again(tmp_path: Path):
    nifti(tmp_path / "a.nii", scan(slice(8, 16), slice(8, 16)))
    inferer = Bright()
    inferer.blind_after = 1
    ((mask, remarks),) = look(tmp_path, inferer)
    assert len(inferer.shown) == 2 and mask[9:15, 9:15, 1].all() and not remarks
    assert inferer.reports == [{"call": 1}]
    inferer.blind_after = 0
    ((mask, _),) = look(tmp_path, inferer)
    assert len(inferer.shown) == 3 and not mask.any()


def test_each_scan_is_looked_at_by_itself(tmp_path: Path):
    nifti(tmp_path / "a.nii", scan(slice(0, 32), slice(0, 32)))
    nifti(tmp_path / "b.nii", scan(slice(40, 48), slice(8, 16)))
    nifti(tmp_path / "c.nii", scan(slice(8, 40), slice(8, 40)))
    inferer = Bright()
    served = look(tmp_path, inferer)
    assert [bool(remarks) for _, remarks in served] == [False, True, False]
    places = ((slice(0, 32), slice(0, 32)), (slice(40, 48), slice(8, 16)), (slice(8, 40), slice(8, 40)))
    for (mask, _), (x, y) in zip(served, places):
        assert np.count_nonzero(mask[..., 1] != (scan(x, y)[..., 1] > 0)) <= 8  # corners are rounded


def test_a_remark_is_added_to_earlier_ones():
    image = MetaTensor(torch.rand(1, 8, 8), meta={"remarks": "a crop 1.5 times as wide as high"})
    cropped = CropToPartd("image")({"image": image, PART: Part((0.0, 0.25), (0.5, 0.75))})["image"]
    assert cropped.shape == (1, 4, 4)
    assert cropped.meta["remarks"] == (
        "a crop 1.5 times as wide as high; small target: segmented in 50% of the field of view"
    )


def test_a_batch_of_several_scans_is_rejected():
    with pytest.raises(InputError, match="batch size of 1, got 2: set second_look to 0"):
        SecondLook(USUAL, 0.8, "softmax").part(torch.zeros(2, 2, 4, 4))
