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
"""Privacy filters of MONAI FL clients for ``fl_filters.json``, which withhold a part of each update."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
from monai.fl.utils.constants import ExtraItems, WeightType
from monai.fl.utils.exchange_object import ExchangeObject
from monai.fl.utils.filters import Filter
from monai.utils.enums import EngineStatsKeys
from torch import Tensor

from shared_iopfl.utils.errors import InputError


@dataclass(eq=False)
class ArrivedWeights(Filter):
    """Keeps the weights that arrived last: a ``pre_filter`` with which filters of the outgoing weights compare.

    Attributes:
        weights: Name -> tensor on the CPU; empty before any weights have arrived.
    """

    weights: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __call__(self, data: ExchangeObject, extra: dict | None = None) -> ExchangeObject:
        self.weights = {name: torch.as_tensor(w).detach().cpu().clone() for name, w in (data.weights or {}).items()}
        return data


@dataclass(eq=False)
class SelectiveSharing(Filter):
    """Sends only a part of the changes of a site's weights (Shokri and Shmatikov, CCS 2015).

    In each tensor, the values that changed least and a random part of the others are withheld, and those that changed
    most are clipped. The limits are percentiles of the changes of that tensor, because batch-norm statistics change on
    another scale than weights. Each value of the server's model stays between the old value and that of the site, so
    that no variance becomes negative. Integer buffers are not changed.

    Full weights are sent only if they had arrived before, and with the same part of their changes.

    This makes it harder to reconstruct scans from one update. It is not differential privacy and gives no guarantee.

    Args:
        arrived: The weights with which full weights are compared; not needed for weight differences.
        percentile: Percentile of the magnitudes of a tensor's changes, in [0, 100); smaller changes are withheld. 0
            withholds none.
        clip: Percentile to which larger changes are clipped, at most 100, which clips none.
        share: Fraction of the other changes that is sent, in (0, 1]; it is drawn again in each round.
        seed: Seed of the drawing, together with the round and the name of the client, if it is known.

    Raises:
        InputError: If `percentile`, `clip` or `share` is out of range.
    """

    arrived: ArrivedWeights | None = None
    percentile: float = 10.0
    clip: float = 99.0
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the limits."""
        if not 0 <= self.percentile < self.clip <= 100:
            raise InputError(f"0 <= percentile < clip <= 100 must hold, not {self.percentile} and {self.clip}.")
        if not 0 < self.share <= 1:
            raise InputError(f"share must be above 0 and at most 1, but is {self.share}.")

    def __call__(self, data: ExchangeObject, extra: dict | None = None) -> ExchangeObject:
        """Replace the weights of the object by the filtered ones, and return it."""
        epoch = int((data.statistics or {}).get(EngineStatsKeys.CURRENT_EPOCH, 0))
        site = zlib.crc32(str((extra or {}).get(ExtraItems.CLIENT_NAME, "")).encode())  # 0 without a name
        seed = int(np.random.SeedSequence((self.seed, epoch, site)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        weights = {name: torch.as_tensor(tensor) for name, tensor in (data.weights or {}).items()}
        if data.weight_type == WeightType.WEIGHT_DIFF:
            data.weights = {name: self._part(change, generator) for name, change in weights.items()}
        else:
            old = self.arrived.weights if self.arrived is not None else {}
            data.weights = {
                name: self._part(tensor - old[name].to(tensor), generator) + old[name].to(tensor)
                for name, tensor in weights.items()
                if name in old
            }
        return data

    def _part(self, change: Tensor, generator: torch.Generator) -> Tensor:
        if not change.is_floating_point() or change.numel() == 0:
            return change
        # not torch.quantile, which does not accept tensors of more than 16 million values
        sizes = change.abs().double().cpu().numpy()
        low = np.percentile(sizes, self.percentile, method="lower")
        high = np.percentile(sizes, self.clip, method="higher")
        drawn = torch.rand(change.shape, generator=generator).to(change.device) < self.share
        sent = (change.abs() >= low) & drawn
        return torch.where(sent, change.clamp(-high, high), torch.zeros_like(change))
