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
"""The order of the tests, and the device of those marked `gpu`.

That is CUDA, or with ``IOPFL_TEST_DEVICE=pretended`` a device that behaves like it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator

import pretended_device
import pytest
import torch

LONGEST = ("test_pretended_device", "test_compare", "test_flare_processes", "test_documented_commands", "test_notebook")
PRETENDED = os.environ.get("IOPFL_TEST_DEVICE") == pretended_device.NAME
DEVICE = pretended_device.start() if PRETENDED else torch.device("cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of the longest tests first, so that the workers end together."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """The device; what runs on a pretended one must have kernels on CUDA."""
    if not PRETENDED and not torch.cuda.is_available():
        pytest.skip("needs CUDA; on a pretended device it is run by tests/test_pretended_device.py")
    if PRETENDED:
        pretended_device.take_operators()
    yield DEVICE
    if PRETENDED:
        lacking = pretended_device.without_cuda_kernel(pretended_device.take_operators())
        assert not lacking, f"no CUDA kernel for {', '.join(lacking)}"


@pytest.fixture
def waits(gpu: torch.device) -> Callable[[Callable[[], object]], int]:
    """How often the host waits for the device while something runs."""

    def count(run: Callable[[], object]) -> int:
        if PRETENDED:
            before = pretended_device.waits()
            run()
            return pretended_device.waits() - before
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(one.message) for one in caught)

    return count
