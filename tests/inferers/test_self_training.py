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
"""Self-training: the network of a site learns the masks of its scans, reproducibly, and nothing else changes."""

import pytest
import torch
from monai.networks.nets import BasicUNet

from shared_iopfl.inferers import self_training
from shared_iopfl.inferers.routing import TestTimeRoutingInferer
from shared_iopfl.inferers.self_training import SelfTraining
from shared_iopfl.routing.objectives import ViewSampler
from shared_iopfl.routing.settings import preset
from shared_iopfl.utils.errors import InputError


def make_network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BasicUNet(2, 3, 2, (4, 4, 8, 8, 8, 4), norm="batch").eval()


def trained(own_statistics=True, steps=40, seed=0):
    """Train a network on the bright regions of noise images."""
    generator = torch.Generator().manual_seed(1)
    images = torch.nn.functional.interpolate(torch.randn(12, 3, 4, 4, generator=generator), size=16)
    bright = (images[:, 1:2] > 0).float()
    targets = torch.cat([1 - bright, bright], 1)
    network = make_network()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    training = SelfTraining(steps, ViewSampler((0,)), "softmax", 6, seed, learning_rate=1e-2)
    student = training.train(network, images, targets, own_statistics)
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    return network, student, images, targets


def error(network, images, targets):
    with torch.no_grad():
        return float((network(images).softmax(1) - targets).abs().mean())


@pytest.mark.parametrize("own_statistics", [True, False])
def test_the_network_learns_the_targets(own_statistics):
    network, student, images, targets = trained(own_statistics)
    assert error(student, images, targets) < 0.95 * error(network, images, targets)
    assert not student.training and not any(each.requires_grad for each in student.parameters())


def test_stored_statistics_stay_if_routing_uses_none_of_the_scan():
    network, student, *_ = trained(own_statistics=False, steps=3)
    for (key, before), after in zip(network.state_dict().items(), student.state_dict().values()):
        assert torch.equal(before, after) == ("running" in key or "tracked" in key), key


def test_the_seed_decides_and_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    one, two, other = (trained(steps=3, seed=seed)[1].state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("scans, kept", [(1, 32), (10, 40), (100, 100)])
def test_the_inputs_of_all_scans_fit_in_memory(scans, kept, monkeypatch):
    """The limit is 40 inputs of 8 x 8 pixels in total, and at least one of each scan."""
    monkeypatch.setattr(self_training, "TRAINING_PIXELS", 40 * 64)
    training, seen = SelfTraining(1, ViewSampler(()), "softmax", 6, 0), []
    monkeypatch.setattr(training, "train", lambda network, *given: seen.extend(given))
    stacks = [torch.zeros(32, 3, 8, 8)] * scans
    training.train_on(make_network(), stacks, lambda stack: torch.zeros(len(stack), 2, 8, 8), True)
    images, targets, own_statistics = seen
    assert images.shape == (kept, 3, 8, 8) and targets.shape == (kept, 2, 8, 8)
    assert torch.all(targets == 0.5) and own_statistics


def experts():
    return {f"site{seed}": make_network(seed).state_dict() for seed in (1, 2)}


@pytest.mark.parametrize("statistics", [0.0, 0.5])
def test_a_site_has_one_plain_network_that_self_training_changed(statistics):
    scans = [torch.randn(1, 1, 16, 16, 4, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    served = {}
    for steps in (0, 5):
        settings = preset("self_trained", {"self_training": steps, "statistics": statistics})
        inferer = TestTimeRoutingInferer(experts(), "site", settings, flips=(0,))
        report = inferer.fit(scans, make_network())
        served[steps] = inferer(scans[0], make_network())
        assert isinstance(inferer.site_network, BasicUNet)
        assert (report["decision"] == "self-trained") == bool(steps)
    assert torch.isfinite(served[5]).all() and not torch.allclose(served[0], served[5])


def test_dropout_is_off_and_draws_from_no_global_random_state():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.Dropout(0.5), torch.nn.BatchNorm2d(2)).eval()
    state = torch.get_rng_state()
    training = SelfTraining(3, ViewSampler(()), "softmax", 4, 0)
    student = training.train(network, torch.ones(3, 3, 8, 8), torch.full((3, 2, 8, 8), 0.5), True)
    assert torch.equal(state, torch.get_rng_state()) and isinstance(student[1], torch.nn.Dropout)


def test_self_training_of_single_scans_is_refused():
    with pytest.raises(InputError, match="mode 'site'"):
        TestTimeRoutingInferer(experts(), "episodic", preset("self_trained"))
