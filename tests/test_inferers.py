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
"""Inference: test-time routing that leaks nothing and serves nothing worse than its start."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import pytest
import torch
from networks import ARCHITECTURES, experts, images, make, mixture, unet, untouched, volume
from torch import Tensor, nn

from shared_iopfl.distances import distance_routes, distribution_distance
from shared_iopfl.errors import InputError
from shared_iopfl.inferers import TestTimeRoutingInferer
from shared_iopfl.objectives import RoutingObjective, View, ViewSampler
from shared_iopfl.routers import Router
from shared_iopfl.routing import RoutedNetwork
from shared_iopfl.settings import PRESETS, RoutingSettings, preset
from shared_iopfl.stacks import StackInferer, to_stack

ADAPTING = {"steps": 2, "agreement": 0.0}
# an adaptation that improves its objective on any network, so that the guard lets it pass
LEARNT = {"steps": 3, "learning_rate": 0.1, "agreement": 0.0, "consistency": 0.0, "entropy": 1.0, "shape": 0.0}


def routing(name: str = "default", overrides: Mapping[str, Any] | None = None, **kwargs: Any) -> TestTimeRoutingInferer:
    """Running statistics unless told otherwise: most properties are about routes, not about the shift dial."""
    if name in ("default", "adapted"):
        overrides = {"statistics": 0.0, **(overrides or {})}
    return TestTimeRoutingInferer(experts(2), settings=preset(name, overrides), **{"flips": [0], **kwargs})


@torch.no_grad()
@pytest.mark.parametrize("kwargs", [{"mode": "off"}, {"experts": {}}, {"experts": None}])
def test_without_routing_it_is_plain_inference(kwargs):
    network, scan = unet(), volume(3)
    inferer = TestTimeRoutingInferer(**{"experts": experts(2), **kwargs})
    assert torch.equal(inferer(scan, network), StackInferer()(scan, network))
    assert not inferer.reports


@torch.no_grad()
def test_a_site_that_asks_for_its_own_model_gets_that_model():
    """A network that is one of the experts is not routed; after it, the global model is as before."""
    inferer, scan = routing(), volume(3)
    before = inferer(scan, unet())
    for number, expert in enumerate(experts(2).values(), 1):
        chosen = unet(number)
        assert all(torch.equal(tensor, expert[key]) for key, tensor in chosen.state_dict().items())
        assert torch.equal(inferer(scan, chosen), StackInferer()(scan, chosen))
    assert len(inferer.reports) == 1
    assert torch.equal(inferer(scan, unet()), before)


@torch.no_grad()
def test_its_attributes_can_be_logged():
    """MONAI Label prints them at every request: thousands of lines of weights would bury all else."""
    inferer = routing()
    inferer(volume(2), unet())
    assert len(str(inferer.__dict__)) < 20_000


# ---- every preset, every kind of input ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_presets_run_on_images_and_volumes(name, mode):
    """Finite logits of the right shape, one report a scan, and neither network nor random state is touched."""
    overrides = {"steps": min(1, PRESETS[name].steps)}
    build = ARCHITECTURES["BasicUNet 2D"][0] if mode is torch.no_grad else unet
    network, other = make(build, 0), make(build, 1)
    network.train()
    with untouched(network, other):
        for depth in (1, 2, 5):
            inferer = routing(name, overrides=overrides, batch_size=3)
            inferer.experts = {"A": other.state_dict()}
            with mode():
                logits = inferer(volume(depth), network)
            assert logits.shape == (1, 2, 32, 32, depth)
            assert torch.isfinite(logits).all()
        inferer = routing(name, overrides=overrides, slices=None, rotations=True)
        inferer.experts = {"A": other.state_dict()}
        with mode():
            logits = inferer(images(2, 3, 32, 32), network)
        assert logits.shape == (2, 2, 32, 32)
        assert torch.isfinite(logits).all()
    assert len(inferer.reports) == 2
    assert not logits.requires_grad


@pytest.mark.parametrize("per", ["sample", "volume", "layer"])
@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 64, 32)])
def test_adapts_for_every_kind_of_routes_and_outputs(per, output, shape):
    overrides = {"per": per, "shape": 0.1, "dropout": 0.2, "affine": True, **ADAPTING}
    inferer = routing(overrides=overrides, output=output, slices=None, rotations=True)
    assert torch.isfinite(inferer(images(*shape), unet())).all()
    report = inferer.reports[0]
    assert {"decision", "reason", "experts", "layers", "routes", "seconds"} <= set(report)
    assert {"objective_start", "objective_end", "agreement"} <= set(report)
    assert report["experts"] == ["global", "A", "B"]
    routes = torch.tensor(report["routes"])
    assert routes.shape == (len(report["layers"]), 3)
    torch.testing.assert_close(routes.sum(1), torch.ones(len(routes)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan", [torch.zeros(1, 1, 32, 32, 2), torch.full((1, 1, 32, 32, 2), 1e6), 1e-6 * volume(2)])
@pytest.mark.parametrize("name", PRESETS)
def test_odd_scans_do_not_break_it(scan, name):
    """Constant, huge and nearly empty images give finite logits."""
    logits = routing(name, overrides={"steps": min(1, PRESETS[name].steps)})(scan, unet())
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_volumes_of_a_3d_network():
    """slices=None with a 3D network; turns only where the first two axes are equally long."""
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2)).eval()
    space = {"A": copy.deepcopy(network).state_dict()}
    seen: list[tuple[int, ...]] = []
    inferer = TestTimeRoutingInferer(space, slices=None, rotations=True, settings=preset("adapted", ADAPTING))
    for shape in ((8, 8, 4), (8, 4, 4)):
        with torch.no_grad():
            logits = inferer(images(1, 1, *shape), network)
        assert logits.shape == (1, 2, *shape)
        routed = inferer._routed(network)
        routed.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    assert set(seen) == {(8, 4, 4)}, "an oblong plane is not to be turned by 90 degrees"


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
def test_without_dial_the_start_are_the_distance_routes_of_the_scan():
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


# ---- the shift dial -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_dial_turns_with_the_shift():
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
def test_statistics_of_more_scans_are_not_used_more_than_those_of_one():
    """What a site's photographs have in common beside the scanner does not average out."""
    scan, network = volume(4), unet()
    overrides = {"usual_shift": 0.0, "statistics": 1.0}
    one = routing(overrides=overrides).route_scan(to_stack(scan[0]), network)[1]
    site = routing(overrides=overrides, mode="site").fit([scan, scan], network)
    assert one["statistics"] == site["statistics"] == pytest.approx(4 / (4 + 4))


