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
"""The starting routes of a scan, and the statistics and views of its prediction."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import experts, images, mixture, unet, volume
from tiny_inferers import routing
from torch import nn

from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.routing.distances import distance_routes, distribution_distance
from shared_iopfl.routing.settings import preset
from shared_iopfl.utils.stacks import StackInferer, to_stack

# ---- where the routes start -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_soup_predicts_as_the_network_of_the_averaged_weights():
    network, scan = unet(), volume(3)
    plain = copy.deepcopy(network)
    plain.load_state_dict(mixture([network.state_dict(), *experts(2).values()], [1 / 3] * 3))  # type: ignore[list-item]
    torch.testing.assert_close(routing("soup")(scan, network), StackInferer()(scan, plain), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_global_start_predicts_as_the_global_model_within_a_thousandth():
    network, scan = unet(), volume(3)
    inferer = routing(overrides={"start": "global", "views": "none"})
    difference = (inferer(scan, network) - StackInferer()(scan, network)).abs().max()
    assert 0 < difference < 0.05
    torch.testing.assert_close(torch.tensor(inferer.reports[0]["routes"][0]), torch.tensor([0.998, 0.001, 0.001]))


@torch.no_grad()
def test_routes_by_distance_are_the_distance_routes_of_the_scan():
    network, scan = unet(), volume(3)
    inferer = routing()
    inferer(scan, network)
    space = {"global": network.state_dict(), **experts(2)}
    expected = distance_routes(distribution_distance(network, space, [to_stack(scan[0])]))
    for routes in inferer.reports[0]["routes"]:
        torch.testing.assert_close(torch.tensor(routes), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_average_over_views_is_the_mean_probability():
    """The logits are the logarithm of the mean probability over the allowed flips, and no others."""
    network, scan = unet(), images(1, 3, 32, 32)
    for output, activate in (("softmax", lambda x: x.softmax(1)), ("sigmoid", torch.sigmoid)):
        single = routing("soup", slices=None, output=output)
        double = routing("soup", slices=None, output=output, overrides={"views": "average"})
        flipped = single(scan.flip(2), network).flip(2)
        mean = (activate(single(scan, network)) + activate(flipped)) / 2
        torch.testing.assert_close(activate(double(scan, network)), mean, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("overrides", [{"per": "volume"}, {"per": "sample"}, {"statistics": 1.0}, {}])
def test_mask_does_not_depend_on_the_batch_size(overrides):
    overrides = {"start": "random", **overrides}
    whole, parts = (routing(overrides=overrides, batch_size=size)(volume(5), unet()) for size in (5, 2))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


# ---- statistics ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_default_is_the_mean_over_views_of_the_soup():
    network, scan = unet(), volume(3)
    inferer = TestTimeRoutingInferer(experts(2), settings=preset(), flips=[0])
    logits = inferer(scan, network)
    report = inferer.reports[0]
    plain = copy.deepcopy(network)
    plain.load_state_dict(mixture([network.state_dict(), *experts(2).values()], [1 / 3] * 3))  # type: ignore[list-item]
    each = [StackInferer()(scan, plain), StackInferer()(scan.flip(2), plain).flip(2)]
    mean = torch.stack([one.softmax(1) for one in each]).mean(0)
    torch.testing.assert_close(logits.softmax(1), mean, rtol=1e-3, atol=1e-4)
    assert report["statistics"] == [0.0]
    assert 0 < report["quality"] <= 1


@torch.no_grad()
@pytest.mark.parametrize("usual, shares", [(0.0, [0.0]), (1.1, [0.0]), (0.9, [0.0, 0.5])])
def test_a_scan_of_a_large_shift_is_segmented_by_its_own_statistics_as_well(usual, shares, monkeypatch):
    """A shift is large if it is more than three times the known usual shift; the mask is then that of both shares."""
    network, scan = unet(), volume(3)
    monkeypatch.setattr(TestTimeRoutingInferer, "_distances", lambda self, some, network, models: torch.tensor([3.0]))
    inferer = TestTimeRoutingInferer(experts(2), scores={"usual_shift": usual})
    logits = inferer(scan, network)
    assert inferer.reports[0]["statistics"] == shares
    given = TestTimeRoutingInferer(experts(2), settings=preset("default", {"statistics": shares}))
    torch.testing.assert_close(logits, given(scan, network))


@pytest.mark.parametrize(
    "scores, overrides, warned",
    [
        (None, {}, True),
        ({"A": 0.9}, {}, True),
        ({"usual_shift": 1.0}, {}, False),
        (None, {"statistics": 0.0}, False),
        (None, {"views": "none", "start": "uniform"}, False),
    ],
    ids=["no file", "no such number", "known", "statistics given", "shift not measured"],
)
@torch.no_grad()
def test_one_warning_if_auto_needs_a_usual_shift_that_the_models_lack(scores, overrides, warned, caplog):
    inferer, network = routing(overrides={"statistics": "auto", **overrides}, scores=scores), unet()
    for seed in range(2):
        inferer(volume(3, seed=seed), network)
    said = [record.message for record in caplog.records if "usual_shift" in record.message]
    assert len(said) == warned
    assert all("scores.json" in line and "stored statistics" in line for line in said)


@torch.no_grad()
def test_views_may_judge_a_mask_without_changing_it():
    """The slices that the scan is measured on are all slices of a short volume."""
    scan, network = volume(4), unet()
    plain, judged, averaged = (routing(overrides={"views": views}) for views in ("none", "judge", "average"))
    assert torch.equal(judged(scan, network), plain(scan, network))
    averaged(scan, network)
    assert "quality" not in plain.reports[0]
    assert judged.reports[0]["quality"] == averaged.reports[0]["quality"]


@torch.no_grad()
def test_several_shares_are_the_mean_of_each_alone():
    scan, network = volume(4), unet()
    settings = {"views": "none"}
    both = routing(overrides={**settings, "statistics": [0.25, 1.0]})(scan, network)
    each = [routing(overrides={**settings, "statistics": share})(scan, network) for share in (0.25, 1.0)]
    torch.testing.assert_close(both.softmax(1), (each[0].softmax(1) + each[1].softmax(1)) / 2, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("start", ["uniform", "distance"])
def test_the_shift_is_the_distance_from_the_global_model_and_changes_nothing(start):
    scan, network = volume(4), unet()
    inferer = routing(overrides={"start": start})
    logits = inferer(scan, network)
    space = {"global": network.state_dict()}
    expected = float(distribution_distance(network, space, [to_stack(scan[0])]).mean())
    assert inferer.reports[0]["shift"] == pytest.approx(expected, abs=1e-4)
    assert torch.equal(routing(overrides={"start": start}, scores={"usual_shift": 1e-6})(scan, network), logits)


@torch.no_grad()
def test_statistics_of_a_site_are_those_of_all_its_scans():
    near, far, network = volume(4), 10 * volume(4, seed=1), unet()
    overrides = {"statistics": 1.0, "views": "none"}
    site = routing(overrides=overrides, mode="site")
    site.fit([near, far], network)
    alone = routing(overrides=overrides, mode="site")
    alone.fit([near], network)
    assert site.site_network is not None
    assert alone.site_network is not None
    first = next(name for name, tensor in unet().state_dict().items() if name.endswith("running_var"))
    assert (site.site_network.state_dict()[first] > alone.site_network.state_dict()[first]).all()


@torch.no_grad()
def test_prediction_uses_the_statistics_of_the_whole_scan():
    """With the scan's statistics alone, the mask is that of the soup in training mode on the whole scan."""
    overrides = {"statistics": 1.0, "start": "uniform", "views": "none"}
    scan, network = volume(5), unet()
    logits = routing(overrides=overrides, batch_size=2)(scan, network)
    space = [network.state_dict(), *experts(2).values()]
    soup = unet()
    soup.load_state_dict({k: torch.stack([s[k].float() for s in space]).mean(0) for k in space[0]})
    for layer in soup.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    expected = StackInferer(batch_size=5)(scan, soup)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
