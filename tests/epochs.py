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
"""Rounds of one epoch, as `MonaiAlgo` runs them, for the tests of the handlers."""

from __future__ import annotations

from typing import Any

from ignite.engine import Engine


def run_epoch(engine: Engine, data: Any, epoch: int) -> None:
    """Run a round of one epoch, as `MonaiAlgo` does, also in a process that was resumed just before."""
    engine.state.epoch, engine.state.iteration = epoch - 1, (epoch - 1) * len(data)
    engine.state.max_epochs, engine.state.epoch_length = epoch, len(data)
    engine.run(data)
