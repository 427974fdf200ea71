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
"""Handlers of the other inside methods: FedProx, FedBN and Ditto.

Handlers of the bundle's trainer, each switched by one hyper-parameter of ``train.json``. `MonaiAlgo` loads the global
weights and then runs the trainer once a round, so that at STARTED the network holds the global model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents
from monai.utils.enums import CommonKeys as Keys
from torch import Tensor, nn

from shared_iopfl.models.weights import Weights
from shared_iopfl.routing.network import NORMS
from shared_iopfl.utils.checks import check_values


class _Anchor:
    """The weights of a network at one moment, and how far another one is from them."""

    def __init__(self, network: nn.Module) -> None:
        self.weights = [parameter.detach().clone() for parameter in network.parameters()]

    def distance(self, network: nn.Module) -> Tensor:
        r"""Half the squared distance, :math:`\frac12 \lVert w - w_{anchor} \rVert^2`, with gradient."""
        pairs = zip(network.parameters(), self.weights)
        return 0.5 * torch.stack([(weight - anchor).square().sum() for weight, anchor in pairs]).sum()


class ProximalHandler:
    r"""FedProx (Li et al. 2020): adds :math:`\frac{\mu}{2} \lVert w - w_{global} \rVert^2` to the training loss.

    The loss that the trainer reports holds the term.

    Args:
        network: the network that is trained.
        mu: weight of the term, not negative.
    """

    def __init__(self, network: nn.Module, mu: float) -> None:
        self.network = network
        check_values({"proximal": mu})
        self.mu = mu

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.add)

    def start(self, engine: Engine) -> None:
        """Keep the global weights, which the round begins with."""
        self.anchor = _Anchor(self.network)

    def add(self, engine: Engine) -> None:
        """Add the proximal term to the loss of this iteration."""
        # the weights are in full precision, under AMP too, and so is the sum
        output: Any = engine.state.output
        output[Keys.LOSS] = output[Keys.LOSS] + self.mu * self.anchor.distance(self.network)


class LocalNormsHandler:
    """FedBN (Li et al. 2021): the site keeps its own norm layers, found by module type, statistics included.

    What the server averages of them is ignored: they are put back when a round starts. The model of a site is the
    global one with the site's own norm layers, :meth:`personal_state`.

    Args:
        network: the network that is trained.
    """

    state_name = "local_norms"  # see `round_state`

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.names = [
            f"{name}.{key}" if name else key
            for name, module in network.named_modules()
            if isinstance(module, NORMS)
            for key in module.state_dict()
        ]
        self.norms: dict[str, Tensor] = {}  # none before the first round is over: it begins with the global ones

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        engine.add_event_handler(Events.STARTED, self.restore)
        engine.add_event_handler(Events.COMPLETED, self.keep)

    def restore(self, engine: Engine) -> None:
        """Put the site's own norm layers into the network."""
        self.network.load_state_dict(self.norms, strict=False)

    def keep(self, engine: Engine) -> None:
        """Keep the norm layers of the network as the site's own."""
        state = self.network.state_dict()
        self.norms = {name: state[name].detach().clone() for name in self.names}

    def personal_state(self, global_state: Weights) -> dict[str, Tensor]:
        """The site's model: the global weights with its own norm layers (copies, where the global weights are)."""
        personal = {key: tensor.clone() for key, tensor in global_state.items()}
        return {**personal, **{key: tensor.to(personal[key], copy=True) for key, tensor in self.norms.items()}}

    def state_dict(self) -> dict[str, Any]:
        """The state to be kept in a checkpoint."""
        return {"norms": self.norms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        self.norms = {key: tensor.clone() for key, tensor in state["norms"].items()}


class DittoHandler:
    r"""Ditto (Li et al. 2021): a personal model v, trained beside the local one and pulled towards the global one.

    On each batch of the trainer, right after the local model's gradients, v makes a step of its own on

    .. math:: L(v) + \frac{\lambda}{2} \lVert v - w_{global} \rVert^2

    with the trainer's loss and inferer, and an optimiser of the same kind, at the trainer's learning rate of the
    moment and new each round. It begins as the first global model; it never leaves the site.

    Args:
        network: the network that is trained.
        optimizer: of the trainer.
        pull: lambda, not negative; 0: the site alone, on the same batches.

    Attributes:
        model: the personal model.
    """

    state_name = "ditto"  # see `round_state`

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, pull: float) -> None:
        self.network = network
        check_values({"ditto": pull})
        self.pull = pull
        copies: dict[int, Any] = {}  # through it the copied optimiser finds the copied parameters
        self.model = copy.deepcopy(network, copies)
        self.optimizer = copy.deepcopy(optimizer, copies)
        self.begun = False

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        # the last event at which the batch is whole: MONAI takes it apart when the iteration is over
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.step)

    def start(self, engine: Engine) -> None:
        """Keep the global weights as the anchor of the personalised model."""
        self.anchor = _Anchor(self.network)
        if not self.begun:
            self.model.load_state_dict(self.network.state_dict())
            self.begun = True
        self.optimizer.state.clear()
        amp = bool(getattr(engine, "amp", False))
        self.scaler = torch.amp.GradScaler(enabled=amp)  # a new one each round, as the trainer's

    def step(self, engine: Any) -> None:
        """Take one step with the personalised model on the batch of this iteration."""
        output = engine.state.output
        for own, trained in zip(self.optimizer.param_groups, engine.optimizer.param_groups):
            own["lr"] = trained["lr"]
        self.model.train()
        self.optimizer.zero_grad()
        with torch.autocast("cuda", enabled=self.scaler.is_enabled(), **engine.amp_kwargs):
            loss = engine.loss_function(engine.inferer(output[Keys.IMAGE], self.model), output[Keys.LABEL]).mean()
        self.scaler.scale(loss + self.pull * self.anchor.distance(self.model)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def personal_state(self) -> dict[str, Tensor]:
        """The site's model (a copy, on the CPU)."""
        return {key: tensor.detach().cpu().clone() for key, tensor in self.model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """The state to be kept in a checkpoint."""
        return {"begun": self.begun, "model": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        self.begun = bool(state["begun"])
        self.model.load_state_dict(state["model"])
