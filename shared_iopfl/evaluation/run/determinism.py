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
"""Choice between deterministic and fast kernels of the backends."""

from __future__ import annotations

import os

import torch


def set_backends(deterministic: bool = False) -> None:
    """Use cuDNN's deterministic kernels, whose results are reproducible to the bit, or let it select the fastest ones.

    On a CPU, results are reproducible for a fixed number of threads. If CUDA has no deterministic kernel for an
    operation, another one is used, with a warning that names the operation.

    Args:
        deterministic: Whether to use deterministic kernels.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
    if deterministic or torch.are_deterministic_algorithms_enabled():  # the call takes seconds to import the compiler
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
