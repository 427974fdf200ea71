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

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.10.0"

# Until version 0.1 all modules were in one folder. Configs and scripts that name them so go on working:
# the folder, and its modules as "name", or "old:new" where the name has changed.
_MOVED = {
    "utils": "errors files reading tables names checks config_values stacks",
    "data": "scan_names scan_files layouts sites patients scans:loading masks mask_values",
    "data.volumes": "headers geometry dicom label_maps",
    "data.photographs": "photographs:reader photograph_checks:checks codings field_of_view locating cropping measures",
    "data.phantoms": "phantoms:sites phantom_prostate:prostate phantom_fundus:fundus phantom_noise:noise",
    "models": "manifest architecture packaging",
    "routing": "routed_layers:layers routers routing_check:check settings distances objectives adaptation",
    "inferers": "baselines",
    "handlers": "norm_statistics checkpoints personalised_metrics precision local_training:methods",
    "evaluation": "records review tolerant scoring scores intervals personalised_verdict pseudonyms",
    "evaluation.run": "run_folder:folder folder_lock:lock written served provenance determinism",
    "report": "pages charts pictures gallery report_routes:routes overlays documents",
    "federation": (
        "federation_checkpoint:checkpoint federation_results:results site_client:client updates averaging "
        "server_momentum"
    ),
    "federation.monai_fl": "clients:bundle_client fl_filters:filters",
    "federation.flare": "flare:run flare_client:client flare_job:job flare_server:server flare_results:results",
    "comparison": (
        "comparison_scores:scores comparison_tables:tables comparison_cases:cases comparison_report:report "
        "comparison_training:training"
    ),
}


class _MovedModules(MetaPathFinder, Loader):
    """Finds a module by its name of version 0.1, with a `DeprecationWarning`; it is the same module by either name."""

    def __init__(self) -> None:
        pairs = [(folder, name.partition(":")) for folder, names in _MOVED.items() for name in names.split()]
        self.new_names = {f"{__name__}.{old}": f"{__name__}.{folder}.{new or old}" for folder, (old, _, new) in pairs}

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in self.new_names else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new_name = self.new_names[spec.name]
        warnings.warn(f"{spec.name} is now {new_name}", DeprecationWarning, stacklevel=2)
        module = import_module(new_name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state  # its own, which the import system has just replaced


sys.meta_path.append(_MovedModules())


def __getattr__(name: str) -> Any:
    if name in ("Segmentation", "segment"):  # imported when asked for: configs and lists of files do without it
        return getattr(import_module("shared_iopfl.commands.segment"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
