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
"""The privacy filters of NVIDIA FLARE as filters of a MONAI FL client, for ``fl_svt.json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.fl.utils.constants import WeightType
from monai.fl.utils.exchange_object import ExchangeObject
from monai.fl.utils.filters import Filter
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from shared_iopfl.federation.monai_fl.filters import ArrivedWeights
from shared_iopfl.utils.errors import InputError


@dataclass(eq=False)
class FlarePrivacy(Filter):
    """Applies a privacy filter of FLARE to the changes of a site's weights.

    FLARE's filters are made for changes: in full weights, they would set withheld values to zero. Here the filter is
    applied to the difference between the site's weights and those that arrived, and the arrived weights plus the
    filtered difference are sent. Integer buffers are not changed, and a variance that noise made negative is sent as 0.

    The noise of each round is drawn without a seed, because anybody who knew the seed could remove the noise. NumPy's
    global random state, from which FLARE draws, is restored.

    Args:
        privacy: A filter such as `nvflare.app_common.filters.svt_privacy.SVTPrivacy`.
        arrived: The weights with which full weights are compared; not needed for weight differences.
    """

    privacy: Any
    arrived: ArrivedWeights | None = None

    def __call__(self, data: ExchangeObject, extra: dict | None = None) -> ExchangeObject:
        """Replace the weights of the object by the filtered ones, and return it."""
        weights = {name: torch.as_tensor(tensor) for name, tensor in (data.weights or {}).items()}
        is_change = data.weight_type == WeightType.WEIGHT_DIFF
        old = {} if is_change or self.arrived is None else self.arrived.weights
        mixed = {n: w for n, w in weights.items() if w.is_floating_point() and w.ndim and (is_change or n in old)}
        changes = {name: (w - old[name].to(w) if name in old else w).cpu().numpy() for name, w in mixed.items()}
        left = self._left(changes)
        sent = {name: w for name, w in weights.items() if is_change or name in old}
        for name, tensor in mixed.items():
            sent[name] = torch.as_tensor(left[name]).to(tensor)
            if name in old:
                sent[name] = sent[name] + old[name].to(tensor)
                if name.endswith("running_var"):
                    sent[name] = sent[name].clamp_min(0)
        data.weights = sent
        return data

    def _left(self, changes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        state = np.random.get_state()  # noqa: NPY002 (FLARE draws from the global state)
        try:
            np.random.seed()  # noqa: NPY002 (with entropy of the system)
            found = self.privacy.process_dxo(DXO(DataKind.WEIGHT_DIFF, data=changes), Shareable(), FLContext())
        finally:
            np.random.set_state(state)  # noqa: NPY002
        if found is None or found.data.keys() != changes.keys():
            raise InputError(f"{type(self.privacy).__name__} sends no update with its settings: change them.")
        return found.data
