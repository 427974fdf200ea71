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
"""Training targets are the area that a target has of each pixel of the network's grid: nothing is shifted or lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from torch import Tensor

ROOT = Path(__file__).parents[2]
BUNDLES = ("prostate_iopfl", "fundus_iopfl")


def config(bundle: str, **overrides: Any) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(str(ROOT / "bundles" / bundle / "configs" / "train.json"))
    parser.update({"device": "cpu", "features": 4, **overrides})
    return parser


def ellipses(size: int = 128) -> Tensor:
    """Two targets, one inside the other, that are symmetric about no axis: (2, H, W)."""
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    radius = [((y - 0.53 * size) / a) ** 2 + ((x - 0.41 * size) / b) ** 2 for a, b in ((33.3, 25.1), (14.9, 18.2))]
    return torch.stack([(r <= 1).float() for r in radius])


def on_grid(bundle: str, targets: Tensor, size: int, soft: bool) -> Tensor:
    """Targets (T, H, W) on the network's grid, by the config's transforms from the resizing on."""
    parser = config(bundle, image_size=size, soft_labels=soft)
    items = parser["preprocessing_transforms"]
    resize = next(n for n, item in enumerate(items) if item["_target_"].endswith("ResizedByParts"))
    parser["resize"] = {**items[resize], "allow_missing_keys": True}
    volume = bundle == "prostate_iopfl"
    targets = targets[..., None].expand(-1, -1, -1, 3).clone() if volume else targets
    resized = parser.get_parsed_content("resize")({"label": targets})["label"].as_tensor()
    return resized[..., 1] if volume else resized


def centre(target: Tensor) -> Tensor:
    """The centre of mass (T, 2), in units of the picture's width."""
    along = (torch.arange(target.shape[-1]) + 0.5) / target.shape[-1]
    return torch.stack([target.sum(2) @ along, target.sum(1) @ along], 1) / target.sum((1, 2))[:, None]


def reachable_dice(target: Tensor, native: Tensor) -> Tensor:
    """Dice of a network that predicted its target exactly."""
    mask = torch.nn.functional.interpolate(target[None], native.shape[1:], mode="bilinear")[0] >= 0.5
    return 2 * (mask * native).sum((1, 2)) / (mask.sum((1, 2)) + native.sum((1, 2)))


@pytest.mark.parametrize("size", [64, 32])
@pytest.mark.parametrize("bundle", BUNDLES)
def test_targets_are_areas(bundle: str, size: int) -> None:
    """Soft targets keep area and centre of mass, and more of the outline; nearest neighbours shift it."""
    native = ellipses()
    hard, soft = (on_grid(bundle, native, size, soft) for soft in (False, True))
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert soft.min() >= 0 and soft.max() <= 1 and len(soft.unique()) > 2
    assert torch.allclose(soft.mean((1, 2)), native.mean((1, 2)), atol=1e-6)
    assert torch.allclose(centre(soft), centre(native), atol=0.05 / 128)  # a twentieth of a native pixel
    assert (centre(native) - centre(hard)).mean() > 0.3 / 128  # of the half pixel, to one side
    assert (reachable_dice(soft, native) > reachable_dice(hard, native)).all()
    assert (reachable_dice(soft, native) > 0.98).all()


@pytest.mark.parametrize("size, dtype", [(128, torch.uint8), (256, torch.uint8), (96, torch.float16)])
def test_labels_of_volumes_are_cached_in_one_byte_where_this_is_exact(size: int, dtype: torch.dtype) -> None:
    """Labels that are not resampled, or whose pixels are repeated, have whole numbers."""
    parser, targets = config("prostate_iopfl", image_size=size), on_grid("prostate_iopfl", ellipses(), size, soft=True)
    last = [item["keys"] == "label" for item in parser["preprocessing_transforms"]]
    index = len(last) - 1 - last[::-1].index(True)
    cached = parser.get_parsed_content(f"preprocessing_transforms#{index}")({"label": targets})["label"]
    assert cached.dtype == dtype
    assert torch.equal(cached.float(), targets.half().float())


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("bundle", BUNDLES)
def test_augmentation_keeps_them_so(bundle: str, soft: bool) -> None:
    """What is turned and scaled is interpolated as the targets are: soft between their values, hard by neighbours."""
    parser = config(bundle, image_size=64, soft_labels=soft)
    items = parser["train#augmentation_transforms"]
    index = next(n for n, item in enumerate(items) if item["_target_"] == "RandAffined")
    affine = parser.get_parsed_content(f"train#augmentation_transforms#{index}").set_random_state(1)
    affine.prob = affine.rand_affine.prob = 1.0
    targets = ellipses(64)
    turned = affine({"image": torch.rand(3, 64, 64), "label": targets})["label"].as_tensor()
    assert not torch.equal(turned, targets)
    assert (len(turned.unique()) > 2) == soft


@pytest.mark.parametrize("bundle", BUNDLES)
def test_the_loss_is_least_where_the_probabilities_are_the_areas(bundle: str) -> None:
    """The cross-entropy's minimum is the soft target itself, not its rounding."""
    loss = config(bundle).get_parsed_content("loss")
    area = torch.full((1, 1, 8, 8), 0.3)
    targets = torch.cat([1 - area, area], 1)

    def at(probability: float) -> float:
        logit = torch.logit(torch.tensor(probability))
        p = torch.full((1, 1, 8, 8), float(logit))
        logits = torch.cat([torch.zeros_like(p), p], 1) if bundle == "prostate_iopfl" else torch.cat([-p, p], 1)
        return float(loss(logits, targets))

    assert at(0.3) < min(at(0.05), at(0.6), at(0.95))


def test_hard_labels_train_as_before() -> None:
    """Targets in two channels give what the loss gave with one channel that it spread out itself."""
    from monai.losses import DiceCELoss

    logits = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    label = (ellipses(16)[:1] > 0).float()[None].expand(2, -1, -1, -1)
    before = DiceCELoss(include_background=True, to_onehot_y=True, softmax=True, batch=True)(logits, label)
    now = config("prostate_iopfl").get_parsed_content("loss")(logits, torch.cat([1 - label, label], 1))
    assert torch.allclose(now, before, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("bundle", BUNDLES)
def test_validation_scores_the_half_of_soft_targets_and_leaves_an_empty_reference_out(bundle: str) -> None:
    """The targets' outlines, rounded, are a Dice of 1; a target that is nowhere has none and takes no part."""
    parser = config(bundle, image_size=32)
    targets = on_grid(bundle, ellipses(), 32, soft=True)
    if bundle == "prostate_iopfl":
        targets = torch.stack([1 - targets[0], targets[0]])
    postprocess = parser.get_parsed_content("validate#postprocessing")
    dice = parser.get_parsed_content("validate#key_metric#val_mean_dice").metric_fn
    logits = targets - 0.499 + torch.tensor([0.0, 0.001])[:, None, None]  # a half counts as a whole
    empty = targets.clone()
    empty[1] = 0
    for label in (targets, empty):
        case = postprocess({"pred": logits.clone(), "label": label})
        dice(case["pred"][None], case["label"][None])
    assert float(dice.aggregate()) == 1
