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
"""The routing space: one network whose every layer is a mixture of the experts' layers.

A routed network computes, layer by layer, with the weights ``w = sum_e r_e * w_e``: the experts' weights ``w_e`` are
frozen, the routes ``r`` are non-negative and sum to one, so that equal experts give back the plain network whatever the
routes. Where the routes come from is the choice of ``per``: a :class:`Router` that looks at the layer's input, for each
sample on its own (the paper) or once for the whole volume, or free numbers for each layer.

Layers are found by what they hold, not by name: any module without children that owns weights is routed, so the same
code serves BasicUNet, UNet, SegResNet, DynUNet and whatever else is made of such layers, in 2D and 3D.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from shared_iopfl.errors import InputError
from shared_iopfl.routers import Activation, FreeRoutes, Router

__all__ = ["RoutedBatchNorm", "RoutedLayer", "RoutedNetwork", "channel_statistics", "collapse", "route"]

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class RoutedLayer(nn.Module):
    """One layer of a routed network: the frozen stack of the experts' weights and the module that gives its routes.

    Args:
        layer: the plain layer; it keeps stride, padding, groups and the like, and gives the integer buffers.
        states: the experts' states of this layer, name -> tensor, one mapping an expert.
        routes: gives routes (B, E) or (1, E) from the layer's input.
        affine: add a trainable, zero-initialised shift to the layer's own parameters (used for norm layers).
    """

    def __init__(
        self,
        layer: nn.Module,
        states: Sequence[Mapping[str, Tensor]],
        routes: FreeRoutes | Router,
        affine: bool = False,
    ) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer).requires_grad_(False).eval()
        self.routes = routes
        self.names = [name for name, tensor in layer.state_dict().items() if tensor.is_floating_point()]
        for index, name in enumerate(self.names):
            like = layer.state_dict()[name]
            # contiguous, whatever the network's memory format: mixing then reads each expert's weights once, in order
            stack = torch.stack([state[name].detach().to(like).contiguous() for state in states])
            self.register_buffer(f"stack_{index}", stack)
        shifted = [name for name, _ in layer.named_parameters()] if affine else []
        self.shifts = nn.ParameterDict({name: torch.zeros_like(layer.get_parameter(name)) for name in shifted})
        self.last_routes: Tensor | None = None

    def mix(self, routes: Tensor) -> dict[str, Tensor]:
        """The mixed weights, name -> (B, *shape), for routes (B, E)."""
        mixed = {}
        with torch.autocast(routes.device.type, enabled=False):  # mixing costs little: keep it exact
            for index, name in enumerate(self.names):
                stack = self.get_buffer(f"stack_{index}")
                flat, shares = stack.flatten(1) if stack.ndim > 1 else stack[:, None], routes.to(stack.dtype)
                # row by row: a product of two thin matrices is many times slower than as many vectors' products
                rows = [row @ flat for row in shares] if len(shares) <= 32 else list(shares @ flat)
                together = rows[0] if len(rows) == 1 else torch.stack(rows)
                mixed[name] = together.reshape(-1, *stack.shape[1:])
                if name in self.shifts:
                    mixed[name] = mixed[name] + self.shifts[name]
        return mixed

    def forward(self, inputs: Tensor) -> Tensor:
        routes = self.routes(inputs)
        self.last_routes = routes.detach().mean(0)
        return self.compute(self.mix(routes), inputs)

    def compute(self, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """Run the layer with `weights` (B, ...) that differ from sample to sample, or (1, ...) that serve them all."""
        if all(weight.shape[0] == 1 for weight in weights.values()):
            return functional_call(self.layer, {name: weight[0] for name, weight in weights.items()}, (inputs,))

        def one(weight: dict[str, Tensor], sample: Tensor) -> Tensor:
            return functional_call(self.layer, weight, (sample[None],))[0]

        if inputs.device.type == "cpu":
            # grouped convolutions are slow there: half as fast as one sample after another
            rows = [
                {name: weight[min(i, len(weight) - 1)] for name, weight in weights.items()} for i in range(len(inputs))
            ]
            return torch.stack([one(row, sample) for row, sample in zip(rows, inputs)])
        # vmap turns a convolution with a kernel a sample into one grouped convolution
        return vmap(one)(weights, inputs)

    def plain(self, routes: Tensor) -> nn.Module:
        """The plain layer with the weights that `routes` (E,) mix."""
        layer = copy.deepcopy(self.layer)
        weights = self.mix(routes[None].to(self.get_buffer("stack_0").device))
        layer.load_state_dict({name: weight[0].detach() for name, weight in weights.items()}, strict=False)
        return layer.requires_grad_(True)


class RoutedBatchNorm(RoutedLayer):
    """A routed batch norm: mixed affine parameters, and statistics between the mixed running ones and the image's own.

    ``statistics`` 0 normalises with the running statistics, 1 with those of the batch at hand, anything between with
    ``(1 - statistics) * running + statistics * batch``. Written out, as torch's own `batch_norm` gives no gradient
    to the running statistics, and hence none to the routes that mix them.
    """

    statistics: float = 0.0
    frozen: bool = False  # blend with the batch statistics of the last forward before, not with the batch at hand
    last_batch: tuple[Tensor, Tensor] | None = None  # mean and variance (C,) of the last batch that was measured
    last_statistics: tuple[Tensor, Tensor] | None = None  # mean and variance (C,) of the last forward that blended

    @property
    def eps(self) -> float:
        return float(getattr(self.layer, "eps"))  # noqa: B009 (mypy takes a module's attributes for tensors)

    @property
    def blends(self) -> bool:
        """Whether the images' own statistics take part."""
        return self.statistics > 0 or getattr(self.layer, "running_mean", None) is None

    def compute(self, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        wide = inputs if inputs.dtype == torch.float64 else inputs.float()
        mean = weights.get("running_mean")
        var = weights.get("running_var")
        if mean is None or var is None or self.statistics > 0:
            blend = 1.0 if mean is None or var is None else self.statistics
            if self.frozen and self.last_batch is not None:
                batch_mean, batch_var = self.last_batch
            else:
                batch_mean, batch_var = channel_statistics(wide)
                self.last_batch = (batch_mean.detach(), batch_var.detach())
            mean = batch_mean[None] if mean is None else torch.lerp(mean, batch_mean[None], blend)
            var = batch_var[None] if var is None else torch.lerp(var, batch_var[None], blend)
            self.last_statistics = (mean.detach().mean(0), var.detach().mean(0))
        scale = torch.rsqrt(var + self.eps)
        if "weight" in weights:
            scale = scale * weights["weight"]
        shift = -mean * scale
        if "bias" in weights:
            shift = shift + weights["bias"]
        if len(scale) > 1 and inputs.device.type != "cpu":
            shape = (*scale.shape, *(1,) * (inputs.ndim - 2))
            return torch.addcmul(shift.reshape(shape), wide, scale.reshape(shape)).to(inputs.dtype)
        samples = [wide] if len(scale) == 1 else wide.split(1)
        outputs = [_scale_channels(sample, *row) for sample, row in zip(samples, zip(scale, shift))]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(inputs.dtype)

    def plain(self, routes: Tensor) -> nn.Module:
        """The plain batch norm; where it blends, with the statistics of the last forward in place of running ones."""
        layer = super().plain(routes)
        if self.statistics > 0:
            if self.last_statistics is None:
                raise InputError("to collapse blended statistics, run the images they are to be those of first.")
            for name, value in zip(("running_mean", "running_var"), self.last_statistics):
                layer.get_buffer(name).copy_(value)
        return layer


def channel_statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of each channel of a batch (B, C, *spatial), over samples and pixels."""
    if inputs.device.type != "cpu" or torch.is_grad_enabled():
        variance, mean = torch.var_mean(inputs, dim=[dim for dim in range(inputs.ndim) if dim != 1], correction=0)
        return mean, variance
    # 20 times as fast as `var_mean` where channels lie last; a sample at a time, as it sums in single precision
    rows = [torch.batch_norm_update_stats(sample, None, None, 0.0) for sample in inputs.split(1)]
    means, variances = (torch.stack(row).double() for row in zip(*rows))
    mean = means.mean(0)
    return mean.to(inputs.dtype), (variances + (means - mean) ** 2).mean(0).to(inputs.dtype)


def _scale_channels(inputs: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``inputs * scale + shift`` a channel, with gradient to all, by torch's batch norm: twice as fast."""
    neutral = torch.zeros_like(shift), torch.ones_like(scale)
    return F.batch_norm(inputs, *neutral, weight=scale.to(inputs.dtype), bias=shift.to(inputs.dtype), eps=0.0)


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
        self._fresh = {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) == 1 or inputs.device.type != "cpu" or torch.is_grad_enabled() or not self._samples_apart():
            return self.network(inputs)
        # One sample after another, each at the price of a plain network; nothing joins them but the batch.
        outputs, tables = [], []
        for sample in inputs.split(1):
            outputs.append(self.network(sample))
            tables.append(self.last_routes())
        for layer, row in zip(self._routed, torch.stack(tables).mean(0)):
            layer.last_routes = row
        return torch.cat(outputs)

    def _samples_apart(self) -> bool:
        """Whether routes differ from sample to sample, and no layer looks at more than one sample."""
        routers = [layer.routes for layer in self._routed if isinstance(layer.routes, Router)]
        return bool(routers) and not self.blends and not any(router.per_volume for router in routers)

    @property
    def blends(self) -> bool:
        """Whether the images' own statistics take part in any of the batch norms."""
        return any(isinstance(layer, RoutedBatchNorm) and layer.blends for layer in self._routed)

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
            if isinstance(layer, RoutedBatchNorm):
                layer.last_statistics = layer.last_batch = None
                layer.frozen = False

    def freeze_statistics(self, frozen: bool) -> None:
        """Keep blending with the batch statistics of the last forward: a scan's, whatever part of it is seen next."""
        for layer in self._routed:
            if isinstance(layer, RoutedBatchNorm):
                layer.frozen = frozen

    def set_statistics(self, statistics: float) -> None:
        """Normalise with running (0), the image's own (1) or blended batch statistics."""
        for layer in self._routed:
            if isinstance(layer, RoutedBatchNorm):
                layer.statistics = statistics

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
        return torch.stack([row.detach().float().cpu() for row in rows])


def check_experts(network: nn.Module, experts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise `InputError`, naming the expert and the first difference, unless every expert fits the network."""
    if not experts:
        raise InputError("a routing space needs at least one expert; got none.")
    own = network.state_dict()
    for name, state in experts.items():
        for key, tensor in own.items():
            if key not in state:
                raise InputError(f"expert '{name}' does not fit the network: it lacks '{key}'; use one architecture.")
            if state[key].shape != tensor.shape:
                raise InputError(
                    f"expert '{name}' does not fit the network: '{key}' has shape {tuple(state[key].shape)}, expected "
                    f"{tuple(tensor.shape)}; use one architecture."
                )
            if not torch.isfinite(state[key]).all():
                raise InputError(f"expert '{name}' has NaN or infinite values in '{key}'; train or download it again.")
        extra = next((key for key in state if key not in own), None)
        if extra is not None:
            raise InputError(f"expert '{name}' does not fit the network: unknown '{extra}'; use one architecture.")


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

    Raises:
        InputError: when an expert does not fit the network, or a module that has children owns weights itself.
    """
    check_experts(network, experts)
    generator = torch.Generator().manual_seed(seed)
    replaced: dict[int, nn.Module] = {}
    for name, layer in network.named_modules():
        if not (layer._parameters or layer._buffers):
            continue
        if any(True for _ in layer.children()):
            raise InputError(f"cannot route '{name}' ({type(layer).__name__}): it owns weights and has children.")
        prefix = f"{name}." if name else ""
        is_norm = isinstance(layer, NORMS)
        states = [{key: state[prefix + key] for key in layer.state_dict()} for state in experts.values()]
        if not any(tensor.is_floating_point() for tensor in states[0].values()):
            continue
        routed_here = route_norms or not is_norm
        if not routed_here:
            states = [layer.state_dict()] * len(experts)  # all the same: the routes do not matter
        channels = _input_channels(layer)
        routes: FreeRoutes | Router
        if per == "layer" or channels is None or not routed_here:
            routes = FreeRoutes(len(experts), activation).requires_grad_(routed_here)
        else:
            routes = Router(channels, len(experts), activation, per == "volume", random, dropout, generator)
        kind = RoutedBatchNorm if isinstance(layer, nn.modules.batchnorm._BatchNorm) else RoutedLayer
        device = next(iter(layer.state_dict().values())).device
        replaced[id(layer)] = kind(layer, states, routes, affine=affine and is_norm).to(device)
    routed_network = RoutedNetwork(copy_network(network, replaced), list(experts))
    routed_network.set_statistics(statistics)
    return routed_network


def _input_channels(layer: nn.Module) -> int | None:
    """Channels of a layer's input where it states them; where not (PReLU), it gets free routes instead of a router."""
    for attribute in ("in_channels", "num_features", "num_channels", "in_features"):
        if hasattr(layer, attribute):
            return int(getattr(layer, attribute))
    return None


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
    table = network.last_routes() if routes is None else routes.expand(len(network.layers), len(network.experts))
    plain: dict[int, nn.Module] = {id(layer): layer.plain(row) for layer, row in zip(network._routed, table)}
    return copy_network(network.network, plain)


def copy_network(network: nn.Module, replaced: dict[int, nn.Module] | None = None) -> nn.Module:
    """A deep copy, with other modules in place of those whose id is in `replaced`, wherever and however often used.

    Also of a network that keeps outputs of its last forward (DynUNet's deep supervision), which torch does not copy
    when they have a gradient.
    """
    memo: dict[int, nn.Module | Tensor] = dict(replaced or {})
    for module in network.modules():
        for value in vars(module).values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Tensor) and not item.is_leaf:
                    memo[id(item)] = item.detach()
    return copy.deepcopy(network, memo)
