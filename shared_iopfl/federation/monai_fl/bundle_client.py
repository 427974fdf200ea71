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
"""A bundle as a MONAI FL client: the site of the client, and the manifest of its model folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events

from shared_iopfl.data.layouts import known_sites
from shared_iopfl.models.architecture import check_training, describe_architecture, write_architecture
from shared_iopfl.models.manifest import release
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.names import check_site

# `MonaiAlgo` passes the name of a client to the config as ``run_name``, followed by the time
CLIENT = re.compile(r"(.+)_\d{8}_\d{6}")


def own_site(dataset_dir: str | Path, run_name: str | None, default: str) -> str:
    """Return the name of the site whose scans a client reads.

    It is the site with the name of the federated client; otherwise the only site in the folder; otherwise, outside a
    federation, the default.

    Args:
        dataset_dir: Folder of the sites.
        run_name: ``<client>_<date>_<time>``, as `MonaiAlgo` sets it. Any other text is ignored.
        default: Name of a site; "" for none.

    Returns:
        Name of the site.

    Raises:
        InputError: If a client finds several sites but none with its name, since it must not train on the scans of
            another site; or if none of the three rules gives a site.
    """
    sites = known_sites(Path(dataset_dir)) if Path(dataset_dir).is_dir() else []
    client = CLIENT.fullmatch(run_name or "")
    if client and client[1] in sites:
        return check_site(client[1])
    if len(sites) == 1:
        return check_site(sites[0])
    if client and sites:
        raise InputError(
            f"client '{client[1]}' is none of the sites in {dataset_dir} ({', '.join(sites)}): name the client after "
            "its site, or set site."
        )
    if not default:
        raise InputError(f"{dataset_dir} holds {', '.join(sites) or 'no site'}: name yours with --site.")
    return default


class OwnModels:
    """Writes the architecture of the models into the manifest of their folder when the training starts.

    If the folder contains published models, the manifest also records that the files which the training replaces are no
    longer published. This is a handler and not a step of ``run`` in the config, because `MonaiAlgo` does not run those
    steps.

    Args:
        ckpt_dir: Folder of the models.
        names: Names of the files that the training writes.
        architecture: Settings that must be the same when the models are used, name -> value. The network itself is
            taken from the config.
        beside_others: Whether the folder may contain models of another architecture. A client of a federation works in
            a copy of the bundle that contains the shipped models, and uses none of them.

    Raises:
        InputError: If the folder contains models of another architecture that the training does not replace.
    """

    def __init__(
        self,
        ckpt_dir: str,
        names: Iterable[str],
        architecture: Mapping[str, Any] | None = None,
        beside_others: bool = False,
    ) -> None:
        self.ckpt_dir = ckpt_dir
        self.names = list(names)
        self.architecture = describe_architecture(architecture or {})
        if not beside_others:
            check_training(ckpt_dir, self.architecture, self.names)

    def attach(self, engine: Engine) -> None:
        """Register the handlers with an ignite engine."""
        engine.add_event_handler(Events.STARTED, self.start)

    def start(self, engine: Engine) -> None:
        """Record that the models which are replaced are no longer published, and write the architecture."""
        release(self.ckpt_dir, self.names)
        write_architecture(self.ckpt_dir, self.architecture)
