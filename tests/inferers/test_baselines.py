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
"""The other outside methods: the property that defines each, without changes of network or random state."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from networks import ARCHITECTURES, experts, images, make, mixture, unet, untouched, volume
from tiny_inferers import SOUPS
from torch import Tensor, nn

from shared_iopfl.inferers.baselines import (
    BatchStatisticsInferer,
    DaWinInferer,
    EnsembleInferer,
    ScanInferer,
    TentInferer,
    ViewsInferer,
    labelled_routes,
)
from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.routing.objectives import entropy, probabilities
from shared_iopfl.routing.settings import preset
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.stacks import StackInferer, to_stack

CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
KINDS = ("views", "ensemble", "statistics", "blended", "tent", "dawin")


def inferer(kind: str, **kwargs: Any) -> ScanInferer:
    if kind == "views":
        return ViewsInferer(flips=[0], rotations=True, **kwargs)
    if kind in ("statistics", "blended"):
        return BatchStatisticsInferer(1.0 if kind == "statistics" else 0.1, **kwargs)
    if kind == "tent":
        return TentInferer(steps=2, **kwargs)
    return (EnsembleInferer if kind == "ensemble" else DaWinInferer)(experts(2), **kwargs)


# ---- what all of them hold ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_methods_segment_volumes_and_images_and_change_nothing_else(kind, mode):
    """Logits are finite, without gradient, and equal in a second call, for a network in training mode too."""
    network = unet().train()
    with untouched(network), mode():
        for output in ("softmax", "sigmoid"):
            serve = inferer(kind, output=output, batch_size=2)
            first = serve(volume(5), network)
            assert first.shape == (1, 2, 32, 32, 5)
            assert torch.isfinite(first).all() and not first.requires_grad
            serve(volume(3, seed=1), network)
            assert torch.equal(serve(volume(5), network), first), "something stayed from the scan before"
        serve = inferer(kind, slices=None)
        for shape in ((2, 3, 32, 32), (1, 3, 16, 32)):
            assert serve(images(*shape), network).shape == (shape[0], 2, *shape[2:])


@pytest.mark.parametrize("kind", KINDS)
def test_scans_of_a_batch_are_independent(kind):
    network, scans = unet(), torch.cat([volume(3), 2 + volume(3, seed=1)])
    together = inferer(kind)(scans, network)
    for scan, logits in zip(scans, together):
        torch.testing.assert_close(logits, inferer(kind)(scan[None], network)[0], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_and_extreme_scans_give_finite_logits(kind):
    for scan in (torch.zeros(1, 1, 32, 32, 1), torch.full((1, 1, 32, 32, 2), 1e6)):
        assert torch.isfinite(inferer(kind)(scan, unet())).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["BasicUNet 3D", "SegResNet"])
def test_methods_run_on_other_architectures(kind, name):
    """3D networks, and norm layers without running statistics."""
    build, shape = ARCHITECTURES[name]
    serve = inferer(kind, slices=None)
    if isinstance(serve, EnsembleInferer):
        serve.experts = {"A": make(build, 1).state_dict()}
    assert torch.isfinite(serve(images(1, *shape[1:]), make(build, 0))).all()


def test_wrong_arguments_are_refused():
    with pytest.raises(InputError, match="output"):
        ViewsInferer(output="relu")
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="share"):
            BatchStatisticsInferer(share)
    with pytest.raises(ValueError, match=r"nn\.Module"):
        ViewsInferer()(volume(1), lambda images: images)
    with pytest.raises(InputError, match="'X'"):
        EnsembleInferer({"X": {}})(volume(1), unet())


# ---- views ----------------------------------------------------------------------------------------------------------


def test_a_turned_image_gives_the_turned_prediction():
    """With all eight views the orientation of the image does not matter; without views it does."""
    network, image = unet(), images(1, 3, 32, 32)
    turned = image.rot90(1, (2, 3)).flip(2)
    serve = ViewsInferer([0, 1], rotations=True, slices=None)
    logits, again = (serve(x, network) for x in (image, turned))
    torch.testing.assert_close(again, logits.rot90(1, (2, 3)).flip(2), **CLOSE)
    plain, askew = (StackInferer(None)(x, network).detach() for x in (image, turned))
    assert not torch.allclose(askew, plain.rot90(1, (2, 3)).flip(2), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_views_average_probabilities(output):
    network, image = unet(), images(1, 3, 32, 32)
    mean = (probabilities(network(image), output) + probabilities(network(image.flip(3)), output).flip(3)) / 2
    served = ViewsInferer([1], slices=None, output=output)(image, network)
    torch.testing.assert_close(probabilities(served, output), mean, **CLOSE)
    alone = ViewsInferer(slices=None, output=output)(image, network)
    torch.testing.assert_close(probabilities(alone, output), probabilities(network(image), output), **CLOSE)


# ---- experts side by side -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", [EnsembleInferer, DaWinInferer])
@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_equal_experts_give_the_plain_prediction(kind, output):
    network, scan = unet(), volume(3)
    plain = probabilities(StackInferer()(scan, network), output)
    for space in (None, dict.fromkeys("AB", network.state_dict())):
        served = kind(space, output=output)(scan, network)
        torch.testing.assert_close(probabilities(served, output), plain, **CLOSE)


@torch.no_grad()
def test_ensemble_is_the_mean_probability_of_all_with_the_global_model():
    network, image = unet(), images(1, 3, 32, 32)
    each = [unet(seed)(image).softmax(1) for seed in (0, 1, 2)]  # experts are of seeds 1 and 2
    served = EnsembleInferer(experts(2), slices=None)(image, network).softmax(1)
    torch.testing.assert_close(served, torch.stack(each).mean(0), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1e-4, 0.5, 1e6])
def test_dawin_mixes_weights_by_the_entropy_of_each_expert(temperature):
    """A low temperature gives the most certain expert, a high one the soup, and others the softmax of -entropy."""
    network, image = unet(), images(1, 3, 32, 32)
    states = [network.state_dict(), *experts(2).values()]
    doubt = torch.stack([entropy(unet(seed)(image).softmax(1), "softmax") for seed in (0, 1, 2)])
    expected = unet()
    expected.load_state_dict(mixture(states, torch.softmax(-doubt / temperature, 0)))
    served = DaWinInferer(experts(2), temperature, slices=None)(image, network)
    torch.testing.assert_close(served, expected(image), **CLOSE)


# ---- batch statistics and TENT --------------------------------------------------------------------------------------


@torch.no_grad()
def test_full_statistics_are_those_of_a_forward_in_training_mode():
    """The statistics are those of all slices of the scan; with share 0 the result is that of the plain network."""
    network, scan = unet(), volume(5)
    stack = to_stack(scan[0])
    expected = copy.deepcopy(network).train()(stack).permute(1, 2, 3, 0)[None]
    torch.testing.assert_close(BatchStatisticsInferer(1.0, batch_size=2)(scan, network), expected, **CLOSE)
    plain = StackInferer()(scan, network)
    torch.testing.assert_close(BatchStatisticsInferer(0.0)(scan, network), plain, **CLOSE)
    assert not torch.allclose(expected, plain, **CLOSE)


@torch.no_grad()
def test_blended_statistics_lie_between_running_and_own_ones():
    """Means and variances are running * (1 - share) + own * share."""
    network = make(lambda: nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)), 0)
    image, share = images(1, 3, 8, 8), 0.3
    features = network[0](image)  # type: ignore[index]
    norm = network[1]  # type: ignore[index]
    mean = torch.lerp(norm.running_mean, features.mean((0, 2, 3)), share)
    var = torch.lerp(norm.running_var, features.var((0, 2, 3), correction=0), share)
    expected = nn.functional.batch_norm(features, mean, var, norm.weight, norm.bias)
    torch.testing.assert_close(BatchStatisticsInferer(share, slices=None)(image, network), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_tent_lowers_entropy_by_norm_layers_alone(output):
    network, stack = unet(), to_stack(volume(5)[0])

    def doubt(steps: int) -> float:
        adapted = TentInferer(steps, learning_rate=1e-2, output=output).adapted(stack, network)
        norms = {n for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
        moved = {
            name.rpartition(".")[0]
            for name, parameter in adapted.named_parameters()
            if not torch.allclose(parameter, network.get_parameter(name), rtol=1e-5, atol=1e-6)
        }
        assert moved == (norms if steps else set())
        return float(entropy(probabilities(adapted(stack), output), output))

    assert doubt(20) < doubt(5) < doubt(0)
    unadapted = TentInferer(0, output=output)(volume(5), network)
    torch.testing.assert_close(unadapted, BatchStatisticsInferer(output=output)(volume(5), network), **CLOSE)


# ---- settings and the bound -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOUPS)
def test_methods_that_are_settings_are_settings_of_the_routing(name):
    serve = TestTimeRoutingInferer(experts(2), settings=preset("soup", SOUPS[name]), flips=[0])
    assert torch.isfinite(serve(volume(2), unet())).all()
    (report,) = serve.reports
    assert ("objective_end" in report) == (name == "AdaMerging")
    assert report["statistics"] == [0.0]


def test_labelled_routes_beat_the_soup_and_stay_within_the_experts():
    """For labels from one expert, the routes prefer it; all weights lie between those of the experts."""
    network, truth = unet(), unet(1)
    space = {"global": network.state_dict(), **experts(2)}
    batches = []
    for seed in range(3):
        batch = images(2, 3, 16, 16, seed=seed)
        with torch.no_grad():
            batches.append((batch, truth(batch).argmax(1)))
    loss = nn.CrossEntropyLoss()

    @torch.no_grad()
    def score(state: dict[str, Tensor]) -> float:
        model = unet(9)
        model.load_state_dict(state)
        return sum(float(loss(model(x), y)) for x, y in batches)

    with untouched(network), torch.no_grad():
        fitted = labelled_routes(network, space, iter(batches), loss, steps=60, learning_rate=0.2)
        start = labelled_routes(network, space, batches, loss, steps=0)
    soup = mixture(list(space.values()), [1 / 3] * 3)
    assert score(start) == pytest.approx(score(soup), rel=1e-3)
    assert score(fitted) < min(score(soup), *(score(dict(state)) for state in space.values()))
    for key, tensor in fitted.items():
        stack = torch.stack([state[key].double() for state in space.values()])
        assert (tensor <= stack.max(0).values + 1e-5).all() and (tensor >= stack.min(0).values - 1e-5).all()
        assert not tensor.requires_grad
    with pytest.raises(InputError, match="labelled batch"):
        labelled_routes(network, space, [], loss)
