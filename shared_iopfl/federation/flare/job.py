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
"""The NVIDIA FLARE job that is made from the ``federate.json`` of a bundle.

A job contains the first model, a script of one line and a JSON file with settings. It runs the code of this package,
which is installed at the server and at every site.
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
from torch import nn

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
# it is short, so that a site can read what it is asked to run
SCRIPT_TEXT = "from shared_iopfl.federation.flare.client import run\n\nrun(__file__)\n"
# settings of a machine, not of the federation
OF_THE_MACHINE = ("bundle_root", "dataset_dir", "output_dir", "ckpt_dir", "device")
# outside sites need published models; round_timeout takes the place of site_timeout
OF_ONE_PROCESS = ("outside_sites", "mode", "preset", "routing", "site_timeout")


class FederationRecipe(FedAvgRecipe):
    """FLARE's recipe for federated averaging, with the rounds (`Rounds`) and files of this package.

    Args:
        name: Name of the job.
        rounds: The controller at the server.
        needed: The job starts as soon as this number of its sites is connected, and ends if fewer are left.
        python: Command of the Python interpreter that carries out each task of a site in a process of its own; "": the
            process of FLARE carries it out.
        files: Folder with ``server`` and ``client``, whose contents are sent with the job (see `write_files`).
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
        self._job.set_app_packages(
            [__package__.partition(".")[0]]
        )  # it is installed everywhere, not copied into the job
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
        for site in self._rounds.sites:  # and not for other clients of the FLARE system
            self._job.to(ClientAPIExecutor(**how), site)


def describe(bundle: Path, given: Mapping[str, Any]) -> tuple[Federation, Scoring, dict[str, Any]]:
    """Make the run that ``federate.json`` of a bundle describes.

    Args:
        bundle: Folder of the bundle.
        given: Settings that replace those of ``federate.json`` or ``train.json``.

    Returns:
        The run and its final scoring, both without any setting of this machine, and the settings for ``run.json``.

    Raises:
        InputError: If a setting is unknown, has a value that is not allowed, or is more than data.
    """
    federate, train = _config(bundle, "federate"), _config(bundle, "train")
    configs: list[Any] = [federate.config, train.config]
    of_site = {}
    for name, value in given.items():
        key = check_key(name).split("#")[0]
        if not is_data(value):
            raise InputError(f"{name} must be a plain value, but is {value!r}: sites do not evaluate text of others.")
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
        federation, scoring, settings = map(federate.get_parsed_content, ("federation", "scoring", "settings"))
    except RuntimeError as error:  # MONAI wraps the exceptions of components
        raise root_input_error(error) or error from error
    federation.overrides.update(of_site)
    for content in (federation.overrides, scoring.overrides, settings):
        for name in OF_THE_MACHINE:
            content.pop(name, None)
    return federation, scoring, {**settings, **of_site}


def _config(bundle: Path, name: str, overrides: Mapping[str, Any] | None = None) -> ConfigParser:
    path = bundle / "configs" / f"{name}.json"
    if not path.is_file():
        raise InputError(f"no bundle at {bundle}: it has no configs/{name}.json; give the folder of a bundle.")
    parser = ConfigParser()
    parser.read_config(str(path))
    parser.update(as_values(overrides or {}))
    return parser


def first_state(bundle: Path, federation: Federation) -> dict[str, Any]:
    """Return the first checkpoint of a run: the same first network as in one process, before any round."""
    parser = _config(bundle, "train", federation.overrides)
    with torch.random.fork_rng():  # the global random state is not changed
        torch.manual_seed(federation.seed)
        network: nn.Module = parser.get_parsed_content("network_def")
    weights = federation.first_weights(network.state_dict())
    parameters = [name for name, _ in network.named_parameters()]
    run = {"settings": federation.settings(), "run": uuid.uuid4().hex[:12], "round": 0, "selected": False}
    tables: dict[str, Any] = {"history": [], "failures": []}
    return {**run, "weights": weights, "parameters": parameters, "server": ServerMomentum().state_dict(), **tables}


def architecture_of(bundle: Path, federation: Federation) -> dict[str, Any]:
    """Return what the manifest of a run's models says about their training."""
    # without a ckpt_dir, because the manifest of existing models takes precedence over the config
    parser = _config(bundle, "train", {**federation.overrides, "ckpt_dir": ""})
    values = parser.get_parsed_content("architecture") if "architecture" in parser else {}
    return describe_architecture(values, network_of(parser.config))


def read_state(path: Path, federation: Federation) -> dict[str, Any]:
    """Read a checkpoint of a federation.

    Args:
        path: Path of the checkpoint.
        federation: The run that continues.

    Returns:
        Content of the checkpoint.

    Raises:
        InputError: If it cannot be read, or its run had other settings.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        was, run = dict(state["settings"]), state["run"]
    except Exception as error:
        raise InputError(f"cannot read {path} ({type(error).__name__}); remove it to start a new run.") from error
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
    """Write the files of a job.

    Args:
        files: An empty folder.
        bundle: Folder of the bundle.
        federation: The run.
        state: The checkpoint from which it starts.
        round_timeout: Largest number of seconds that a site may take for a task; 0 sets no limit.
        device: Device on which the sites train; None: CUDA if it is available.
        machine: Paths ``bundle``, ``dataset_dir`` and ``output_dir`` if everything is on this machine; otherwise each
            site sets its own.
        tracking: Where the server records the metrics while the sites report them; "" for nowhere.
        publish: Whether sites that allow it send their personalised models to the other sites.
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
