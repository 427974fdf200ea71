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
"""A bundle as a MONAI FL client: which site it is, and the state of its model folder."""

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

# how `MonaiAlgo` hands a client's name to the config: as ``run_name``, with the time behind it
CLIENT = re.compile(r"(.+)_\d{8}_\d{6}")


def own_site(dataset_dir: str | Path, run_name: str | None, default: str) -> str:
    """The site that bears the federated client's name; else the only one in the folder; else, outside a federation, one
    by default.

    Args:
        dataset_dir: folder of the sites.
        run_name: ``<client>_<date>_<time>``, as `MonaiAlgo` sets it; anything else says nothing.
        default: name of a site; "": there is none.

    Raises:
        InputError: where a client finds several sites, and none of its name: it must not train on another's scans; and
            where there is no only one and none by default.
    """
    sites = known_sites(Path(dataset_dir)) if Path(dataset_dir).is_dir() else []
    client = CLIENT.fullmatch(run_name or "")
    if client and client[1] in sites:
        return check_site(client[1])
    if len(sites) == 1:
        return check_site(sites[0])
    if client and sites:
        raise InputError(
            f"client '{client[1]}' is none of the sites in {dataset_dir} ({', '.join(sites)}): name the client as its "
            "site, or say which with site."
        )
    if not default:
        raise InputError(f"{dataset_dir} holds {', '.join(sites) or 'no site'}: name yours with --site.")
    return default


class OwnModels:
    """Before a trainer writes models into a folder, says in its manifest what they are trained with.

    Where a published set lies there, its manifest says from then on that they are not it. A handler, not a step of the
    config's ``run``, which `MonaiAlgo` leaves out.

    Args:
        ckpt_dir: the folder.
        names: of the files that training writes.
        architecture: what has to be the same when they are run, name -> value; the network is the config's.
        beside_others: whether models that were trained with something else may lie there. A client of a federation
            works in a copy of the bundle, with the shipped models in it, and uses none of them.

    Raises:
        InputError: where other models lie there that were trained with something else.
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
        """Take back the published state of the models to be replaced, and write the architecture."""
        release(self.ckpt_dir, self.names)
        write_architecture(self.ckpt_dir, self.architecture)
