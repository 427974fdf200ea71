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
"""``python -m benchmarks routing|adaptation|training|scaling|accuracy|options|startup``: prints one JSON object."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import fire

from benchmarks import accuracy, adaptation, options, routing, scaling, startup, training
from benchmarks.timing import use_clock

BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "routing": routing.measure,
    "adaptation": adaptation.measure,
    "training": training.measure,
    "scaling": scaling.measure,
    "accuracy": accuracy.measure,
    "options": options.measure,
    "startup": startup.measure,
}


def main(name: str, clock: str = "wall", **arguments: Any) -> None:
    """Run one benchmark.

    Args:
        name: routing, adaptation, training, scaling, accuracy, options or startup.
        clock: see :func:`benchmarks.timing.use_clock`.
        arguments: --device cuda, --repeats, --features, --image_size and what else the benchmark's `measure` takes.
    """
    if name not in BENCHMARKS:
        sys.exit(f"error: unknown benchmark '{name}': choose one of {', '.join(BENCHMARKS)}.")
    use_clock(clock)
    # what libraries print and log is no part of the object: all of it goes to stderr
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as stdout:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        result = BENCHMARKS[name](**arguments)
        print(json.dumps({"benchmark": name, **result}, indent=2), file=stdout)


if __name__ == "__main__":
    fire.Fire(main)
