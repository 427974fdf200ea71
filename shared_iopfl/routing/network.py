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
"""The routed network: every layer is a mixture of the experts' layers; and back to a plain network.

A routed network computes, layer by layer, with the weights ``w = sum_e r_e * w_e``: the experts' weights ``w_e`` are
frozen, the routes ``r`` are non-negative and sum to one, so that equal experts give back the plain network whatever the
routes. Where the routes come from is the choice of ``per``: a :class:`Router` that looks at the layer's input, for each
sample on its own (the paper) or once for the whole volume, or free numbers for each layer.

Layers are found by what they hold, not by name: any module without children that owns weights is routed, so the same
code serves BasicUNet, UNet, SegResNet, DynUNet and whatever else is made of such layers, in 2D and 3D.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from shared_iopfl.models.weights import check_experts, copy_network, is_weight
from shared_iopfl.routing.check import check_layer, check_routed, mixed_states, uneven_routes
from shared_iopfl.routing.layers import RoutedBatchNorm, RoutedLayer
from shared_iopfl.routing.routers import Activation, FixedRoutes, FreeRoutes, Router
from shared_iopfl.utils.errors import InputError

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class RoutedNetwork(nn.Module):
    """A network with all its layers routed; made by :func:`route`.

    Attributes:
        network: the network with a `RoutedLayer` in place of every layer that owns weights.
        experts: the experts' names, in the order of the routes.
        layers: the routed layers' names, in the order of the network.
    """

    def __init__(self, network: nn.Module, experts: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.experts = tuple(experts)
        found = {id(m): (n, m) for n, m in reversed(list(network.named_modules())) if isinstance(m, RoutedLayer)}
        ordered = [found[key] for key in reversed(found)]
        self.layers = tuple(name for name, _ in ordered)
        self._routed = [layer for _, layer in ordered]
        self._norms = [layer for layer in self._routed if isinstance(layer, RoutedBatchNorm)]
        self._fresh = {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        """The output of the network under the current routes."""
        for layer in self._norms:
            layer.calls = 0
        if len(inputs) == 1 or inputs.device.type != "cpu" or torch.is_grad_enabled() or not self._samples_apart():
            return self.network(inputs)
        # One sample after another, each at the price of a plain network; nothing joins them but the batch.
        outputs, tables = [], []
        for sample in inputs.split(1):
            output = self.network(sample)
            if not isinstance(output, Tensor):  # several outputs: no batch of one kind to join
                return self.network(inputs)
            outputs.append(output)
            tables.append(self.last_routes())
        for routed, row in zip(self._routed, torch.stack(tables).mean(0)):
            routed.last_routes = row
        return torch.cat(outputs)

    def _samples_apart(self) -> bool:
        """Whether routes differ from sample to sample, and no layer looks at more than one sample."""
        routers = [layer.routes for layer in self._routed if isinstance(layer.routes, Router)]
        return bool(routers) and not self.blends and not any(router.per_volume for router in routers)

    @property
    def blends(self) -> bool:
        """Whether the images' own statistics take part in any of the batch norms."""
        return any(layer.blends for layer in self._norms)

    @property
    def tracked_norms(self) -> list[str]:
        """The names of the batch norms that hold running statistics."""
        norms = [layer for layer in self._routed if isinstance(layer.layer, nn.modules.batchnorm._BatchNorm)]
        return [layer.name for layer in norms if getattr(layer.layer, "running_mean", None) is not None]

    def start_from(self, routes: Tensor) -> None:
        """Begin at `routes`, (E,) for the whole network or (L, E) a layer, and forget what was learnt."""
        wanted = (len(self.layers), len(self.experts))
        if tuple(routes.shape) not in (wanted, wanted[1:]):
            raise ValueError(f"routes must have shape {wanted} or {wanted[1:]}, but have {tuple(routes.shape)}.")
        for layer, row in zip(self._routed, routes.expand(wanted)):
            layer.routes.start.copy_(row / row.sum())
        self.reset()

    def reset(self) -> None:
        """Forget what was learnt: routers, routes and norm shifts are as they were made, around the same start."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name in self._fresh:
                    parameter.copy_(self._fresh[name])
        for layer in self._routed:
            layer.last_routes = None
        for layer in self._norms:
            layer.last_statistics = layer.last_batch = None
            layer.frozen = False

    @contextmanager
    def fixed_routes(self, routes: Tensor) -> Iterator[None]:
        """Every layer has the same routes (E,), whatever gives them otherwise; it is reset afterwards."""
        kept = [layer.routes for layer in self._routed]
        try:
            for layer in self._routed:
                layer.routes = FixedRoutes(routes)
            yield
        finally:
            for layer, own in zip(self._routed, kept):
                layer.routes = own
            self.reset()

    def freeze_statistics(self, frozen: bool) -> None:
        """Keep blending with the batch statistics of the last forward: a scan's, whatever part of it is seen next."""
        if frozen:
            self.check_blending()
        for layer in self._norms:
            layer.frozen = frozen

    def set_statistics(self, statistics: float) -> None:
        """Normalise with running (0), the image's own (1) or blended batch statistics.

        Raises:
            InputError: naming the layer, where that cannot be done.
        """
        if statistics > 0:
            self.check_blending()
        for layer in self._norms:
            layer.statistics = statistics

    @property
    def can_blend(self) -> bool:
        """Whether the images' own statistics can be blended and kept in every layer."""
        return not any(layer.unblendable for layer in self._routed)

    def check_blending(self) -> None:
        """Raise `InputError`, naming the layer, where the images' own statistics cannot be blended and kept."""
        for layer in self._routed:
            if layer.unblendable:
                raise InputError(
                    f"'{layer.name}' ({type(layer.layer).__name__}) {layer.unblendable}, so that its statistics cannot "
                    "be blended with a scan's own: use statistics=0."
                )

    def set_dropout(self, generator: torch.Generator | None) -> None:
        """Draw the routers' dropout from `generator`; None switches it off (prediction is never random)."""
        for layer in self._routed:
            if isinstance(layer.routes, Router):
                layer.routes.generator = generator

    def trainable(self) -> list[nn.Parameter]:
        """What adaptation may change: the routes' parameters and the norm layers' shifts."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def last_routes(self) -> Tensor:
        """The routes (L, E) of the last forward, averaged over its samples; before any, the start."""
        rows = [layer.routes.start if layer.last_routes is None else layer.last_routes for layer in self._routed]
        return torch.stack([row.detach().float() for row in rows]).cpu()  # at once: each copy waits for an accelerator


def route(
    network: nn.Module,
    experts: Mapping[str, Mapping[str, Tensor]],
    per: Literal["sample", "volume", "layer"] = "layer",
    activation: Activation = "softmax",
    random: bool = False,
    route_norms: bool = True,
    affine: bool = False,
    statistics: float = 0.0,
    dropout: float = 0.2,
    seed: int = 0,
    sample: Tensor | None = None,
) -> RoutedNetwork:
    """Make the routed copy of a network over the experts' weights; the network itself is not touched.

    Args:
        network: the architecture, and the weights of what stays unrouted (norm layers with `route_norms` False).
        experts: the routing space, name -> state_dict; usually the global model and the personalised ones.
        per: "sample": a router a layer, routes for each sample (Jiang et al. 2023); "volume": a router a layer, routes
            for the batch as a whole; "layer": free routes for each layer, no router.
        activation: "softmax" or (the paper) "sigmoid", normalised.
        random: routers start at random weights (the paper) instead of exactly at the starting routes.
        route_norms: mix the norm layers too; False (the paper) keeps those of `network`.
        affine: let adaptation shift the norm layers' weight and bias.
        statistics: 0 running, 1 the batch's own (the paper), between: blended; see :class:`RoutedBatchNorm`.
        dropout: dropout of the routers during adaptation.
        seed: of the routers' initial weights.
        sample: network inputs (B, C, *spatial), one is enough: the routed network is held against the plain one on
            them; see :func:`~shared_iopfl.routing.check.check_routed`. None: it is taken on trust.

    Raises:
        InputError: when an expert does not fit the network, a module that has children owns weights itself, a layer is
            of a kind that cannot be mixed, or the routed network does not compute what the plain one does.
    """
    check_experts(network, experts)
    uneven = uneven_routes(len(experts))
    mixed: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    replaced: dict[int, nn.Module] = {}
    for name, layer in network.named_modules():
        if not (layer._parameters or layer._buffers):
            continue
        check_layer(name, layer)
        prefix = f"{name}." if name else ""
        is_norm = isinstance(layer, NORMS)
        states = [{key: state[prefix + key] for key in layer.state_dict()} for state in experts.values()]
        if not any(is_weight(tensor) for tensor in states[0].values()):
            continue
        routed_here = route_norms or not is_norm
        if not routed_here:
            states = [layer.state_dict()] * len(experts)  # all the same: the routes do not matter
        if sample is not None:
            mixed.update({prefix + key: tensor for key, tensor in mixed_states(states, uneven).items()})
        channels, axis = _input_channels(layer)
        routes: FreeRoutes | Router
        if per == "layer" or channels is None or not routed_here:
            routes = FreeRoutes(len(experts), activation).requires_grad_(routed_here)
        else:
            routes = Router(channels, len(experts), activation, per == "volume", random, dropout, generator, axis)
        kind = RoutedBatchNorm if _is_plain_batch_norm(layer) else RoutedLayer
        device = next(iter(layer.state_dict().values())).device
        replaced[id(layer)] = kind(layer, states, routes, affine=affine and is_norm, name=name).to(device)
    routed_network = RoutedNetwork(copy_network(network, replaced), list(experts))
    if sample is not None:
        plain = copy_network(network).eval()
        plain.load_state_dict(mixed, strict=False)  # a layer of two names has its weights by the first
        with routed_network.fixed_routes(uneven):
            collapsed = collapse(routed_network, uneven).eval()
            check_routed(routed_network.network, network, plain, collapsed, routed_network.layers, sample)
    routed_network.set_statistics(statistics)
    return routed_network


def _is_plain_batch_norm(layer: nn.Module) -> bool:
    """Whether it computes what torch's batch norm does; a forward or hooks of its own may do anything."""
    forwards = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and type(layer).forward in forwards and not hooks


