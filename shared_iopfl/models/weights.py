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
"""Operations on model weights: whether they fit a network, comparison, copies, interpolation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from shared_iopfl.utils.errors import InputError

Weights = Mapping[str, Tensor]  # of a state_dict


def is_weight(tensor: Tensor) -> bool:
    """Whether a tensor of a state_dict is averaged or mixed: real or complex numbers; integer counters are not."""
    return tensor.is_floating_point() or tensor.is_complex()


def equal_weights(one: Weights, other: Weights) -> bool:
    """Whether two states are the same in keys, device, type and value."""
    if one.keys() != other.keys():
        return False
    pairs = [(tensor, other[key]) for key, tensor in one.items()]
    if any(a.device != b.device or a.dtype != b.dtype or a.shape != b.shape for a, b in pairs):
        return False
    if all(a.device.type == "cpu" for a, _ in pairs):
        return all(torch.equal(a, b) for a, b in pairs)
    # the host waits for an accelerator once, not once a tensor
    differ = [(a != b).any() for a, b in pairs]
    return not bool(torch.stack([answer.to(differ[0].device) for answer in differ]).any())


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


def check_experts(network: nn.Module, experts: Mapping[str, Weights]) -> None:
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


def interpolate(global_state: Weights, personalised_state: Weights, share: float) -> dict[str, Tensor]:
    """Weights between two models of one architecture; integer buffers are the global one's.

    Args:
        global_state, personalised_state: the two models; the result lies where the global one does.
        share: of the personalised model, in [0, 1].
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
    """The interpolation with the highest Dice on a site's validation cases, never below that of the global model.

    Args:
        global_state: the global model.
        personalised_states: what it may be interpolated with, one of them.
        validate: the Dice of weights on the site's validation cases.
        shares: of the personalised model, to choose among; 0, the global model, is always one of them.

    Returns:
        The share and the weights; of equal ones, those of the first model and its smallest share.
    """
    tries = [(0.0, global_state)]
    tries += [(share, state) for state in personalised_states for share in sorted(set(shares) - {0.0})]
    best, choice = -1.0, tries[0]
    for share, state in tries:
        dice = validate(interpolate(global_state, state, share))
        if dice > best:
            best, choice = dice, (share, state)
    return choice[0], interpolate(global_state, choice[1], choice[0])
