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
"""Where the routes and statistics of a scan start: by distances, scores and shift, whatever the batch size."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import experts, images, mixture, unet, volume
from tiny_inferers import routing
from torch import nn

from shared_iopfl.inferers import routing as inferers
from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.routing.distances import distance_routes, distribution_distance
from shared_iopfl.routing.settings import preset
from shared_iopfl.utils.stacks import StackInferer, to_stack

# ---- where the routes start -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_soup_serves_the_network_of_the_averaged_weights():
    network, scan = unet(), volume(3)
    plain = copy.deepcopy(network)
    plain.load_state_dict(mixture([network.state_dict(), *experts(2).values()], [1 / 3] * 3))  # type: ignore[list-item]
    torch.testing.assert_close(routing("soup")(scan, network), StackInferer()(scan, plain), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_global_start_serves_the_global_model_within_a_thousandth():
    network, scan = unet(), volume(3)
    inferer = routing(overrides={"start": "global", "average_views": False})
    difference = (inferer(scan, network) - StackInferer()(scan, network)).abs().max()
    assert 0 < difference < 0.05
    torch.testing.assert_close(torch.tensor(inferer.reports[0]["routes"][0]), torch.tensor([0.998, 0.001, 0.001]))


@torch.no_grad()
def test_without_a_shift_the_start_are_the_distance_routes_of_the_scan():
    network, scan = unet(), volume(3)
    inferer = routing(overrides={"usual_shift": 0.0})
    inferer(scan, network)
    space = {"global": network.state_dict(), **experts(2)}
    expected = distance_routes(distribution_distance(network, space, [to_stack(scan[0])]))
    for routes in inferer.reports[0]["routes"]:
        torch.testing.assert_close(torch.tensor(routes), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_scores_count_only_with_trust():
    """A trusted expert draws the routes; without trust, or without scores, they follow the distances alone."""
    network, scan, scores = unet(), volume(2), {"global": 0.1, "A": 0.9, "B": 0.1}
    trusting = routing(overrides={"trust": 1.0}, scores=scores)
    trusting(scan, network)
    assert min(routes[1] for routes in trusting.reports[0]["routes"]) > 0.99
    plain = routing()(scan, network)
    assert torch.equal(routing(overrides={"trust": 0.0}, scores=scores)(scan, network), plain)


@torch.no_grad()
def test_an_expert_without_score_is_trusted_no_more_than_the_worst():
    network, scan = unet(), volume(2)
    given = routing(overrides={"trust": 1.0}, scores={"global": 0.1, "A": 0.2, "B": 0.1})(scan, network)
    lacking = routing(overrides={"trust": 1.0}, scores={"global": 0.1, "A": 0.2})(scan, network)
    assert torch.equal(given, lacking)


@torch.no_grad()
def test_average_over_views_is_the_mean_probability():
    """Averaged logits are the logarithm of the mean probability over the flips that fit, and no other."""
    network, scan = unet(), images(1, 3, 32, 32)
    for output, activate in (("softmax", lambda x: x.softmax(1)), ("sigmoid", torch.sigmoid)):
        single = routing("soup", slices=None, output=output)
        double = routing("soup", slices=None, output=output, overrides={"average_views": True})
        flipped = single(scan.flip(2), network).flip(2)
        mean = (activate(single(scan, network)) + activate(flipped)) / 2
        torch.testing.assert_close(activate(double(scan, network)), mean, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_views_may_judge_a_mask_without_changing_it():
    scan, network = volume(4), unet()
    plain = routing(overrides={"average_views": False})
    judged = routing(overrides={"average_views": False, "judge_views": True})
    averaged = routing(overrides={"average_views": True})
    assert torch.equal(judged(scan, network), plain(scan, network))
    averaged(scan, network)
    assert "quality" not in plain.reports[0]
    assert judged.reports[0]["quality"] == averaged.reports[0]["quality"]


@torch.no_grad()
@pytest.mark.parametrize("overrides", [{"per": "volume"}, {"per": "sample"}, {"statistics": 1.0}, {}])
def test_mask_does_not_depend_on_the_batch_size(overrides):
    overrides = {"start": "random", **overrides}
    whole, parts = (routing(overrides=overrides, batch_size=size)(volume(5), unet()) for size in (5, 2))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


# ---- the usual shift -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_statistics_follow_the_shift():
    """The further a scan's features from what the global model remembers, the more of its own statistics are used."""
    near, far = volume(4), 10 * volume(4)
    network = unet().train()
    for _ in range(100):  # its batch norms remember scans like the near one
        network(to_stack(near[0]))
    network.eval()
    space = {"a": network.state_dict()}
    inferer = TestTimeRoutingInferer(space, settings=preset("default"), scores={"usual_shift": 0.2})
    one, other = (inferer.route_scan(to_stack(scan[0]), network)[1] for scan in (near, far))
    assert 0 <= one["shift"] < 0.2 < other["shift"]
    assert one["statistics"] == one["opening"] == 0 < other["statistics"] < 1
    assert other["statistics"] == pytest.approx(4 / (4 + 4) * (1 - 0.2 / other["shift"]), abs=2e-3)


