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

One hyper-parameter of ``train.json`` switches on each of them. `MonaiAlgo` loads the global weights and then runs the
trainer once per round, so that at STARTED the network has the global weights.
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
    """The weights of a network at one moment, from which the distance of other weights is computed."""

    def __init__(self, network: nn.Module) -> None:
        self.weights = [parameter.detach().clone() for parameter in network.parameters()]

    def distance(self, network: nn.Module) -> Tensor:
        r"""Half the squared distance, :math:`\frac12 \lVert w - w_{anchor} \rVert^2`, with gradient."""
        pairs = zip(network.parameters(), self.weights)
        return 0.5 * torch.stack([(weight - anchor).square().sum() for weight, anchor in pairs]).sum()


class ProximalHandler:
    r"""FedProx (Li et al. 2020): adds :math:`\frac{\mu}{2} \lVert w - w_{global} \rVert^2` to the training loss.

    The loss that the trainer reports includes the term.

    Args:
        network: Network that is trained.
        mu: Weight of the term, 0 or more.
    """

    def __init__(self, network: nn.Module, mu: float) -> None:
        self.network = network
        check_values({"proximal": mu})
        self.mu = mu

    def attach(self, engine: Engine) -> None:
        """Register the handler with an ignite engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.add)

    def start(self, engine: Engine) -> None:
        """Keep the global weights, from which the round starts."""
        self.anchor = _Anchor(self.network)

    def add(self, engine: Engine) -> None:
        """Add the proximal term to the loss of this iteration."""
        # weights and sum are in full precision, with AMP too
        output: Any = engine.state.output
        output[Keys.LOSS] = output[Keys.LOSS] + self.mu * self.anchor.distance(self.network)


class LocalNormsHandler:
    """FedBN (Li et al. 2021): the site keeps its own norm layers with their statistics, found by module type.

    The server's averages of these layers are ignored, because the site restores its own when a round starts. The model
    of the site, :meth:`personal_state`, is the global model with the site's norm layers.

    Args:
        network: Network that is trained.
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
        self.norms: dict[str, Tensor] = {}  # empty in the first round, which starts from the global norm layers

    def attach(self, engine: Engine) -> None:
        """Register the handler with an ignite engine."""
        engine.add_event_handler(Events.STARTED, self.restore)
        engine.add_event_handler(Events.COMPLETED, self.keep)

    def restore(self, engine: Engine) -> None:
        """Restore the site's norm layers in the network."""
        self.network.load_state_dict(self.norms, strict=False)

    def keep(self, engine: Engine) -> None:
        """Keep the norm layers of the network as those of the site."""
        state = self.network.state_dict()
        self.norms = {name: state[name].detach().clone() for name in self.names}

    def personal_state(self, global_state: Weights) -> dict[str, Tensor]:
        """Return the model of the site: a copy of the global weights with the site's norm layers, on their device."""
        personal = {key: tensor.clone() for key, tensor in global_state.items()}
        return {**personal, **{key: tensor.to(personal[key], copy=True) for key, tensor in self.norms.items()}}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"norms": self.norms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        self.norms = {key: tensor.clone() for key, tensor in state["norms"].items()}


class DittoHandler:
    r"""Ditto (Li et al. 2021): a personalised model v is trained beside the local model and kept near the global one.

    For each batch, after the gradients of the local model, v is updated by one step on

    .. math:: L(v) + \frac{\lambda}{2} \lVert v - w_{global} \rVert^2

    with the loss and the inferer of the trainer. Its optimiser is of the same kind, has the trainer's current learning
    rate, and is new in each round. v starts as the first global model and never leaves the site.

    Args:
        network: Network that is trained.
        optimizer: Optimiser of the trainer.
        pull: Factor :math:`\lambda`, 0 or more; 0 trains v on the data of the site alone.

    Attributes:
        model: Personalised model v.
    """

    state_name = "ditto"  # see `round_state`

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, pull: float) -> None:
        self.network = network
        check_values({"ditto": pull})
        self.pull = pull
        copies: dict[int, Any] = {}  # shared, so that the copied optimiser refers to the copied parameters
        self.model = copy.deepcopy(network, copies)
        self.optimizer = copy.deepcopy(optimizer, copies)
        self.begun = False

    def attach(self, engine: Engine) -> None:
        """Register the handler with an ignite engine."""
        engine.add_event_handler(Events.STARTED, self.start)
        # the last event with a complete batch, which MONAI decollates at the end of the iteration
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.step)

    def start(self, engine: Engine) -> None:
        """Keep the global weights, with which the personalised model is compared in this round."""
        self.anchor = _Anchor(self.network)
        if not self.begun:
            self.model.load_state_dict(self.network.state_dict())
            self.begun = True
        self.optimizer.state.clear()
        amp = bool(getattr(engine, "amp", False))
        self.scaler = torch.amp.GradScaler(enabled=amp)  # new in each round, as that of the trainer

    def step(self, engine: Any) -> None:
        """Update the personalised model by one step on the batch of this iteration."""
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
        """Return a copy of the personalised model, on the CPU."""
        return {key: tensor.detach().cpu().clone() for key, tensor in self.model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"begun": self.begun, "model": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from :meth:`state_dict`."""
        self.begun = bool(state["begun"])
        self.model.load_state_dict(state["model"])
