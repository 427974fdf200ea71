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
"""The NVIDIA FLARE job that is made from a bundle's ``federate.json``.

A job holds the model to begin with, a script of one line and a JSON of settings. The code that runs is this package,
installed at the server (`flare_server`) and at every site (`flare_client`).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor, ExecutionMode
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat

from shared_iopfl.evaluation.run.earlier_run import check_settings
from shared_iopfl.evaluation.scoring import Scoring
from shared_iopfl.federation.averaging import ServerMomentum
from shared_iopfl.federation.flare.client import bundle_fingerprint
from shared_iopfl.federation.flare.messages import JOB_FILE
from shared_iopfl.federation.flare.persistor import CHECKPOINT, ServerFiles
from shared_iopfl.federation.flare.server import Rounds
from shared_iopfl.federation.simulation import Federation
from shared_iopfl.models.architecture import describe_architecture, network_of
from shared_iopfl.models.files import save_atomically
from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.config_values import as_value, as_values, check_key, is_data
from shared_iopfl.utils.errors import InputError, root_input_error
from shared_iopfl.utils.names import nearest

SCRIPT = "iopfl_site.py"
# short, so that a site can read what it is asked to run
SCRIPT_TEXT = "from shared_iopfl.federation.flare.client import run\n\nrun(__file__)\n"
# what belongs to a machine, not to the federation
OF_THE_MACHINE = ("bundle_root", "dataset_dir", "output_dir", "ckpt_dir", "device")
# outside sites need published models; the time limit of a site is round_timeout
OF_ONE_PROCESS = ("outside_sites", "mode", "preset", "routing", "site_timeout")


class FederationRecipe(FedAvgRecipe):
    """FLARE's recipe for federated averaging, with our own rounds (see `Rounds`) and files.

    Args:
        name: of the job.
        rounds: the server's part.
        needed: the job starts once so many of its sites are connected, without those who are not; it ends when fewer
            are left.
        python: a site does each task in a process of its own, started by this command; "": FLARE's own process does it.
        files: folder with ``server`` and ``client``, whose contents travel with the job (see `write_files`).
    """

    def __init__(self, name: str, rounds: Rounds, needed: int, python: str, files: Path) -> None:
        self._rounds = rounds
        self._python = python
        super().__init__(
            name=name,
            min_clients=needed,
            num_rounds=rounds.rounds,
            train_script=SCRIPT,
            model_persistor=ServerFiles(),
            server_expected_format=ExchangeFormat.PYTORCH,
            key_metric="",
        )
        self._job.set_app_packages([__package__.partition(".")[0]])  # installed everywhere, not copied into the job
        self.add_server_file(str(files / "server"))
        self.add_client_file(str(files / "client"))

    def _create_controller(self, persistor_id: str, model_params: Any, model_aggregator: Any) -> Rounds:
        return self._rounds

    def _prepare_client_apps(self) -> None:
        how: dict[str, Any] = {"execution_mode": ExecutionMode.IN_PROCESS, "task_script_path": SCRIPT}
        if self._python:
            command = [self._python, "-u", f"custom/{SCRIPT}"]
            how = {"execution_mode": ExecutionMode.EXTERNAL_PROCESS, "command": command, "launch_once": False}
        how |= {"params_exchange_format": ExchangeFormat.PYTORCH, "server_expected_format": ExchangeFormat.PYTORCH}
        for site in self._rounds.sites:  # and no other client of the FLARE system
            self._job.to(ClientAPIExecutor(**how), site)


def describe(bundle: Path, given: Mapping[str, Any]) -> tuple[Federation, Scoring, dict[str, Any]]:
    """The run that ``federate.json`` describes with some of its settings, or ``train.json``'s, given.

    Returns:
        The run and its final scoring, both without anything of this machine, and its settings as in ``run.json``.

    Raises:
        InputError: for an unknown setting, a value that it may not have, or one that is more than data.
    """
    federate, train = ConfigParser(), ConfigParser()
    for parser, name in ((federate, "federate"), (train, "train")):
        path = bundle / "configs" / f"{name}.json"
        if not path.is_file():
            raise InputError(f"no bundle at {bundle}: it has no configs/{name}.json.")
        parser.read_config(str(path))
    configs: list[Any] = [federate.config, train.config]
    of_site = {}
    for name, value in given.items():
        key = check_key(name).split("#")[0]
        if not is_data(value):
            raise InputError(f"{name} must be a plain value, but is {value!r}: a site evaluates nothing of others.")
        if key in OF_ONE_PROCESS:
            raise InputError(f"'{key}' is a setting of the one-process run; docs/flare.md says what to do instead.")
        if name in OF_THE_MACHINE or not any(key in config for config in configs):
            hint = nearest(key, [key for config in configs for key in config])
            missing = f": it is not a key of {bundle}/configs/federate.json or train.json"
            raise InputError(f"unknown setting '{name}'{missing}{hint or '.'}")
        if key in configs[0]:
            federate[name] = value
        else:
            of_site[name] = value
    check_values(given)
    federate["bundle_root"] = as_value(str(bundle))
    try:
        federation = federate.get_parsed_content("federation")
        scoring = federate.get_parsed_content("scoring")
        settings = federate.get_parsed_content("settings")
    except RuntimeError as error:  # as MONAI hands on what a component raises
        raise root_input_error(error) or error from error
    federation.overrides.update(of_site)
    for content in (federation.overrides, scoring.overrides, settings):
        for name in OF_THE_MACHINE:
            content.pop(name, None)
    return federation, scoring, {**settings, **of_site}


def first_state(bundle: Path, federation: Federation) -> dict[str, Any]:
    """The checkpoint that a run begins with: the network that the one-process run begins with, and no round done."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "train.json"))
    parser.update(as_values(federation.overrides))
    with torch.random.fork_rng():  # the random state outside is left as it was
        torch.manual_seed(federation.seed)
        network = parser.get_parsed_content("network_def")
    weights = federation.first_weights(network.state_dict())
    parameters = [name for name, _ in network.named_parameters()]
    run = uuid.uuid4().hex[:12]
    tables: dict[str, list] = {"history": [], "failures": []}
    settings = federation.settings()
    begun = {"settings": settings, "run": run, "round": 0, "selected": False}
    server = ServerMomentum().state_dict()
    return {**begun, "weights": weights, "parameters": parameters, "server": server, **tables}


