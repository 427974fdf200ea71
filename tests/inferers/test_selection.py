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
"""FedSM's selector: each scan gets the model of the site that it resembles, or the global model in doubt."""

from __future__ import annotations

import pytest
import torch
from networks import experts, images, unet, untouched, volume
from torch import Tensor, nn

from shared_iopfl.inferers.selection import SelectorInferer, site_classifier
from shared_iopfl.models.files import GLOBAL
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.stacks import StackInferer


class ByBrightness(nn.Module):
    """The logit of the second site is the sum of the mean intensities of an input's channels."""

    def forward(self, inputs: Tensor) -> Tensor:
        brightness = inputs.mean((2, 3)).sum(1)
        return torch.stack([torch.zeros_like(brightness), brightness], 1)


def selector(count: int = 2, seed: int = 0) -> dict[str, Tensor]:
    return dict(site_classifier(3, count, seed).state_dict())


def by_brightness(gamma: float = 0.9) -> SelectorInferer:
    """The selector of the sites A and B, which chooses B for bright scans."""
    serve = SelectorInferer(experts(2), selector(), gamma)
    serve.selector = ByBrightness()
    return serve


@torch.no_grad()
@pytest.mark.parametrize(("offset", "chosen"), [(-10.0, "A"), (10.0, "B"), (0.0, GLOBAL)])
def test_the_model_of_the_most_probable_site_segments_the_scan(offset: float, chosen: str) -> None:
    """Below gamma it is the global model; the mask is that of the plain network with the weights of the model."""
    network, scan, serve = unet(), volume(4) + offset, by_brightness()
    (stack,) = serve.stacks(scan)
    assert serve.select(stack) == chosen
    states = {GLOBAL: network.state_dict(), **experts(2)}
    plain = unet()
    plain.load_state_dict(states[chosen])
    with untouched(network):
        served = serve(scan, network)
    torch.testing.assert_close(served, StackInferer()(scan, plain))


def test_the_probability_is_the_mean_over_slices() -> None:
    """Three bright slices of four have a mean of 0.75, whatever the mean of their logits is."""
    stack = torch.ones(4, 3, 8, 8) * torch.tensor([100.0, 100.0, 100.0, -1000.0])[:, None, None, None]
    assert by_brightness(0.74).select(stack) == "B"
    assert by_brightness(0.76).select(stack) == GLOBAL


def test_scans_of_a_batch_are_segmented_by_models_of_their_own() -> None:
    network, scans = unet(), torch.cat([volume(2) - 10, volume(2) + 10])
    together = by_brightness()(scans, network)
    for scan, logits in zip(scans, together):
        torch.testing.assert_close(by_brightness()(scan[None], network)[0], logits)


def test_the_classes_are_the_sites_in_alphabetical_order() -> None:
    """The order of the models does not matter."""
    models = experts(2)
    serve = SelectorInferer({"B": models["B"], "A": models["A"]}, selector(), slices=None)
    assert serve.sites == ["A", "B"]
    image = images(1, 3, 32, 32)
    likely = serve.sites[int(serve.selector(image).argmax())]
    serve.gamma = 0.0
    assert serve.select(image) == likely


def test_the_classifier_depends_on_its_seed_alone() -> None:
    with untouched():
        one, again, other = selector(3), selector(3), selector(3, seed=1)
        SelectorInferer(experts(3), one)
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_faults_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"knows 3 sites, but there are personalised models of 2 \(A, B\)"):
        SelectorInferer(experts(2), selector(3))
    for gamma in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="gamma"):
            SelectorInferer(experts(2), selector(), gamma)
    wrong = selector()
    wrong["features.conv0.weight"] = wrong["features.conv0.weight"][:, :, :3]
    with pytest.raises(InputError, match="'selector' does not fit"):
        SelectorInferer(experts(2), wrong)
