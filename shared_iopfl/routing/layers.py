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
"""The layers of a routed network: each stores the experts' weights and computes with their mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from shared_iopfl.models.weights import copy_network, is_weight
from shared_iopfl.routing.routers import FixedRoutes, FreeRoutes, Router
from shared_iopfl.utils.errors import InputError

# devices on which grouped convolutions take twice as long as a loop over the samples
WITHOUT_GROUPS = ("cpu",)
# the precision that autocast gives to torch's own layers on CUDA; vmap bypasses autocast, so the layers cast themselves
IN_HALF_PRECISION = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Linear, nn.PReLU),
)
IN_FULL_PRECISION = (nn.GroupNorm, nn.LayerNorm)
IN_THE_INPUTS_PRECISION = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class RoutedLayer(nn.Module):
    """A layer of a routed network: the frozen stack of the experts' weights, and the module that computes the routes.

    Args:
        layer: Plain layer, which defines stride, padding and groups, and the values of integer buffers.
        states: State of this layer in each expert, name -> tensor.
        routes: Module that computes routes (B, E) or (1, E) from the layer's input.
        affine: Whether to add a trainable shift, initially zero, to the layer's parameters (used for norm layers).
        name: Name of the layer in its network, for error messages.
    """

    def __init__(
        self,
        layer: nn.Module,
        states: Sequence[Mapping[str, Tensor]],
        routes: FreeRoutes | Router,
        affine: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        self.name = name
        self.layer = copy_network(layer).requires_grad_(False).eval()
        self.routes: FixedRoutes | FreeRoutes | Router = routes
        self.names = [name for name, tensor in layer.state_dict().items() if is_weight(tensor)]
        for index, name in enumerate(self.names):
            like = layer.state_dict()[name]
            # contiguous in any memory format of the network, so that mixing reads each expert's weights once, in order
            stack = torch.stack([state[name].detach().to(like).contiguous() for state in states])
            self.register_buffer(f"stack_{index}", stack)
        shifted = [name for name, _ in layer.named_parameters()] if affine else []
        self.shifts = nn.ParameterDict({name: torch.zeros_like(layer.get_parameter(name)) for name in shifted})
        self.last_routes: Tensor | None = None

    def mix(self, routes: Tensor) -> dict[str, Tensor]:
        """Mix the experts' weights.

        Args:
            routes: Routes (B, E).

        Returns:
            The mixed weights, name -> (B, *shape).
        """
        mixed = {}
        with torch.autocast(routes.device.type, enabled=False):  # mixing is fast enough in full precision
            for index, name in enumerate(self.names):
                stack = self.get_buffer(f"stack_{index}")
                flat, shares = stack.flatten(1) if stack.ndim > 1 else stack[:, None], routes.to(stack.dtype)
                # row by row: the product of two thin matrices is many times slower than the products of vectors
                rows = [row @ flat for row in shares] if len(shares) <= 32 else list(shares @ flat)
                together = rows[0] if len(rows) == 1 else torch.stack(rows)
                mixed[name] = together.reshape(-1, *stack.shape[1:])
                if name in self.shifts:
                    mixed[name] = mixed[name] + self.shifts[name]
        return mixed

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # raised for a forward that reads a layer's weights; the message names the layer
            raise AttributeError(f"the routed layer '{self.__dict__.get('name', '')}' has no '{name}'") from None

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the layer with the mixed weights."""
        routes = self.routes(inputs)
        self.last_routes = routes.detach().mean(0)
        return self.compute(self.mix(routes), inputs, *args, **kwargs)

    @property
    def unblendable(self) -> str | None:
        """Why the statistics of this layer cannot be blended with those of the images; None if they can."""
        return "has a forward or hooks of its own" if tracks_statistics(self.layer) else None

    def compute(self, weights: dict[str, Tensor], inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer with given weights.

        Args:
            weights: Weights (B, ...) that differ from sample to sample, or (1, ...) for all samples.
            inputs: Input of the layer (B, ...).
            args: Further arguments of the layer, such as the ``output_size`` of a transposed convolution.
            kwargs: Further arguments of the layer by name.

        Raises:
            InputError: If the layer cannot be run with weights that need a gradient, or that differ between samples.
        """
        mean = weights.get("running_mean")
        if isinstance(self.layer, nn.modules.batchnorm._NormBase) and mean is not None and mean.requires_grad:
            raise InputError(
                f"cannot adapt '{self.name}' ({type(self.layer).__name__}): torch computes no gradient of its running "
                "statistics; use steps=0 or route_norms=False."
            )
        if all(weight.shape[0] == 1 for weight in weights.values()):
            mixed = {name: weight[0] for name, weight in weights.items()}
            return functional_call(self.layer, mixed, (inputs, *args), kwargs)
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            raise InputError(self._not_per_sample("takes more than one tensor"))

        def one(weight: dict[str, Tensor], sample: Tensor) -> Tensor:
            output = functional_call(self.layer, weight, (sample[None], *args), kwargs)
            if not isinstance(output, Tensor):
                raise InputError(self._not_per_sample(f"returns a {type(output).__name__} instead of a tensor"))
            return output[0]

        autocast = torch.is_autocast_enabled(inputs.device.type) and inputs.dtype != torch.float64
        types = self._autocast_types(inputs) if autocast else None
        if inputs.device.type in WITHOUT_GROUPS or (autocast and types is None):
            rows = [
                {name: weight[min(i, len(weight) - 1)] for name, weight in weights.items()} for i in range(len(inputs))
            ]
            return torch.stack([one(row, sample) for row, sample in zip(rows, inputs)])
        # vmap turns a convolution with one kernel per sample into one grouped convolution
        if types is None:
            return vmap(one)(weights, inputs)
        computed, given = types
        with torch.autocast(inputs.device.type, enabled=False):
            cast = {name: weight.to(computed) for name, weight in weights.items()}
            return vmap(one)(cast, inputs.to(computed)).to(given)

    def _autocast_types(self, inputs: Tensor) -> tuple[torch.dtype, torch.dtype] | None:
        """The types of a layer's computation and output under autocast; None for layers other than torch's own."""
        kind = type(self.layer)
        if kind in IN_HALF_PRECISION:
            half = torch.get_autocast_dtype(inputs.device.type)
            return half, half
        if kind in IN_FULL_PRECISION:
            return torch.float32, torch.float32
        return (torch.float32, inputs.dtype) if kind in IN_THE_INPUTS_PRECISION else None

    def _not_per_sample(self, why: str) -> str:
        return f"cannot route '{self.name}' ({type(self.layer).__name__}) per sample, as it {why}: use per='layer'."

    def plain(self, routes: Tensor) -> nn.Module:
        """Return the plain layer with the weights that routes (E,) mix."""
        layer = copy_network(self.layer)
        weights = self.mix(routes[None].to(self.get_buffer("stack_0").device))
        layer.load_state_dict({name: weight[0].detach() for name, weight in weights.items()}, strict=False)
        return layer.requires_grad_(True)


class RoutedBatchNorm(RoutedLayer):
    """A routed batch norm: mixed affine parameters, and mixed running statistics that can be blended with the batch's.

    It normalises by ``(1 - statistics) * running + statistics * batch``. The forward is written out, because torch's
    `batch_norm` computes no gradient of the running statistics, and so none of the routes that mix them.

    Attributes:
        statistics: Share of the batch statistics, in [0, 1].
        frozen: Whether to blend with the batch statistics of an earlier forward instead of those of the current batch.
        last_batch: Mean and variance (C,) of the last batch that was measured.
        last_statistics: Mean and variance (C,) that the last forward with blending normalised by.
        calls: Number of calls in the last forward of the network.
    """

    statistics: float = 0.0
    frozen: bool = False
    last_batch: tuple[Tensor, Tensor] | None = None
    last_statistics: tuple[Tensor, Tensor] | None = None
    calls: int = 0

    @property
    def eps(self) -> float:
        """The epsilon of the batch norm."""
        return float(getattr(self.layer, "eps"))  # noqa: B009 (mypy takes a module's attributes for tensors)

    @property
    def blends(self) -> bool:
        """Whether the statistics of the batch take part."""
        return self.statistics > 0 or not tracks_statistics(self.layer)

    @property
    def unblendable(self) -> str | None:
        """Why the statistics of this layer cannot be blended with those of the images; None if they can."""
        return "is used more than once in a forward" if tracks_statistics(self.layer) and self.calls > 1 else None

    def compute(self, weights: dict[str, Tensor], inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalise by running, batch or blended statistics; arguments as for `RoutedLayer`."""
        self.calls += 1
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
        """Return the plain batch norm for routes (E,).

        If statistics are blended, those of the last forward become its running statistics; a layer that the last
        forward did not use keeps its own.
        """
        layer = super().plain(routes)
        if self.statistics > 0 and self.last_statistics is not None:
            for name, value in zip(("running_mean", "running_var"), self.last_statistics):
                layer.get_buffer(name).copy_(value)
        return layer


def tracks_statistics(layer: nn.Module) -> TypeGuard[nn.modules.batchnorm._BatchNorm]:
    """Whether a layer is a batch norm that stores running statistics."""
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None


def batch_norms(network: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Find the batch norms of a network that store running statistics: name -> layer."""
    return {name: layer for name, layer in network.named_modules() if tracks_statistics(layer)}


def channel_statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance (C,) of each channel of a batch (B, C, *spatial), over samples and pixels."""
    if inputs.device.type != "cpu" or torch.is_grad_enabled():
        variance, mean = torch.var_mean(inputs, dim=[dim for dim in range(inputs.ndim) if dim != 1], correction=0)
        return mean, variance
    # 20 times as fast as `var_mean` in channels-last format; one sample at a time, because it sums in single precision
    rows = [torch.batch_norm_update_stats(sample, None, None, 0.0) for sample in inputs.split(1)]
    means, variances = (torch.stack(row).double() for row in zip(*rows))
    mean = means.mean(0)
    return mean.to(inputs.dtype), (variances + (means - mean) ** 2).mean(0).to(inputs.dtype)


def _scale_channels(inputs: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``inputs * scale + shift`` per channel, by torch's batch norm, which is twice as fast on a CPU."""
    neutral = torch.zeros_like(shift), torch.ones_like(scale)
    return F.batch_norm(inputs, *neutral, weight=scale.to(inputs.dtype), bias=shift.to(inputs.dtype), eps=0.0)
