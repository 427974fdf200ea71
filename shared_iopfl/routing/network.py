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
"""The routed network, in which every layer is a mixture of the experts' layers, and its collapse to a plain network.

Each layer computes with the weights ``w = sum_e r_e * w_e``. The experts' weights ``w_e`` are frozen; the routes ``r``
are non-negative and sum to one, so that equal experts give the plain network for any routes. The routes are free
parameters of each layer, or the output of a router that sees the layer's input.

Layers are found by their content and not by name: any module without children that owns weights is routed. The same
code therefore serves BasicUNet, UNet, SegResNet, DynUNet and other networks of such layers, in 2D and 3D.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from shared_iopfl.models.weights import Weights, check_experts, copy_network, is_weight
from shared_iopfl.routing.check import check_layer, check_routed, mixed_states, uneven_routes
from shared_iopfl.routing.layers import RoutedBatchNorm, RoutedLayer, tracks_statistics
from shared_iopfl.routing.routers import Activation, FixedRoutes, FreeRoutes, Router
from shared_iopfl.utils.errors import InputError

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class RoutedNetwork(nn.Module):
    """A network whose layers are routed, as made by :func:`route`.

    Attributes:
        network: Network with a `RoutedLayer` in place of every layer that owns weights.
        experts: Names of the experts, in the order of the routes.
        layers: Names of the routed layers, in the order of the network.
    """

    def __init__(self, network: nn.Module, experts: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.experts = tuple(experts)
        self._routed = [module for module in network.modules() if isinstance(module, RoutedLayer)]
        self.layers = tuple(layer.name for layer in self._routed)
        self._norms = [layer for layer in self._routed if isinstance(layer, RoutedBatchNorm)]
        self._fresh = {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the output of the network for inputs (B, C_in, *spatial) and the current routes."""
        for layer in self._norms:
            layer.calls = 0
        if len(inputs) == 1 or inputs.device.type != "cpu" or torch.is_grad_enabled() or not self._samples_apart():
            return self.network(inputs)
        # One sample at a time, because each then costs no more than a forward of the plain network.
        outputs, tables = [], []
        for sample in inputs.split(1):
            output = self.network(sample)
            if not isinstance(output, Tensor):  # several outputs cannot be concatenated
                return self.network(inputs)
            outputs.append(output)
            tables.append(self.last_routes())
        for routed, row in zip(self._routed, torch.stack(tables).mean(0)):
            routed.last_routes = row
        return torch.cat(outputs)

    def _samples_apart(self) -> bool:
        """Whether routes differ from sample to sample, and no layer uses more than one sample at a time."""
        routers = [layer.routes for layer in self._routed if isinstance(layer.routes, Router)]
        return bool(routers) and not self.blends and not any(router.per_volume for router in routers)

    @property
    def blends(self) -> bool:
        """Whether the statistics of the batch take part in any of the batch norms."""
        return any(layer.blends for layer in self._norms)

    @property
    def tracked_norms(self) -> list[str]:
        """The names of the batch norms that store running statistics."""
        return [layer.name for layer in self._routed if tracks_statistics(layer.layer)]

    def start_from(self, routes: Tensor) -> None:
        """Set the routes that adaptation starts from, and reset what was learnt.

        Args:
            routes: Routes (E,) for all layers, or (L, E) for each layer.
        """
        wanted = (len(self.layers), len(self.experts))
        if tuple(routes.shape) not in (wanted, wanted[1:]):
            raise ValueError(f"routes must have shape {wanted} or {wanted[1:]}, but have {tuple(routes.shape)}.")
        for layer, row in zip(self._routed, routes.expand(wanted)):
            layer.routes.start.copy_(row / row.sum())
        self.reset()

    def reset(self) -> None:
        """Reset routes, routers and norm shifts to their initial values; the starting routes stay."""
        with torch.no_grad():
            for name, fresh in self._fresh.items():
                self.get_parameter(name).copy_(fresh)
        for layer in self._routed:
            layer.last_routes = None
        for layer in self._norms:
            layer.last_statistics = layer.last_batch = None
            layer.frozen = False

    @contextmanager
    def fixed_routes(self, routes: Tensor) -> Iterator[None]:
        """Give every layer the same routes (E,) within a ``with`` block; the network is reset afterwards."""
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
        """Choose whether later forwards blend with the batch statistics of the last forward or with their own.

        Args:
            frozen: Whether the statistics of the last forward are kept.

        Raises:
            InputError: If they cannot be kept; the message names the layer.
        """
        if frozen:
            self.check_blending()
        for layer in self._norms:
            layer.frozen = frozen

    def set_statistics(self, statistics: float) -> None:
        """Choose the statistics of all batch norms.

        Args:
            statistics: Share of the batch statistics: 0 uses the running ones, 1 those of the batch.

        Raises:
            InputError: If they cannot be blended; the message names the layer.
        """
        if statistics > 0:
            self.check_blending()
        for layer in self._norms:
            layer.statistics = statistics

    @property
    def can_blend(self) -> bool:
        """Whether batch statistics can be blended and kept in every layer."""
        return not any(layer.unblendable for layer in self._routed)

    def check_blending(self) -> None:
        """Raise `InputError` for the first layer in which batch statistics cannot be blended and kept."""
        for layer in self._routed:
            if layer.unblendable:
                raise InputError(
                    f"'{layer.name}' ({type(layer.layer).__name__}) {layer.unblendable}, so that its statistics cannot "
                    "be blended with those of a scan: use statistics=0."
                )

    def set_dropout(self, generator: torch.Generator | None) -> None:
        """Draw the dropout of the routers from a generator; None switches it off, as in prediction."""
        for layer in self._routed:
            if isinstance(layer.routes, Router):
                layer.routes.generator = generator

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters that adaptation may change: those of the routes, and the shifts of the norm layers."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def last_routes(self) -> Tensor:
        """Return the routes (L, E) of the last forward, averaged over its samples; before it, the starting routes."""
        rows = [layer.routes.start if layer.last_routes is None else layer.last_routes for layer in self._routed]
        return torch.stack(
            [row.detach().float() for row in rows]
        ).cpu()  # one copy, because an accelerator waits at each