def _input_channels(layer: nn.Module) -> tuple[int | None, int]:
    """Channels of a layer's input and their axis; None where it does not state them (PReLU): it gets free routes."""
    for attribute in ("in_channels", "num_features", "num_channels"):
        if hasattr(layer, attribute):
            return int(getattr(layer, attribute)), 1
    return (int(layer.in_features), -1) if isinstance(layer, nn.Linear) else (None, 1)


def collapse(network: RoutedNetwork, routes: Tensor | None = None) -> nn.Module:
    """The plain network that a routed one is under one set of routes: same output, same class, exports as usual.

    Where it blends the images' own statistics into the running ones, those of its last forward are kept: the output is
    the same for those images, and no longer depends on what shares a batch.

    Args:
        network: the routed network.
        routes: (E,) or (L, E); default: the routes of the last forward (the start before any).

    Raises:
        InputError: where it blends statistics and there was no forward since its last reset.
    """
    if any(layer.statistics > 0 for layer in network._norms):
        network.check_blending()
        if all(layer.last_statistics is None for layer in network._norms):
            raise InputError("to collapse blended statistics, run the images they are to be those of first.")
    table = network.last_routes() if routes is None else routes.expand(len(network.layers), len(network.experts))
    plain: dict[int, nn.Module] = {id(layer): layer.plain(row) for layer, row in zip(network._routed, table)}
    return copy_network(network.network, plain)
