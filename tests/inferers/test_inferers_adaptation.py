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
"""Adaptation has no effect on later scans, and its result is never worse than the start."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from networks import experts, unet, volume
from tiny_inferers import ADAPTING, ENTROPY, LEARNT, harmful, routing
from torch import Tensor, nn

from shared_iopfl.inferers import routing as inferers
from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.routing import adaptation
from shared_iopfl.routing.adaptation import mask_agreement
from shared_iopfl.routing.network import RoutedNetwork
from shared_iopfl.routing.objectives import RoutingObjective, View, ViewSampler, entropy, probabilities
from shared_iopfl.routing.routers import Router
from shared_iopfl.routing.settings import PRESETS, preset

# ---- nothing leaks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "self_trained"])
def test_a_mask_does_not_depend_on_earlier_scans(name):
    """Of the scans A, B, A, both masks of A are identical, and identical to that of a new inferer."""
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
    """A scan that fails during adaptation does not change the next one."""
    network, scan = unet(), volume(2)
    inferer = routing("paper", overrides=LEARNT)
    expected = inferer(scan, network)
    predict, calls = inferer._predict, []

    def fail(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return predict(*args)

    monkeypatch.setattr(inferer, "_predict", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        inferer(volume(3, seed=5), network)
    assert torch.equal(inferer(scan, network), expected)


def test_two_threads_get_the_masks_of_one_thread():
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
    """For any way in which the global model gets new weights, the next scan is routed with them."""
    network, scan = unet(), volume(2)
    inferer = routing("soup")
    before = inferer(scan, network)
    built = inferer.routed_copy.of(network, inferer.experts)
    assert inferer.routed_copy.of(network, inferer.experts) is built
    CHANGES[change](network, unet(7).state_dict())
    after = inferer(scan, network)
    assert torch.equal(after, routing("soup")(scan, unet(7)))
    assert not torch.equal(after, before)
    assert torch.equal(inferer(scan, unet()), before)


def test_a_network_made_in_inference_mode_can_be_routed():
    """Inference tensors have no version and no gradient; the routing needs neither of the network."""
    with torch.inference_mode():
        network = unet()
        logits = routing("adapted", overrides=LEARNT)(volume(2), network)
    assert torch.equal(logits, routing("adapted", overrides=LEARNT)(volume(2), unet()))


def test_experts_do_not_change_with_the_network():
    """The experts are copied, so that training the network does not change them, nor the reverse."""
    network = unet()
    space = experts(2)
    kept = copy.deepcopy(space)
    TestTimeRoutingInferer(space, settings=preset("adapted", LEARNT))(volume(2), network)
    assert all(torch.equal(tensor, kept[site][key]) for site in space for key, tensor in space[site].items())


def test_the_adapted_router_predicts_under_autocast():
    """The adapted router changes the mask in half precision too."""
    overrides = {**LEARNT, "per": "sample", "views": "none"}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        inferer = routing(overrides=overrides)
        adapted = inferer(volume(2), unet())
        start = routing(overrides={**overrides, "steps": 0})(volume(2), unet())
    assert inferer.reports[0]["decision"] == "adapted"
    assert not torch.equal(adapted, start)


# ---- the guard ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["sample", "layer"])
def test_diverged_adaptation_is_rejected(per):
    """With an extreme learning rate the mask is exactly that of the start, and the report has the reason."""
    overrides = {"per": per, "affine": True, "agreement": 0.0}
    inferer = routing(overrides={**overrides, "steps": 3, "learning_rate": 1e30})
    logits = inferer(volume(2), unet())
    assert torch.equal(logits, routing(overrides=overrides)(volume(2), unet()))
    assert inferer.reports[0]["decision"] == "start"
    assert inferer.reports[0]["reason"] == "adaptation became non-finite"


@pytest.mark.parametrize(
    "after, agreement, reason", [(2, 1, "improve"), (1, 1, "improve"), (0.5, 0.89, "differs too much")]
)
def test_guard_rejects_a_result_that_is_no_better_or_differs_too_much(monkeypatch, after, agreement, reason):
    inferer, scan, values = routing("adapted"), volume(2), iter((1.0, after))
    monkeypatch.setattr(inferer.adaptation, "adapt", harmful)
    monkeypatch.setattr(inferer.adaptation, "value", lambda *_: next(values))
    monkeypatch.setattr(adaptation, "mask_agreement", lambda *_: agreement)
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
def test_the_result_never_has_a_higher_objective_than_the_start(rate, kept, monkeypatch):
    """Steps that raise the objective are rejected, steps that lower it are accepted."""
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
    assert mask_agreement(logits[:1], logits[1:], output) == pytest.approx(2 * 4 / (8 + 4))
    empty = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1) if output == "softmax" else torch.tensor([[[[-1.0]]]])
    assert mask_agreement(empty, empty, output) == 1


def test_adaptation_sees_new_views_and_dropout_masks_each_step_and_none_in_prediction(monkeypatch):
    inferer = routing("paper", overrides={"steps": 4})
    drawn: list[View] = []
    generators: list[torch.Generator | None] = []
    draw, predict = ViewSampler.draw, inferer._predict

    def draw_and_note(*args: Any) -> View:
        drawn.append(draw(*args))
        return drawn[-1]

    def predict_and_note(stack: Tensor, networks: Iterable[RoutedNetwork], some: Tensor) -> Any:
        (routed,) = networks
        generators.append(cast(Router, routed._routed[0].routes).generator)
        return predict(stack, [routed], some)

    monkeypatch.setattr(ViewSampler, "draw", draw_and_note)
    monkeypatch.setattr(inferer, "_predict", predict_and_note)
    inferer(volume(2), unet())
    assert len({view.seed for view in drawn[2:6]}) == 4
    assert drawn[:2] == drawn[6:], "the objective is compared over the same views before and after"
    assert generators == [None, None]


def test_adaptation_takes_evenly_spaced_slices(monkeypatch):
    """At most this number of slices, spread over the volume."""
    monkeypatch.setattr(inferers, "SCAN_SLICES", 3)
    inferer = routing(overrides=ADAPTING, batch_size=2)
    seen: list[Tensor] = []
    monkeypatch.setattr(inferer.adaptation, "adapt", lambda routed, some: seen.append(some))
    scan = torch.arange(9.0).expand(1, 1, 32, 32, 9)
    inferer(scan, unet())
    assert seen[0][:, 1, 0, 0].tolist() == [1, 4, 7]


# ---- another objective ----------------------------------------------------------------------------------------------


class Confidence(nn.Module):
    """The entropy of the plain images, as an objective other than `RoutingObjective`."""

    def forward(self, network, images, view):
        return entropy(probabilities(network(images), "softmax"), "softmax")


def test_an_objective_module_replaces_that_of_the_settings():
    """It takes the same steps as the objective of the settings with the same terms, and others with other terms."""
    network, scan = unet(), volume(3)
    given = routing(
        "adapted", overrides={**LEARNT, "objective": {**ENTROPY, "entropy": 0.0, "shape": 1.0}}, objective=Confidence()
    )
    same = routing("adapted", overrides=LEARNT)
    other = routing("adapted", overrides={**LEARNT, "objective": {**ENTROPY, "entropy": 0.0, "shape": 1.0}})
    torch.testing.assert_close(given(scan, network), same(scan, network))
    assert given.reports[0]["objective_end"] == pytest.approx(same.reports[0]["objective_end"])
    assert not torch.allclose(given(scan, network), other(scan, network))
