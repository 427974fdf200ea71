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
"""Inside-outside personalization for federated segmentation (IOP-FL): what the bundles' JSON refers to.

``from shared_iopfl import segment`` segments a scan from Python.

The folders, from the lowest to the highest: utils, data, models, routing, inferers, evaluation, report, handlers,
federation, comparison, commands. Each imports from those before it only; ``docs/architecture.md`` lists their files.
"""

from importlib import import_module
from typing import Any

__version__ = "0.15.0"


def __getattr__(name: str) -> Any:
    if name in ("Segmentation", "segment"):  # imported when asked for: configs and lists of files do without it
        return getattr(import_module("shared_iopfl.commands.segment"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
