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
"""A bundle's config up to its first steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

BUNDLES = Path(__file__).parents[1] / "bundles"
PROSTATE = BUNDLES / "prostate_iopfl"


def start(config: str = "inference", typed: tuple[str, ...] = (), bundle: Path = PROSTATE, **overrides: Any) -> Any:
    """A bundle after its first steps, as `monai.bundle run` would start it; `typed` on the command line besides."""
    workflow = ConfigWorkflow(
        str(bundle / "configs" / f"{config}.json"),
        logging_file=False,
        **{"bundle_root": str(bundle), "output_dir": "out", **overrides},
    )
    workflow.initialize()
    return workflow.parser
