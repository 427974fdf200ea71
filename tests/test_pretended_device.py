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
"""The tests marked `gpu`, run on the pretended device in a process of their own; and what that device is good for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pretended_device
import pytest
import torch
from torch import nn

TESTS = Path(__file__).parent
MARKED = [path for path in TESTS.rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
TRAINING = TESTS / "bundles" / "test_bundles_on_gpu.py"  # takes as long as all others


@pytest.mark.slow
@pytest.mark.skipif(not pretended_device.can_be_built(), reason="needs a C++ compiler for the pretended device")
@pytest.mark.parametrize("files", [[TRAINING], sorted({*MARKED} - {TRAINING})], ids=["bundles", "others"])
def test_what_is_marked_gpu_passes_on_the_pretended_device(files: list[Path]) -> None:
    environment = {**os.environ, "IOPFL_TEST_DEVICE": pretended_device.NAME, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-p", "no:xdist", "-rs", "--durations", "10"]
    told = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout[-10_000:] + told.stderr[-2_000:]
    assert "skipped" not in told.stdout.splitlines()[-1]


@pytest.mark.gpu
def test_a_mixture_of_devices_is_refused(gpu: torch.device) -> None:
    here, there = torch.ones(3, device=gpu), torch.ones(3)
    assert (here + torch.tensor(1.0)).device == gpu  # a single number may come from anywhere
    for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: nn.Linear(3, 3)(here)):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()


@pytest.mark.gpu
def test_autocast_follows_cudas_rules(gpu: torch.device) -> None:
    images = torch.ones(2, 4, 8, 8, device=gpu)
    with torch.autocast("cuda"):
        halved = nn.Conv2d(4, 4, 3).to(gpu)(images)
        assert halved.dtype == torch.float16
        assert nn.BatchNorm2d(4).to(gpu).eval()(halved).dtype == torch.float16
        assert nn.GroupNorm(2, 4).to(gpu)(halved).dtype == torch.float32
        assert torch.softmax(halved, 1).dtype == torch.float32


@pytest.mark.gpu
def test_waits_of_the_host_are_counted(gpu: torch.device, waits) -> None:
    values = torch.arange(4.0, device=gpu)
    assert waits(lambda: values + 1) == 0
    assert waits(lambda: float(values.sum())) == 1
    assert waits(lambda: values.cpu()) == 1
    assert waits(lambda: values[values > 1]) == 1
    assert waits(lambda: bool((values > 1).any())) == 1


def test_operators_without_a_kernel_on_cuda_are_named() -> None:
    assert pretended_device.without_cuda_kernel(["aten::add", "aten::relu_", "aten::mkldnn_linear", "aten::none"]) == [
        "aten::mkldnn_linear",
        "aten::none",
    ]
