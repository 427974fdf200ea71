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
"""A device that behaves as CUDA where it matters and computes on the CPU, for tests on machines without a GPU.

:func:`start` makes it, ``torch.device("pretended")``, for the rest of the process: its tensors refuse to mix with CPU
tensors, autocast and loss scaling follow CUDA's rules, :func:`waits` counts how often the host would have waited for
the device, and :func:`without_cuda_kernel` names operators that CUDA does not have. Speed, memory and the numerics of
CUDA's own kernels it does not show. Built once, with a C++ compiler, beside torch's other extensions.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

NAME = "pretended"
SOURCE = Path(__file__).with_suffix(".cpp")
COMPILER = os.environ.get("CXX", "c++")


def can_be_built() -> bool:
    """Whether there is a C++ compiler."""
    return shutil.which(COMPILER) is not None


def start() -> torch.device:
    """Build the device if need be, load it, and let what asks for CUDA's autocast and loss scaling have its own."""
    torch.ops.load_library(str(_build()))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    _take_the_place_of_cuda()
    return torch.device(NAME, 0)


def waits() -> int:
    """How often the host would have waited for the device so far: numbers and tensors read, sizes asked for."""
    return torch.ops.pretended_device.waits()


def take_operators() -> list[str]:
    """The operators that have run since this was last asked."""
    return torch.ops.pretended_device.take_operators()


def without_cuda_kernel(operators: Iterable[str]) -> list[str]:
    """Those of the operators that torch's own list has no CUDA kernel for."""
    return sorted(set(operators) - _with_cuda_kernel())


def _build() -> Path:
    from torch.utils import cpp_extension

    identity = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {sys.platform}".encode()).hexdigest()[:16]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    library = root / f"pretended_device_{identity}.so"
    root.mkdir(parents=True, exist_ok=True)
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes that start together build it once
        if not library.exists():
            unfinished = library.with_suffix(f".{os.getpid()}.so")
            command = [COMPILER, "-std=c++20", "-O0", "-fPIC", "-shared", "-w", str(SOURCE), "-o", str(unfinished)]
            command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
            command += [f"-I{path}" for path in cpp_extension.include_paths()]
            command += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
            subprocess.run(command, check=True)
            unfinished.replace(library)
    return library


def _module() -> types.ModuleType:
    """What torch asks of ``torch.pretended``."""
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = module.synchronize = lambda device=None: None
    module.device = lambda device: contextlib.nullcontext()
    module._is_in_bad_fork = lambda: False
    module.manual_seed = module.manual_seed_all = lambda seed: None  # it draws from the CPU's generator
    module.get_rng_state = lambda device=None: torch.empty(0, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=None: None
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    return module


def _take_the_place_of_cuda() -> None:
    """MONAI's engines name "cuda" where they mean the accelerator; on a machine without CUDA nothing else does."""

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any) -> None:
            if device_type in ("cuda", NAME):
                device_type, dtype = NAME, dtype or torch.float16
            super().__init__(device_type, dtype, *args, **kwargs)

    class Scaler(torch.amp.GradScaler):
        def __init__(self, device: str = NAME, *args: Any, **kwargs: Any) -> None:
            super().__init__(NAME if device == "cuda" else device, *args, **kwargs)

    torch.autocast = torch.amp.autocast = Autocast  # type: ignore[misc,attr-defined]
    torch.GradScaler = torch.amp.GradScaler = torch.cuda.amp.GradScaler = Scaler  # type: ignore[misc,assignment]


@functools.cache
def _with_cuda_kernel() -> frozenset[str]:
    """Operators, by the list that torch generates its dispatch tables from."""
    import torchgen  # in torch's wheel

    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    delegates: dict[str, str] = {}
    found: set[str] = set()
    for entry in re.split(r"^- func: ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        overload = entry.partition("(")[0]
        if delegate := re.search(r"^  structured_delegate: (\S+)", entry, re.MULTILINE):
            delegates[overload] = delegate[1]
        keys = re.findall(r"^    ([\w, ]+):", entry.partition("  dispatch:")[2], re.MULTILINE)
        # without a table it is made of other operators, which have kernels
        if "  dispatch:" not in entry or any("CUDA" in key or "Composite" in key for key in keys):
            found.add(overload)
    found |= {overload for overload, delegate in delegates.items() if delegate in found}
    return frozenset(f"aten::{overload.partition('.')[0]}" for overload in found)