@torch.no_grad()
@pytest.mark.parametrize("scores", [{}, {"global": 0.8, "A": 0.81, "B": 0.79}])
def test_dial_leads_from_what_trust_chooses_to_the_distance_routes(scores):
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
def test_without_a_usual_shift_the_dial_is_off():
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


@torch.no_grad()
def test_site_network_keeps_the_sites_statistics():
    """In mode "site" the blended statistics are baked in: a plain network, the same for every batch size."""
    inferer = routing(overrides={"statistics": 1.0, "average_views": False}, mode="site")
    report = inferer.fit([3 * volume(4), 3 * volume(3, seed=1)], unet())
    assert 0 < report["statistics"] < 1
    site = inferer.site_network
    assert site is not None
    assert set(site.state_dict()) == set(unet().state_dict())
    one = StackInferer(batch_size=1)(volume(5), site)
    torch.testing.assert_close(inferer(volume(5), unet()), one, rtol=1e-4, atol=1e-5)


# ---- nothing leaks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_mask_does_not_depend_on_what_was_served_before(name):
    """A, B, A: both As are the same to the bit, as is A from a fresh inferer; another seed may differ."""
    network = unet()
    overrides = dict(LEARNT) if PRESETS[name].steps else {}
    inferer = routing(name, overrides=overrides)
    a, b = volume(3, seed=1), 2 * volume(4, seed=2) + 1
    first, other, again = (inferer(scan, network) for scan in (a, b, a))
    assert torch.equal(first, again)
    assert torch.equal(routing(name, overrides=overrides)(a, network), first)
    assert torch.equal(routing(name, overrides=overrides)(torch.cat([a, a]), network)[1:], first)
    assert torch.equal(routing(name, overrides=overrides)(b, network), other)
    reports = [{key: value for key, value in report.items() if key != "seconds"} for report in inferer.reports]
    assert reports[0] == reports[2]
    if overrides:
        assert [report["decision"] for report in reports] == ["adapted"] * 3, "or there was nothing that could leak"


