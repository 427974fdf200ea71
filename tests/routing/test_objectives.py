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
"""The objective of test-time routing: views and their inverse, scales of the terms, detached targets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import images, unet, untouched
from torch import Tensor

from shared_iopfl.routing.objectives import (
    RoutingObjective,
    View,
    ViewSampler,
    contour_band,
    entropy,
    foreground,
    probabilities,
)

# ---- views ----------------------------------------------------------------------------------------------------------


@given(
    flips=st.sets(st.sampled_from([0, 1, 2])),
    turns=st.integers(-1, 5),
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_undo_returns_every_pixel_to_its_place(flips, turns, shape):
    """For all flips and turns, in 2D and 3D, of square and oblong images."""
    view = View(flips=tuple(axis for axis in flips if axis < len(shape)), quarter_turns=turns)
    scan = images(2, 3, *shape)
    assert torch.equal(view.undo(view.apply(scan)), scan)


def test_a_view_moves_pixels_and_changes_intensities_as_documented():
    scan = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert View(flips=(0,)).apply(scan)[0, 0].tolist() == [[3, 4, 5], [0, 1, 2]]
    assert View(flips=(1,)).apply(scan)[0, 0].tolist() == [[2, 1, 0], [5, 4, 3]]
    assert View(quarter_turns=1).apply(scan)[0, 0].tolist() == [[2, 5], [1, 4], [0, 3]]
    assert View(gain=2, offset=1).apply(scan)[0, 0].tolist() == [[1, 3, 5], [7, 9, 11]]
    wide = images(1, 1, 64, 64)
    noise = View(noise=0.3, seed=1).apply(wide) - wide
    assert abs(float(noise.std()) - 0.3) < 0.02
    assert torch.equal(View(noise=0.3, seed=1).apply(wide) - wide, noise)
    assert not torch.equal(View(noise=0.3, seed=2).apply(wide) - wide, noise)


def pictures(views: list[View], scan: Tensor) -> list[str]:
    return [str(view.apply(scan).tolist()) for view in views]


@pytest.mark.parametrize("flips", [(), (0,), (1,), (0, 1), (2,), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("rotations", [False, True])
@pytest.mark.parametrize("square", [False, True])
def test_all_views_are_distinct_and_complete(flips, rotations, square):
    """`all` returns each view that the allowed flips and turns generate once, the identity first."""
    scan = torch.arange(27.0).reshape(1, 1, 3, 3, 3)
    views = ViewSampler(flips, rotations).all(square)
    found = pictures(views, scan)
    assert views[0] == View()
    assert len(set(found)) == len(found)
    turns = (range(4) if square else (0, 2)) if rotations else (0,)
    subsets = itertools.chain.from_iterable(itertools.combinations(flips, n) for n in range(len(flips) + 1))
    assert set(found) == set(pictures([View(s, t) for s, t in itertools.product(subsets, turns)], scan))
    drawn = [ViewSampler(flips, rotations, 0, 0).draw(torch.Generator().manual_seed(n), square) for n in range(20)]
    assert set(pictures(drawn, scan)) <= set(found)
    assert all(view.noise == 0 and view.gain == 1 and view.offset == 0 for view in drawn)


def test_square_images_with_rotations_have_eight_views_and_others_keep_their_shape():
    sampler = ViewSampler((0, 1), rotations=True)
    assert len(sampler.all()) == 8
    oblong = images(1, 1, 4, 6)
    assert all(view.apply(oblong).shape == oblong.shape for view in sampler.all(square=False))


def test_drawn_views_follow_the_generator_and_stay_in_range():
    """The same seed gives the same views; views differ between draws, and all flips and turns occur."""
    sampler = ViewSampler((0, 1), rotations=True, noise=0.2, intensity=0.3)
    with untouched():
        generator, again = (torch.Generator().manual_seed(0) for _ in range(2))
        drawn = [sampler.draw(generator) for _ in range(100)]
        assert drawn == [sampler.draw(again) for _ in range(100)]
    assert len(set(drawn)) == 100
    assert {view.quarter_turns for view in drawn} == {0, 1, 2, 3}
    assert {view.flips for view in drawn} == {(), (0,), (1,), (0, 1)}
    assert all(0.7 <= view.gain <= 1.3 and abs(view.offset) <= 0.3 and view.noise == 0.2 for view in drawn)
    assert {sampler.draw(generator, square=False).quarter_turns for _ in range(30)} == {0, 2}
    assert {view.flips for view in (ViewSampler((1,)).draw(generator) for _ in range(30))} == {(), (1,)}


# ---- the terms ------------------------------------------------------------------------------------------------------


@given(st.integers(2, 5), st.floats(0, 100), st.sampled_from(["softmax", "sigmoid"]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_entropy_lies_between_zero_and_one(classes, scale, output, seed):
    value = entropy(probabilities(scale * images(2, classes, 4, 4, seed=seed), output), output)
    assert -1e-5 <= float(value) <= 1 + 1e-5


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_entropy_is_one_for_a_uniform_and_zero_for_a_certain_prediction(output):
    unsure, sure = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    sure[:, 1] = 200
    sure[:, [0, 2]] = -200
    assert float(entropy(probabilities(unsure, output), output)) == pytest.approx(1, abs=1e-5)
    assert float(entropy(probabilities(sure, output), output)) == pytest.approx(0, abs=1e-5)


def blob(side: int, box: tuple[float, float, float, float]) -> Tensor:
    """A rectangle of ones, given by its edges as fractions of the image side."""
    mask = torch.zeros(1, 1, side, side)
    top, bottom, left, right = (round(edge * side) for edge in box)
    mask[..., top:bottom, left:right] = 1
    return mask


def test_contour_band_is_larger_for_a_ragged_than_for_a_compact_mask_of_the_same_area():
    compact = blob(96, (0.25, 0.75, 0.25, 0.75))
    ragged = torch.zeros_like(compact)
    ragged[..., ::2, :48] = 1
    assert compact.sum() == ragged.sum()
    assert contour_band(compact) < 0.5 * contour_band(ragged)
    assert contour_band(torch.ones(1, 1, 96, 96)) == 0
    assert contour_band(torch.zeros(1, 1, 96, 96)) == 0


def test_contour_band_is_the_share_of_pixels_near_the_contour():
    """A window of 5 pixels gives a band of two pixels on both sides of a straight edge."""
    half = torch.zeros(1, 1, 40, 40)
    half[..., 20:] = 1
    assert float(contour_band(half, window=5 / 40)) == pytest.approx(4 / 40)
    volume = torch.zeros(1, 1, 40, 40, 40)
    volume[..., 20:] = 1
    assert float(contour_band(volume, window=5 / 40)) == pytest.approx(4 / 40)


def test_single_class_softmax_pair_and_sigmoid_agree():
    """Two exclusive classes are one overlapping target, so that every term is equal."""
    logit, other = images(2, 1, 16, 16), images(2, 1, 16, 16, seed=1)
    view = View(gain=1.1)

    def objective(output: str, pair: Callable[[Tensor], Tensor], **weights: float) -> float:
        network = lambda x: pair(logit if torch.equal(x, logit) else other)  # noqa: E731
        return float(RoutingObjective(output, **weights)(network, logit, view))  # type: ignore[arg-type]

    for name in ("consistency", "entropy", "shape"):
        weights = {"consistency": 0.0, "entropy": 0.0, "shape": 0.0, name: 1.0}
        two = objective("softmax", lambda x: torch.cat([torch.zeros_like(x), x], 1), **weights)
        assert two == pytest.approx(objective("sigmoid", lambda x: x, **weights), rel=1e-5)
        assert two > 0


def test_foreground_is_all_but_the_background():
    probability = probabilities(images(2, 3, 4, 4), "softmax")
    assert torch.equal(foreground(probability, "softmax"), probability[:, 1:])
    assert torch.equal(foreground(probability, "sigmoid"), probability)


# ---- the objective --------------------------------------------------------------------------------------------------


def pixelwise(scan: Tensor) -> Tensor:
    """A network of a 1 x 1 convolution: (B, 1, *spatial) -> (B, 2, *spatial)."""
    return torch.cat([-scan, scan], 1)


@pytest.mark.parametrize("term", ["consistency", "entropy", "shape"])
def test_terms_do_not_depend_on_batch_or_image_size(term):
    """A repeated batch, and an image with twice the resolution, give the same value."""
    weights: dict[str, Any] = {"consistency": 0.0, "entropy": 0.0, "shape": 0.0, term: 1.0}
    objective, view = RoutingObjective("softmax", **weights), View(flips=(0,), gain=1.2, offset=0.1)
    smooth = F.interpolate(images(2, 1, 6, 6), (192, 192), mode="bicubic")
    value = float(objective(pixelwise, smooth, view))
    assert value > 1e-3
    assert float(objective(pixelwise, torch.cat([smooth, smooth]), view)) == pytest.approx(value, rel=1e-5)
    larger = F.interpolate(smooth, scale_factor=2, mode="nearest")
    assert float(objective(pixelwise, larger, view)) == pytest.approx(value, rel=0.02)


def test_consistency_target_is_detached():
    """The gradient is that of the view alone, without a second one through the target."""
    scan, weight = images(2, 1, 8, 8), torch.ones((), requires_grad=True)
    view = View(flips=(1,), gain=1.5)
    objective = RoutingObjective("softmax", consistency=1.0, entropy=0.0)
    (found,) = torch.autograd.grad(objective(lambda x: pixelwise(weight * x**2), scan, view), weight)
    target = probabilities(pixelwise(scan**2), "softmax")
    seen = probabilities(view.undo(pixelwise(weight * view.apply(scan) ** 2)), "softmax")
    (expected,) = torch.autograd.grad(F.mse_loss(seen, target), weight)
    torch.testing.assert_close(found, expected)
    assert found.abs() > 1e-3


def test_backward_through_one_term_after_the_other_is_backward_through_the_objective():
    scan, weight, view = images(2, 1, 32, 32), torch.ones((), requires_grad=True), View(flips=(1,), gain=1.5)
    objective = RoutingObjective("softmax", consistency=1.0, entropy=0.5, shape=0.2)

    def network(x: torch.Tensor) -> torch.Tensor:
        return pixelwise(weight * x**2)

    (expected,) = torch.autograd.grad(objective(network, scan, view), weight)
    terms = 0
    for term in objective.terms(network, scan, view):
        term.backward()
        terms += 1
    assert terms == 2
    torch.testing.assert_close(weight.grad, expected)
    only = RoutingObjective("softmax", consistency=1.0, entropy=0.0)
    assert len(list(only.terms(network, scan, view))) == 1


def test_consistency_is_zero_if_network_and_view_commute():
    objective = RoutingObjective("sigmoid", consistency=1.0, entropy=0.0)
    scan = images(2, 1, 8, 12)
    assert float(objective(pixelwise, scan, View(flips=(0,), quarter_turns=1))) == 0
    with torch.no_grad():
        assert float(objective(unet(channels=1), images(2, 1, 32, 32), View(flips=(0,)))) > 0


def test_objective_is_the_weighted_sum_of_its_terms():
    scan, view = images(2, 1, 32, 32), View(gain=1.3)

    def value(consistency: float, entropy: float, shape: float) -> float:
        return float(RoutingObjective("softmax", consistency, entropy, shape)(pixelwise, scan, view))

    total = 2 * value(1, 0, 0) + 3 * value(0, 1, 0) + 5 * value(0, 0, 1)
    assert value(2, 3, 5) == pytest.approx(total, rel=1e-5)