def route(
    network: nn.Module,
    experts: Mapping[str, Weights],
    per: Literal["sample", "volume", "layer"] = "layer",
    activation: Activation = "softmax",
    random: bool = False,
    route_norms: bool = True,
    affine: bool = False,
    statistics: float = 0.0,
    seed: int = 0,
    sample: Tensor | None = None,
) -> RoutedNetwork:
    """Make a routed copy of a network from the weights of the experts.

    Args:
        network: Network that defines the architecture, and the weights of norm layers that are not routed; it is not
            changed.
        experts: Routing space, name -> state_dict; usually the global model and the personalised models.
        per: "layer": free routes for each layer; "sample": one router per layer, with routes for each network input
            (Jiang et al. 2023); "volume": one router per layer, with routes for the batch as a whole.
        activation: "softmax", or "sigmoid" as in the paper; normalised in both cases.
        random: Whether routers start at random weights, as in the paper, instead of exactly at the starting routes.
        route_norms: Whether norm layers are mixed; in the paper they keep the weights of `network`.
        affine: Whether adaptation may shift the weight and bias of the norm layers.
        statistics: Share of the batch statistics in [0, 1], as in `RoutedBatchNorm`; in the paper 1.
        seed: Seed of the routers' initial weights.
        sample: Network inputs (B, C, *spatial) for the check of the routed network, of which one is used; see
            :func:`~shared_iopfl.routing.check.check_routed`. None leaves out the check.

    Raises:
        InputError: If an expert does not fit the network, a layer cannot be mixed, or the routed network gives another
            output than the plain one.
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
            states = [layer.state_dict()] * len(experts)
        if sample is not None:
            mixed.update({prefix + key: tensor for key, tensor in mixed_states(states, uneven).items()})
        channels, axis = _input_channels(layer)
        routes: FreeRoutes | Router
        if per == "layer" or channels is None or not routed_here:
            routes = FreeRoutes(len(experts), activation).requires_grad_(routed_here)
        else:
            routes = Router(channels, len(experts), activation, per == "volume", random, generator=generator, axis=axis)
        kind = RoutedBatchNorm if _is_plain_batch_norm(layer) else RoutedLayer
        device = next(iter(layer.state_dict().values())).device
        replaced[id(layer)] = kind(layer, states, routes, affine=affine and is_norm, name=name).to(device)
    routed_network = RoutedNetwork(copy_network(network, replaced), list(experts))
    if sample is not None:
        plain = copy_network(network).eval()
        plain.load_state_dict(mixed, strict=False)  # not strict, as a layer with two names occurs under its first only
        with routed_network.fixed_routes(uneven):
            collapsed = collapse(routed_network, uneven).eval()
            check_routed(routed_network.network, network, plain, collapsed, routed_network.layers, sample)
    routed_network.set_statistics(statistics)
    return routed_network


def _is_plain_batch_norm(layer: nn.Module) -> bool:
    """Whether a layer computes the same as torch's batch norm: it has no forward and no hooks of its own."""
    forwards = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and type(layer).forward in forwards and not hooks


def _input_channels(layer: nn.Module) -> tuple[int | None, int]:
    """The channels of a layer's input, if the layer states them (unlike PReLU), and their axis."""
    for attribute in ("in_channels", "num_features", "num_channels"):
        if hasattr(layer, attribute):
            return int(getattr(layer, attribute)), 1
    return (int(layer.in_features), -1) if isinstance(layer, nn.Linear) else (None, 1)


def collapse(network: RoutedNetwork, routes: Tensor | None = None) -> nn.Module:
    """Make the plain network that a routed network is equal to for one set of routes.

    It has the class of the original network and exports as usual. If statistics are blended, those of the last forward
    become its running statistics: the output is the same for those images, and does not depend on the batch.

    Args:
        network: Routed network.
        routes: Routes (E,) or (L, E); None: those of the last forward, or before it the starting routes.

    Raises:
        InputError: If statistics are blended and there was no forward since the last reset.
    """
    if any(layer.statistics > 0 for layer in network._norms):
        network.check_blending()
        if all(layer.last_statistics is None for layer in network._norms):
            raise InputError("no blended statistics to collapse: run a forward of the scan before collapse().")
    table = network.last_routes() if routes is None else routes.expand(len(network.layers), len(network.experts))
    plain: dict[int, nn.Module] = {id(layer): layer.plain(row) for layer, row in zip(network._routed, table)}
    return copy_network(network.network, plain)