def test_interrupted_adaptation_leaves_nothing_behind(monkeypatch):
    """A scan that fails half way through its adaptation does not colour the next one."""
    network, scan = unet(), volume(2)
    inferer = routing("paper", overrides=LEARNT)
    expected = inferer(scan, network)
    predict, calls = inferer._predict, []

    def fail(stack: Tensor, routed: RoutedNetwork) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return predict(stack, routed)

    monkeypatch.setattr(inferer, "_predict", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        inferer(volume(3, seed=5), network)
    assert torch.equal(inferer(scan, network), expected)


def test_two_threads_are_served_as_one_by_one():
    network, scans = unet(), [volume(2, seed=n) for n in range(4)]
    inferer = routing("adapted", overrides=LEARNT)
    alone = [inferer(scan, network) for scan in scans]
    served: dict[int, Tensor] = {}

    def serve(numbers: list[int]) -> None:
        for number in numbers:
            with torch.no_grad():
                served[number] = inferer(scans[number], network)

    threads = [threading.Thread(target=serve, args=(numbers,)) for numbers in ([0, 1], [2, 3], [3, 0])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(served[number], alone[number]) for number in range(4))


def changed_in_place(network: nn.Module, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            tensor.copy_(state[key])


def changed_by_data(network: nn.Module, state: dict[str, Tensor]) -> None:
    network.load_state_dict({k: v for k, v in state.items() if "running" in k}, strict=False)
    for name, parameter in network.named_parameters():
        parameter.data = state[name].clone()


CHANGES = {
    "load_state_dict": lambda network, state: network.load_state_dict(state),
    "assign": lambda network, state: network.load_state_dict(copy.deepcopy(state), assign=True),
    "in place": changed_in_place,
    "data": changed_by_data,
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_changed_network_is_routed_anew_and_an_unchanged_one_is_not(change):
    """However the global model gets its new weights, the next scan is routed from them."""
    network, scan = unet(), volume(2)
    inferer = routing("soup")
    before = inferer(scan, network)
    built = inferer._routed(network)
    assert inferer._routed(network) is built
    CHANGES[change](network, unet(7).state_dict())
    after = inferer(scan, network)
    assert torch.equal(after, routing("soup")(scan, unet(7)))
    assert not torch.equal(after, before)
    assert torch.equal(inferer(scan, unet()), before)


def test_network_made_under_inference_mode_is_served():
    """Inference tensors have no version and allow no gradient; neither is needed of the network's own."""
    with torch.inference_mode():
        network = unet()
        logits = routing("adapted", overrides=LEARNT)(volume(2), network)
    assert torch.equal(logits, routing("adapted", overrides=LEARNT)(volume(2), unet()))


def test_experts_are_not_kept_in_touch_with_the_live_network():
    """The routing space is a copy: training the network on does not change what an expert was, nor the other way."""
    network = unet()
    space = experts(2)
    kept = copy.deepcopy(space)
    TestTimeRoutingInferer(space, settings=preset("adapted", LEARNT))(volume(2), network)
    assert all(torch.equal(tensor, kept[site][key]) for site in space for key, tensor in space[site].items())


def test_adapted_router_is_what_predicts_under_autocast():
    """With half precision as without, what adaptation changed reaches the mask."""
    overrides = {**LEARNT, "per": "sample", "average_views": False}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        inferer = routing(overrides=overrides)
        adapted = inferer(volume(2), unet())
        start = routing(overrides={**overrides, "steps": 0})(volume(2), unet())
    assert inferer.reports[0]["decision"] == "adapted"
    assert not torch.equal(adapted, start)


# ---- the guard ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["sample", "layer"])
def test_diverged_adaptation_is_refused(per):
    """With an absurd learning rate the start is served, to the bit, and the report says why."""
    overrides = {"per": per, "affine": True, "agreement": 0.0}
    inferer = routing(overrides={**overrides, "steps": 3, "learning_rate": 1e30})
    logits = inferer(volume(2), unet())
    assert torch.equal(logits, routing(overrides=overrides)(volume(2), unet()))
    assert inferer.reports[0]["decision"] == "start"
    assert inferer.reports[0]["reason"] == "adaptation became non-finite"


def harmful(routed: RoutedNetwork, some: Tensor) -> None:
    with torch.no_grad():
        for parameter in routed.trainable():
            parameter.add_(images(*parameter.shape, seed=4))


@pytest.mark.parametrize("after, agreement, reason", [(2, 1, "improve"), (1, 1, "improve"), (0.5, 0.89, "strays")])
def test_guard_refuses_what_is_no_better_and_what_strays(monkeypatch, after, agreement, reason):
    inferer, scan, values = routing("adapted"), volume(2), iter((1.0, after))
    monkeypatch.setattr(inferer, "_adapt", harmful)
    monkeypatch.setattr(inferer, "_objective_value", lambda *_: next(values))
    monkeypatch.setattr(inferer, "_agreement", lambda *_: agreement)
    logits = inferer(scan, unet())
    assert torch.equal(logits, routing()(scan, unet()))
    assert inferer.reports[0]["decision"] == "start"
    assert reason in inferer.reports[0]["reason"]
    plain = routing()
    plain(scan, unet())
    assert inferer.reports[0]["routes"] == plain.reports[0]["routes"]


def _climbing(term: torch.Tensor) -> torch.Tensor:
    return -term if term.requires_grad else term


@pytest.mark.parametrize("rate, kept", [(0.1, True), (0.01, True), (-0.1, False), (-0.01, False)])
def test_what_is_served_never_has_a_worse_objective_than_the_start(rate, kept, monkeypatch):
    """Steps that climb instead (a negative rate) are never served, steps that descend are."""
    inferer, scan = routing(overrides={**LEARNT, "learning_rate": abs(rate)}), volume(2)
    if rate < 0:
        terms = RoutingObjective.terms
        monkeypatch.setattr(RoutingObjective, "terms", lambda *args: (_climbing(term) for term in terms(*args)))
    logits = inferer(scan, unet())
    report = inferer.reports[0]
    assert (report["objective_end"] < report["objective_start"]) == kept
    assert (report["decision"] == "adapted") == kept
    assert torch.equal(logits, routing()(scan, unet())) == (not kept)


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_agreement_is_the_dice_of_the_two_masks(output):
    masks = torch.zeros(2, 1, 4, 4)
    masks[0, :, :2], masks[1, :, 1:2] = 1, 1
    logits = 2 * masks - 1
    logits = logits if output == "sigmoid" else torch.cat([-logits, logits], 1)
    inferer = routing(output=output)
    assert inferer._agreement(logits[:1], logits[1:]) == pytest.approx(2 * 4 / (8 + 4))
    empty = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1) if output == "softmax" else torch.tensor([[[[-1.0]]]])
    assert inferer._agreement(empty, empty) == 1


def test_adaptation_sees_new_views_and_dropout_masks_each_step_and_none_in_prediction(monkeypatch):
    inferer = routing("paper", overrides={"steps": 4})
    drawn: list[View] = []
    generators: list[torch.Generator | None] = []
    draw, predict = ViewSampler.draw, inferer._predict

    def draw_and_note(*args: Any) -> View:
        drawn.append(draw(*args))
        return drawn[-1]

    def predict_and_note(stack: Tensor, routed: RoutedNetwork) -> Tensor:
        generators.append(cast(Router, routed._routed[0].routes).generator)
        return predict(stack, routed)

    monkeypatch.setattr(ViewSampler, "draw", draw_and_note)
    monkeypatch.setattr(inferer, "_predict", predict_and_note)
    inferer(volume(2), unet())
    assert len({view.seed for view in drawn[2:6]}) == 4
    assert drawn[:2] == drawn[6:], "the objective is compared over the same views before and after"
    assert generators == [None, None]


def test_adaptation_takes_evenly_spaced_slices(monkeypatch):
    """At most adapt_slices of them, spread over the volume."""
    inferer = routing(overrides={**ADAPTING, "adapt_slices": 3}, batch_size=2)
    seen: list[Tensor] = []
    monkeypatch.setattr(inferer, "_adapt", lambda routed, some: seen.append(some))
    scan = torch.arange(9.0).expand(1, 1, 32, 32, 9)
    inferer(scan, unet())
    assert seen[0][:, 1, 0, 0].tolist() == [1, 4, 7]


# ---- mode "site" ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, {**LEARNT, "affine": True}])
def test_site_mode_serves_the_plain_network_that_fit_made(overrides):
    network, scans = unet(), [volume(3, seed=n) for n in range(3)]
    inferer = routing(overrides={**overrides, "average_views": False}, mode="site")
    with untouched(network), torch.inference_mode():
        report = inferer.fit(scans, network)
    site = inferer.site_network
    assert site is not None
    assert type(site) is type(network)
    assert list(site.state_dict()) == list(network.state_dict())
    assert report["scans"] == 3
    assert report["decision"] == ("adapted" if overrides else "start")
    with torch.no_grad():
        torch.testing.assert_close(inferer(scans[0], network), StackInferer()(scans[0], site))
        if not overrides:
            routes = torch.tensor(report["routes"])[0]
            mixed = mixture([network.state_dict(), *experts(2).values()], routes)  # type: ignore[list-item]
            for key, tensor in site.state_dict().items():
                torch.testing.assert_close(tensor, mixed[key], rtol=1e-4, atol=1e-5)


def test_site_routes_are_those_of_the_mean_distance():
    network, scans = unet(), [volume(3), 4 * volume(2, seed=1)]
    space = {"global": network.state_dict(), **experts(2)}
    distances = [distribution_distance(network, space, [to_stack(scan[0])]) for scan in scans]
    report = routing(overrides={"usual_shift": 0.0}, mode="site").fit(scans, network)
    expected = distance_routes(torch.stack(distances).mean(0))
    torch.testing.assert_close(torch.tensor(report["routes"][0]), expected, rtol=1e-4, atol=1e-5)


def test_site_adapts_on_slices_of_every_scan(monkeypatch):
    """adapt_slices is a number a scan, not for the site."""
    inferer = routing(overrides={**ADAPTING, "adapt_slices": 2}, mode="site")
    seen: list[Tensor] = []
    monkeypatch.setattr(inferer, "_adapt", lambda routed, some: seen.append(some))
    inferer.fit([volume(5, seed=n) for n in range(3)], unet())
    assert len(seen[0]) == 6


def test_refused_site_adaptation_leaves_the_start(monkeypatch):
    inferer = routing("adapted", mode="site")
    monkeypatch.setattr(inferer, "_adapt", harmful)
    monkeypatch.setattr(inferer, "_agreement", lambda *_: 0.0)
    assert inferer.fit([volume(2)], unet())["decision"] == "start"
    start = routing(mode="site")
    start.fit([volume(2)], unet())
    assert inferer.site_network is not None
    assert start.site_network is not None
    for one, other in zip(inferer.site_network.state_dict().values(), start.site_network.state_dict().values()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_site_mode_refuses_what_leaves_no_plain_network():
    for overrides in ({"per": "sample"}, {"per": "volume"}):
        with pytest.raises(InputError, match="per='layer'"):
            routing(overrides=overrides, mode="site").fit([volume(2)], unet())
    with pytest.raises(InputError, match="at least one scan"):
        routing(mode="site").fit([], unet())
    with pytest.raises(InputError, match="fit"):
        routing(mode="site")(volume(2), unet())


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_unknown_names_list_the_known_ones():
    for call, known in (
        (lambda: preset("fast"), ["'fast'", *PRESETS]),
        (lambda: preset("default", {"stepz": 3}), ["'stepz'", "steps", "learning_rate"]),
        (lambda: preset("default", {"start": "near"}), ["'near'", "distance", "uniform", "global", "random"]),
        (lambda: preset("default", {"per": "slice"}), ["'slice'", "sample", "volume", "layer"]),
        (lambda: preset("default", {"activation": "relu"}), ["'relu'", "softmax", "sigmoid"]),
        (lambda: TestTimeRoutingInferer(mode="on"), ["'on'", "episodic", "site", "off"]),  # type: ignore[arg-type]
        (lambda: TestTimeRoutingInferer(output="logits"), ["'logits'", "softmax", "sigmoid"]),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError) as error:
            call()
        assert all(word in str(error.value) for word in known)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "overrides",
    [
        {"temperature": 0.0},
        {"statistics": 1.5},
        {"steps": -1},
        {"steps": 1.5},
        {"steps": "ten"},
        {"learning_rate": float("nan")},
        {"dropout": 1.0},
        {"adapt_slices": 0},
        {"agreement": 2},
        {"entropy": -1.0},
        {"steps": 1, "consistency": 0.0, "entropy": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(overrides):
    with pytest.raises(InputError, match=next(iter(overrides))):
        preset("default", overrides)


def test_presets_are_what_they_say_and_overrides_change_that_alone():
    assert preset() == RoutingSettings() == PRESETS["default"]
    changed = preset("paper", {"steps": 3})
    assert changed.steps == 3
    assert preset("paper", {"steps": PRESETS["paper"].steps}) == PRESETS["paper"]
    assert changed.per == "sample"


def test_expert_that_does_not_fit_is_named_when_the_scan_is_routed():
    space = {**experts(1), "UCL": unet(3, outputs=3).state_dict()}
    with pytest.raises(InputError, match=r"'UCL'.*'model.2.conv.weight'"):
        TestTimeRoutingInferer(space)(volume(2), unet())


def test_what_is_no_network_cannot_be_routed():
    with pytest.raises(ValueError, match=r"nn\.Module"):
        routing()(volume(2), lambda x: x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", PRESETS)
def test_cuda_gives_the_masks_of_the_cpu(name):
    """Logits within 1e-2 in full precision; under autocast finite, and the decision is reported."""
    network, scan = unet(), volume(3)
    expected = routing(name)(scan, network)
    found = routing(name)(scan.cuda(), copy.deepcopy(network).cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cuda"), torch.no_grad():
        assert torch.isfinite(routing(name)(scan.cuda(), copy.deepcopy(network).cuda())).all()