def architecture_of(bundle: Path, federation: Federation) -> dict[str, Any]:
    """What the models of a run are trained with, as its manifest says it."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "train.json"))
    # a folder of no models: what it would say goes before the config
    parser.update(as_values({**federation.overrides, "ckpt_dir": ""}))
    values = parser.get_parsed_content("architecture") if "architecture" in parser else {}
    return describe_architecture(values, network_of(parser.config))


def read_state(path: Path, federation: Federation) -> dict[str, Any]:
    """A checkpoint of this federation.

    Raises:
        InputError: where it cannot be read, or was begun with other settings.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        was, run = dict(state["settings"]), state["run"]
    except Exception as error:
        raise InputError(f"cannot read {path} ({type(error).__name__}); remove it to start anew.") from error
    check_settings(was, federation.settings(), f"{path} of run {run}")
    return state


def write_files(
    files: Path,
    bundle: Path,
    federation: Federation,
    state: Mapping[str, Any],
    round_timeout: int = 0,
    device: str | None = None,
    machine: Mapping[str, str] | None = None,
    tracking: str = "",
    publish: bool = False,
) -> None:
    """Write what a job carries.

    Args:
        files: an empty folder.
        bundle: the bundle's folder.
        federation: what is run.
        state: the checkpoint to begin with.
        round_timeout: seconds that a site may take for a task; 0: no limit.
        device: that the sites train on; None: CUDA where there is some.
        machine: where bundle, dataset_dir and output_dir lie, if everything is on this machine; else each site says it.
        tracking: what the server keeps the sites' figures in as they come; "": nothing.
        publish: the sites that say so themselves hand their personalised models to the others.
    """
    job = {
        **dict.fromkeys(("bundle", "dataset_dir", "output_dir")),
        **(machine or {}),
        "device": device,
        "fingerprint": bundle_fingerprint(bundle),
        "run": state["run"],
        "rounds": federation.rounds,
        "local_epochs": federation.local_epochs,
        "round_timeout": round_timeout,
        "own_rounds": federation.own_rounds,
        "shares": list(federation.shares),
        "publish": publish,
        "tracking": tracking,
        "seed": federation.seed,
        "overrides": federation.overrides,
    }
    (files / "server").mkdir()
    (files / "client").mkdir()
    save_atomically(dict(state), files / "server" / CHECKPOINT)
    (files / "client" / JOB_FILE).write_text(json.dumps(job, indent=4) + "\n", encoding="utf-8")
    (files / "client" / SCRIPT).write_text(SCRIPT_TEXT, encoding="utf-8")
