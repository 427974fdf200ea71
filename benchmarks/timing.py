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
"""Timing two things side by side, and saying on what machine."""

from __future__ import annotations

import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import monai
import torch

__all__ = ["alternate", "clock", "machine", "now", "peak_memory", "print_peak", "spread", "use_clock"]


CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
_clock = ["wall"]


def use_clock(name: str) -> None:
    """Time by the "wall" clock, or (a CPU that others use too; one thread) by the time this "process" was given.

    Raises:
        SystemExit: for any other.
    """
    if name not in CLOCKS:
        sys.exit(f"error: unknown clock '{name}': choose one of {', '.join(CLOCKS)}.")
    _clock[0] = name
    if name == "process":
        torch.set_num_threads(1)


def clock() -> str:
    """The name of the chosen clock."""
    return _clock[0]


def now() -> float:
    """Seconds on the chosen clock."""
    return CLOCKS[_clock[0]]()


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    began = now()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - began


def alternate(
    one: Callable[[], Any], other: Callable[[], Any], device: torch.device, repeats: int = 5, warm: int = 1
) -> dict[str, Any]:
    """Time `one` and `other` in turn, so that what else the machine does meets both.

    Returns:
        ``ratio``: of neighbouring pairs, one over other; ``seconds`` of both. Each with median, min and max.
    """
    for _ in range(warm):
        _seconds(other, device), _seconds(one, device)
    pairs = []
    for index in range(repeats):
        # each goes first as often as last: a machine that slows down as it warms up favours neither
        if index % 2:
            first = _seconds(one, device)
            pairs.append((first, _seconds(other, device)))
        else:
            last = _seconds(other, device)
            pairs.append((_seconds(one, device), last))
    return {
        "ratio": spread([a / b for a, b in pairs]),
        "seconds": spread([a for a, _ in pairs]),
        "seconds_of_other": spread([b for _, b in pairs]),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min and max."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on, and with which versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    found: dict[str, Any] = {"device": device.type, "cpu": name, "threads": torch.get_num_threads(), "clock": _clock[0]}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "monai": monai.__version__}
    return {"machine": found, "versions": versions}


def peak_memory(module: str, *arguments: str) -> float:
    """GiB that ``python -m module arguments`` holds at most, a process of its own.

    The module prints its own peak (see :func:`print_peak`).
    """
    command = [sys.executable, "-m", module, *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return round(float(output.strip().splitlines()[-1]), 3)


def print_peak(device: torch.device) -> None:
    """Print the peak memory of this process in GiB: on CUDA the allocator's, else all that was resident."""
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated(device) / 2**30)
    else:
        print(_peak_resident())


def _peak_resident() -> float:
    """The peak resident memory of this process in GiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage would count what the parent process held when it started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