@torch.no_grad()
def test_statistics_of_a_site_count_all_its_scans():
    scan, network = volume(4), unet()
    overrides = {"usual_shift": 0.0, "statistics": 1.0, "average_views": False}
    one = routing(overrides=overrides).route_scan(to_stack(scan[0]), network)[1]
    site = routing(overrides=overrides, mode="site").fit([scan, scan], network)
    assert one["statistics"] == pytest.approx(4 / (4 + 4), abs=1e-4)
    assert site["statistics"] == pytest.approx(8 / (8 + 4), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("quality", "share"), [([4, 3, 2, 1], 0), ([1, 3, 2, 2], 0.25), ([1, 2, 3, 4], 1), ([2] * 4, 0)]
)
@pytest.mark.parametrize("kind", ["average_views", "judge_views"])
def test_views_choose_how_much_of_its_statistics_a_site_uses(monkeypatch, quality, share, kind):
    """Nothing, a quarter, a half or all of it: what the views agree on best, the least of equals."""
    answers = iter(quality)
    monkeypatch.setattr(inferers, "view_agreement", lambda *_: {"quality": next(answers) / 10})
    views = {"average_views": False, kind: True}
    settings = {"usual_shift": 0.0, "statistics": 0.8, "prior": 0.0, "start": "uniform"}
    scan, network = volume(4), unet()
    chosen = routing(overrides={**settings, **views}, mode="site")
    report = chosen.fit([scan], network)
    assert report["statistics"] == pytest.approx(0.8 * share)
    assert report["quality"] == max(quality) / 10
    expected = routing(overrides={**settings, "statistics": 0.8 * share, "average_views": False}, mode="site")
    expected.fit([scan], network)
    for key, tensor in expected.site_network.state_dict().items():
        torch.testing.assert_close(chosen.site_network.state_dict()[key], tensor)


@torch.no_grad()
@pytest.mark.parametrize("overrides", [{"choose_statistics": False}, {"average_views": False}])
def test_without_a_choice_or_views_a_site_uses_its_statistics_as_set(overrides):
    settings = {"usual_shift": 0.0, "statistics": 0.8, "prior": 0.0, **overrides}
    report = routing(overrides=settings, mode="site").fit([volume(4)], unet())
    assert report["statistics"] == pytest.approx(0.8)
    assert "agreement_by_statistics" not in report


@torch.no_grad()
@pytest.mark.parametrize("scores", [{}, {"global": 0.8, "A": 0.81, "B": 0.79}])
def test_a_shift_leads_from_what_trust_chooses_to_the_distance_routes(scores):
    """Shut, where the shift is usual: by the scores alone, or the uniform mixture; open by a half: half way."""
    scan, network = volume(4), unet()
    free = routing(overrides={"usual_shift": 0.0}, scores=scores)
    free(scan, network)
    distance = torch.tensor(free.reports[0]["routes"])
    measured = routing(scores=scores)
    measured(scan, network)
    shift = measured.reports[0]["shift"]
    trusted = torch.softmax(torch.tensor([0.0, 1.0, -1.0] if scores else [0.0, 0.0, 0.0]), 0)
    for usual, opening in ((2 * shift, 0.0), (shift / 2, 0.5)):
        inferer = routing(scores={**scores, "usual_shift": usual})
        inferer(scan, network)
        expected = trusted + opening * (distance - trusted)
        torch.testing.assert_close(torch.tensor(inferer.reports[0]["routes"]), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_without_a_usual_shift_all_is_used():
    inferer = routing(overrides={"statistics": 0.5, "usual_shift": 0.0, "prior": 0.0, "start": "uniform"})
    inferer(volume(4), unet())
    assert inferer.reports[0]["statistics"] == 0.5
    assert "shift" not in inferer.reports[0]


@torch.no_grad()
def test_prediction_uses_the_statistics_of_the_whole_scan():
    """With the scan's own statistics alone, the mask is that of the soup in torch's training mode on the whole scan."""
    overrides = {"statistics": 1.0, "usual_shift": 0.0, "prior": 0.0, "start": "uniform", "average_views": False}
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
