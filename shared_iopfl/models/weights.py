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
"""Operations on model weights: check that they fit a network, comparison, copies, interpolation."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from shared_iopfl.utils.errors import InputError

Weights = Mapping[str, Tensor]  # a state_dict


def is_weight(tensor: Tensor) -> bool:
    """Whether a tensor of a state_dict has real or complex numbers, which are averaged, and not an integer counter."""
    return tensor.is_floating_point() or tensor.is_complex()


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN or infinite value.

    The sum of finite values is finite unless it overflows, and takes a tenth of the time of a look at each value.
    """
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def equal_weights(one: Weights, other: Weights) -> bool:
    """Whether two states have the same keys, devices, types, shapes and values."""
    if one.keys() != other.keys():
        return False
    pairs = [(tensor, other[key]) for key, tensor in one.items()]
    if any(a.device != b.device or a.dtype != b.dtype or a.shape != b.shape for a, b in pairs):
        return False
    if all(a.device.type == "cpu" for a, _ in pairs):
        return all(torch.equal(a, b) for a, b in pairs)
    # one transfer for all tensors, because the host waits for an accelerator at each
    differ = [(a != b).any() for a, b in pairs]
    return not bool(torch.stack([answer.to(differ[0].device) for answer in differ]).any())


def digest(weights: Weights) -> str:
    """SHA-256 of the vectors of a state: its biases, and the scales, shifts and running statistics of its norms.

    Each training step changes them, and they keep their values in a set that is published in half precision, so that
    both forms of a model have the same digest.

    Args:
        weights: A state_dict.

    Returns:
        The digest in hexadecimal digits.
    """
    found = hashlib.sha256()
    for name in sorted(name for name, tensor in weights.items() if tensor.ndim == 1 and tensor.is_floating_point()):
        found.update(name.encode() + weights[name].detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def copy_network(network: nn.Module, replaced: dict[int, nn.Module] | None = None) -> nn.Module:
    """Make a deep copy of a network, with some modules replaced.

    It can also copy a network that keeps outputs of its last forward (deep supervision of DynUNet), which torch cannot
    copy if they have a gradient.

    Args:
        network: Network to copy.
        replaced: Modules of the copy, by the id of the module that each replaces wherever it is used.
    """
    memo: dict[int, nn.Module | Tensor] = dict(replaced or {})
    for module in network.modules():
        for value in vars(module).values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Tensor) and not item.is_leaf:
                    memo[id(item)] = item.detach()
    return copy.deepcopy(network, memo)


def check_experts(network: nn.Module, experts: Mapping[str, Weights]) -> None:
    """Check that every expert fits a network.

    Args:
        network: Network that defines the architecture.
        experts: Routing space, name -> state_dict.

    Raises:
        InputError: If one does not; the message names the expert and the first difference.
    """
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
            if not all_finite(state[key]):
                raise InputError(f"expert '{name}' has NaN or infinite values in '{key}'; train or download it again.")
        extra = next((key for key in state if key not in own), None)
        if extra is not None:
            raise InputError(f"expert '{name}' does not fit the network: unknown '{extra}'; use one architecture.")


def interpolate(global_state: Weights, personalised_state: Weights, share: float) -> dict[str, Tensor]:
    """Interpolate between two models of one architecture.

    Args:
        global_state: Global model, which also gives the integer buffers and the device.
        personalised_state: Personalised model.
        share: Share of the personalised model, in [0, 1].
    """
    if not 0 <= share <= 1:
        raise InputError(f"the share of the personalised model must be from 0 to 1, but is {share}.")
    return {
        key: torch.lerp(tensor, personalised_state[key].to(tensor), share) if is_weight(tensor) else tensor.clone()
        for key, tensor in global_state.items()
    }


def validated_interpolation(
    global_state: Weights,
    personalised_states: Sequence[Weights],
    validate: Callable[[dict[str, Tensor]], float],
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> tuple[float, dict[str, Tensor]]:
    """Select the interpolation with the highest Dice on a site's validation cases.

    The global model is always a candidate, so that the result is never worse on these cases.

    Args:
        global_state: Global model.
        personalised_states: Models to interpolate with, one at a time.
        validate: Function of weights that returns their Dice on the validation cases.
        shares: Shares of the personalised model to choose from.

    Returns:
        The share and the weights; at equal Dice, those of the first model and of its smallest share.
    """
    candidates = [(0.0, global_state)]
    candidates += [(share, state) for state in personalised_states for share in sorted(set(shares) - {0.0})]

    def score(candidate: tuple[float, Weights]) -> float:
        share, state = candidate
        dice = validate(interpolate(global_state, state, share))
        return -1.0 if math.isnan(dice) else dice

    share, state = max(candidates, key=score)
    return share, interpolate(global_state, state, share)
