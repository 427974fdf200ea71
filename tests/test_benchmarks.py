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
"""The benchmarks run, on tiny networks, and print what their readers expect; their figures mean nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.networks import agree, make_experts, make_network, naive
from shared_iopfl.routing import route

TINY = {
    "routing": ["--slices", "3", "--image_size", "32", "--batch_size", "2"],
    "adaptation": ["--slices", "2", "--image_size", "32", "--memory_slices", "2", "--memory_size", "32"],
    "training": ["--image_size", "32", "--cases", "4"],
    "scaling": ["--slices", "2", "--image_size", "32", "--many", "5", "--few", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_benchmark_prints_one_object_with_ratios_machine_and_versions(name):
    command = [sys.executable, "-m", "benchmarks", name, "--features", "4", "--repeats", "2", *TINY[name]]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout
    found = json.loads(output)
    assert found["benchmark"] == name and found["machine"]["device"] == "cpu" and found["versions"]["torch"]
    for ratio in found["ratios"].values():
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]


def test_nothing_is_timed_where_fast_and_naive_path_differ():
    one = torch.ones(2)
    assert agree(one, one + 1e-6) > 0
    with pytest.raises(SystemExit, match="differ by"):
        agree(one, one + 1e-2)


@pytest.mark.parametrize("per", ["sample", "volume", "layer"])
def test_fast_paths_and_the_naive_loop_agree(per):
    """A loop over samples and experts, each layer on its own: the same masks as the paths that are fast."""
    network = make_network(4, torch.device("cpu"))
    routed = route(network, {"global": network.state_dict(), **make_experts(network, 3)}, per=per, random=True)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = naive(routed)(images)
        torch.testing.assert_close(routed(images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(routed(images), expected, atol=1e-4, rtol=1e-4)  # with gradients: another path
