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
"""Pictures of the eye fundus for the tests, and where the disc in them is."""

from __future__ import annotations

import numpy as np
import torch

from shared_iopfl.data.phantoms.fundus import fundus_case, fundus_style


def tensor(picture: np.ndarray) -> torch.Tensor:
    """(H, W, 3) -> (3, W, H), as MONAI's readers give it."""
    return torch.as_tensor(np.ascontiguousarray(picture.T), dtype=torch.float32)


def case(site: str, seed: int = 0, photograph: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """A synthetic picture (3, W, H) and its coded mask (1, W, H)."""
    picture, mask = fundus_case(fundus_style(site), 480 if photograph else 256, np.random.RandomState(seed), photograph)
    return tensor(picture), torch.as_tensor(mask.T.copy(), dtype=torch.float32)[None]


def truth(mask: torch.Tensor) -> tuple[np.ndarray, float]:
    """Centre and mean diameter of the disc in a mask."""
    pixels = np.argwhere(mask[0].numpy() > 0)
    return pixels.mean(axis=0), float(np.ptp(pixels, axis=0).mean() + 1)
