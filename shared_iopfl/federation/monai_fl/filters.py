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
"""Privacy filters of MONAI FL clients for ``fl_filters.json``: they hold back a part of each update."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from monai.fl.utils.constants import ExtraItems, WeightType
from monai.fl.utils.exchange_object import ExchangeObject
from monai.fl.utils.filters import Filter
from monai.utils.enums import EngineStatsKeys
from torch import Tensor

from shared_iopfl.utils.errors import InputError


class ArrivedWeights(Filter):
    """Remembers the weights that arrived last, and passes them on: a ``pre_filter`` for those of what leaves.

    Attributes:
        weights: name -> tensor, on the CPU; empty before any arrived.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def __call__(self, data: ExchangeObject, extra: dict | None = None) -> ExchangeObject:
        self.weights = {name: torch.as_tensor(w).detach().cpu().clone() for name, w in (data.weights or {}).items()}
        return data


class SelectiveSharing(Filter):
    """Sends a part of a site's changes to the weights only (Shokri and Shmatikov, CCS 2015).

    Of each tensor's values, those that changed least are withheld, so is a random part of the others, and those that
    changed most are clipped. Bounds are percentiles of the tensor at hand and not one figure for all: batch-norm
    statistics move on another scale than weights. Each value of the server's model stays between the old one and the
    site's own, so that no variance turns negative. Integer buffers pass as they are.

    Of full weights, only those are sent that had arrived before, changed in part as well.

    This makes scans harder to reconstruct from one update. It is not differential privacy and gives no guarantee.

    Args:
        arrived: what full weights are compared with; weight differences need none.
        percentile: of the magnitudes of a tensor's changes; smaller changes are withheld. 0: none.
        clip: the percentile that larger changes are clipped to. 100: none.
        share: of the other changes, drawn anew in each round, that is sent, in (0, 1].
        seed: of the drawing, which depends on it, the round and the client's name, where it is told one.
    """

    def __init__(
        self,
        arrived: ArrivedWeights | None = None,
        percentile: float = 10.0,
        clip: float = 99.0,
        share: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= percentile < clip <= 100:
            raise InputError(f"0 <= percentile < clip <= 100 must hold, but they are {percentile} and {clip}.")
        if not 0 < share <= 1:
            raise InputError(f"share must be above 0 and at most 1, but is {share}.")
        self.arrived = arrived
        self.percentile = percentile
        self.clip = clip
        self.share = share
        self.seed = seed

    def __call__(self, data: ExchangeObject, extra: dict | None = None) -> ExchangeObject:
        """The same object, with filtered weights in place of those it came with."""
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
        # not torch.quantile, which refuses tensors of more than 16 million values
        sizes = change.abs().double().cpu().numpy()
        low = np.percentile(sizes, self.percentile, method="lower")
        high = np.percentile(sizes, self.clip, method="higher")
        drawn = torch.rand(change.shape, generator=generator).to(change.device) < self.share
        sent = (change.abs() >= low) & drawn
        return torch.where(sent, change.clamp(-high, high), torch.zeros_like(change))
