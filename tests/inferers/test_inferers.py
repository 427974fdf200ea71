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
"""Inference in all modes and presets: masks, the network of a site, and refusals by one line."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from networks import ARCHITECTURES, experts, images, make, mixture, unet, untouched, volume
from tiny_inferers import ADAPTING, LEARNT, harmful, routing
from torch import Tensor, nn

from shared_iopfl.inferers import routing as inferers
from shared_iopfl.inferers.members import MeanOfNetworks, load_members
from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.routing import adaptation
from shared_iopfl.routing.distances import distance_routes, distribution_distance
from shared_iopfl.routing.settings import PRESETS, RoutingSettings, preset
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.stacks import StackInferer, to_stack


@torch.no_grad()
def test_without_routing_it_is_plain_inference():
    network, scan = unet(), volume(3)
    inferer = TestTimeRoutingInferer(experts(2), mode="off")
    assert torch.equal(inferer(scan, network), StackInferer()(scan, network))
    assert not inferer.reports


@torch.no_grad()
@pytest.mark.parametrize("overrides", [{"statistics": 1.0}, {"statistics": 0.0, "views": "average"}])
def test_without_experts_the_global_model_has_the_statistics_and_views_of_the_settings(overrides):
    network, scan = unet(), volume(3)
    settings = preset("default", overrides)
    alone = TestTimeRoutingInferer(None, settings=settings, flips=(0,))
    same = TestTimeRoutingInferer({"A": network.state_dict()}, settings=settings, flips=(0,))
    logits = alone(scan, network)
    torch.testing.assert_close(logits, same(scan, network))
    assert not torch.allclose(logits, StackInferer()(scan, network))
    assert alone.reports[-1]["experts"] == ["global"]


def test_a_network_that_is_an_expert_gives_plain_inference():
    """A network that is an expert is not routed; the global model is routed as before."""
    inferer, scan = routing(), volume(3)
    before = inferer(scan, unet())
    for number, expert in enumerate(experts(2).values(), 1):
        chosen = unet(number)
        assert all(torch.equal(tensor, expert[key]) for key, tensor in chosen.state_dict().items())
        assert torch.equal(inferer(scan, chosen), StackInferer()(scan, chosen))
    assert len(inferer.reports) == 1
    assert torch.equal(inferer(scan, unet()), before)


@torch.no_grad()
def test_the_attributes_of_an_inferer_have_a_short_repr():
    """MONAI Label logs them at every request, and weights would take thousands of lines."""
    inferer = routing()
    inferer(volume(2), unet())
    assert len(str(inferer.__dict__)) < 20_000


EPISODIC = [name for name, settings in PRESETS.items() if not settings.self_training]

# ---- every preset, every kind of input ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EPISODIC)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_presets_run_on_images_and_volumes(name, mode):
    """Logits are finite, each scan has a report, and neither network nor random state is changed."""
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
    overrides = {"per": per, "objective": {"shape": 0.1}, "affine": True, **ADAPTING}
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
@pytest.mark.parametrize("name", EPISODIC)
def test_constant_and_extreme_scans_give_finite_logits(scan, name):
    """For constant, huge and nearly empty images."""
    logits = routing(name, overrides={"steps": min(1, PRESETS[name].steps)})(scan, unet())
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_volumes_of_a_3d_network():
    """With slices=None and a 3D network; quarter turns only if the first two axes have equal length."""
    network = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2)).eval()
    space = {"A": copy.deepcopy(network).state_dict()}
    seen: list[tuple[int, ...]] = []
    inferer = TestTimeRoutingInferer(space, slices=None, rotations=True, settings=preset("adapted", ADAPTING))
    for shape in ((8, 8, 4), (8, 4, 4)):
        with torch.no_grad():
            logits = inferer(images(1, 1, *shape), network)
        assert logits.shape == (1, 2, *shape)
        routed = inferer.routed_copy.of(network, inferer.experts)
        routed.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    assert set(seen) == {(8, 4, 4)}, "an oblong plane is not to be turned by 90 degrees"


# ---- mode "site" ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, {**LEARNT, "affine": True}])
def test_site_mode_serves_the_plain_network_that_fit_made(overrides):
    network, scans = unet(), [volume(3, seed=n) for n in range(3)]
    inferer = routing(overrides={**overrides, "views": "none"}, mode="site")
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
    report = routing(mode="site").fit(scans, network)
    expected = distance_routes(torch.stack(distances).mean(0))
    torch.testing.assert_close(torch.tensor(report["routes"][0]), expected, rtol=1e-4, atol=1e-5)


def test_site_adapts_on_slices_of_every_scan(monkeypatch):
    """The number of slices is that of each scan, not of the site."""
    monkeypatch.setattr(inferers, "SCAN_SLICES", 2)
    inferer = routing(overrides=ADAPTING, mode="site")
    seen: list[Tensor] = []
    monkeypatch.setattr(inferer.adaptation, "adapt", lambda routed, some: seen.append(some))
    inferer.fit([volume(5, seed=n) for n in range(3)], unet())
    assert len(seen[0]) == 6


def test_rejected_adaptation_of_a_site_leaves_the_starting_routes(monkeypatch):
    inferer = routing("adapted", mode="site")
    monkeypatch.setattr(inferer.adaptation, "adapt", harmful)
    monkeypatch.setattr(adaptation, "mask_agreement", lambda *_: 0.0)
    assert inferer.fit([volume(2)], unet())["decision"] == "start"
    start = routing(mode="site")
    start.fit([volume(2)], unet())
    assert inferer.site_network is not None
    assert start.site_network is not None
    for one, other in zip(inferer.site_network.state_dict().values(), start.site_network.state_dict().values()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_site_network_keeps_the_sites_statistics():
    """In mode "site" the blended statistics are part of a plain network; masks do not depend on the batch size."""
    inferer = routing(overrides={"statistics": 1.0, "views": "none"}, mode="site")
    assert inferer.fit([3 * volume(4), 3 * volume(3, seed=1)], unet())["statistics"] == [1.0]
    site = inferer.site_network
    assert site is not None
    assert set(site.state_dict()) == set(unet().state_dict())
    one = StackInferer(batch_size=1)(volume(5), site)
    torch.testing.assert_close(inferer(volume(5), unet()), one, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_site_has_one_network_per_share_of_its_statistics(tmp_path):
    """A mean of plain networks, which can be loaded from its state_dict, and averages their probabilities."""
    inferer, scan, network = (
        routing(overrides={"statistics": [0.0, 0.5], "views": "none"}, mode="site"),
        volume(3),
        unet(),
    )
    inferer.fit([scan], network)
    site = inferer.site_network
    assert isinstance(site, MeanOfNetworks)
    mean = torch.stack([StackInferer()(scan, one).softmax(1) for one in site.networks]).mean(0)
    torch.testing.assert_close(inferer(scan, network).softmax(1), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(StackInferer()(scan, site).softmax(1), mean, rtol=1e-4, atol=1e-5)
    loaded = load_members(network, site.state_dict(), "softmax", "site.pt")
    assert isinstance(loaded, MeanOfNetworks)
    assert torch.equal(StackInferer()(scan, loaded), StackInferer()(scan, site))
    assert type(load_members(network, network.state_dict(), "softmax", "site.pt")) is type(network)
    with pytest.raises(InputError, match=r"site\.pt"):
        load_members(network, {"networks.0.other": torch.zeros(1)}, "softmax", "site.pt")


def test_site_mode_refuses_routes_per_sample_or_volume():
    for overrides in ({"per": "sample"}, {"per": "volume"}):
        with pytest.raises(InputError, match=r"one plain network.*'paper'.*per='layer'"):
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
        {"statistics": []},
        {"statistics": [0.5, True]},
        {"statistics": "0.5"},
        {"statistics": "own"},
        {"agreement": 2},
        {"objective": {"entropy": -1.0}},
        {"objective": {"entropie": 1.0}},
        {"objective": 1.0},
        {"steps": 1, "objective": {"consistency": 0.0, "entropy": 0.0}},
    ],
)
def test_settings_out_of_range_are_refused(overrides):
    with pytest.raises(InputError, match=next(reversed(overrides))):
        preset("default", overrides)


def test_presets_are_what_they_say_and_overrides_change_that_alone():
    assert preset() == RoutingSettings() == PRESETS["default"]
    changed = preset("paper", {"steps": 3})
    assert changed.steps == 3
    assert preset("paper", {"steps": PRESETS["paper"].steps}) == PRESETS["paper"]
    assert changed.per == "sample"
    milder = preset("paper", {"objective": {"entropy": 1.0}}).objective
    assert (milder.entropy, milder.shape) == (1.0, PRESETS["paper"].objective.shape)


def test_expert_that_does_not_fit_is_named_when_the_scan_is_routed():
    space = {**experts(1), "UCL": unet(3, outputs=3).state_dict()}
    with pytest.raises(InputError, match=r"'UCL'.*'model.2.conv.weight'"):
        TestTimeRoutingInferer(space)(volume(2), unet())


def test_a_function_cannot_be_routed():
    with pytest.raises(ValueError, match=r"nn\.Module"):
        routing()(volume(2), lambda x: x)


@pytest.mark.gpu
@pytest.mark.parametrize("name", EPISODIC)
def test_cuda_gives_the_masks_of_the_cpu(gpu, name):
    """Logits agree within 1e-2 in full precision; under autocast they are finite, and the decision is reported."""
    network, scan = unet(), volume(3)
    expected = routing(name)(scan, network)
    found = routing(name)(scan.to(gpu), copy.deepcopy(network).to(gpu))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast(gpu.type), torch.no_grad():
        assert torch.isfinite(routing(name)(scan.to(gpu), copy.deepcopy(network).to(gpu))).all()
