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
"""Server momentum: its formula, buffers from the average, and federations that are resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_clients import SITES, equal, fakes, make  # noqa: F401
from networks import unet

from shared_iopfl.federation.averaging import ServerMomentum, average_updates
from shared_iopfl.federation.simulation import Federation
from shared_iopfl.utils.errors import InputError


def test_momentum_is_sgd_on_the_difference_to_the_average():
    """Three rounds are equal to steps of torch's Nesterov SGD with rate 1; buffers are those of the average."""
    network = unet()
    parameters = [name for name, _ in network.named_parameters()]
    server, weights = ServerMomentum(0.7), dict(unet(1).state_dict())
    expected = {name: weights[name].clone().requires_grad_() for name in parameters}
    optimizer = torch.optim.SGD(expected.values(), lr=1.0, momentum=0.7, nesterov=True)
    for round_ in range(3):
        average = dict(unet(10 + round_).state_dict())
        for name, tensor in expected.items():
            tensor.grad = tensor.detach() - average[name]
        optimizer.step()
        weights = server.step(weights, average, parameters)
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, expected[key].detach() if key in expected else average[key])


def test_without_momentum_it_is_the_average():
    average = dict(unet(2).state_dict())
    assert equal(ServerMomentum(0.0).step(unet(1).state_dict(), average, ["any"]), average)


def test_federation_uses_momentum_and_resumes(fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    """Global weights are as computed by hand, also after an interruption of the run and a resumption."""
    from fake_clients import FakeClient

    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    monkeypatch.setattr(FakeClient, "parameters", names, raising=False)
    whole = make(tmp_path / "whole", server_momentum=0.5)
    whole.run()
    hand = make(tmp_path / "hand")
    hand.start()
    server, weights = ServerMomentum(0.5), hand.weights
    for _ in range(3):
        updates = {site: client.train(weights) for site, client in hand.clients.items()}
        average = average_updates(updates, {site: hand.clients[site].cases for site in SITES})
        weights = server.step(weights, average, names)
    assert equal(whole.weights, weights)
    assert not equal(whole.weights, make(tmp_path / "plain").run())

    run_round = Federation.run_round

    def two_rounds(self: Federation, bar: object = None) -> None:
        if self.round == 2:
            raise KeyboardInterrupt
        run_round(self, bar)

    part = make(tmp_path / "part", server_momentum=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(Federation, "run_round", two_rounds)
        with pytest.raises(KeyboardInterrupt):
            part.run()
    assert equal(make(tmp_path / "part", server_momentum=0.5, resume=True).run(), weights)
    with pytest.raises(InputError, match="server_momentum"):
        make(tmp_path / "part", server_momentum=0.25, resume=True).run()


@pytest.mark.parametrize("wrong", [-0.1, 1.0, float("nan"), True, "0.5"])
def test_momentum_out_of_range_is_refused(wrong):
    with pytest.raises(InputError, match="server_momentum must be"):
        ServerMomentum(wrong)
