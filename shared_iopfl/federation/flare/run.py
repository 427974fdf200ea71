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
"""A federation with NVIDIA FLARE: simulated, as a proof of concept on one machine, or in production.

See ``docs/flare.md``.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nvflare.fuel.flare_api.flare_api import new_secure_session
from nvflare.recipe import PocEnv, ProdEnv, SimEnv
from nvflare.recipe.utils import add_experiment_tracking

from shared_iopfl.data.splits import site_cases
from shared_iopfl.evaluation.run.folder import claim, finish
from shared_iopfl.evaluation.run.provenance import write_run
from shared_iopfl.federation.flare.job import (
    FederationRecipe,
    architecture_of,
    describe,
    first_state,
    read_state,
    write_files,
)
from shared_iopfl.federation.flare.messages import ENVIRONMENT, PUBLISH
from shared_iopfl.federation.flare.persistor import CHECKPOINT
from shared_iopfl.federation.flare.results import checked_names, collect, draw, score
from shared_iopfl.federation.flare.server import Rounds
from shared_iopfl.federation.updates import FAILURES
from shared_iopfl.models.architecture import write_architecture
from shared_iopfl.models.files import model_path
from shared_iopfl.models.manifest import CALIBRATION
from shared_iopfl.report.run import write_report
from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import read_rows

TRACKING = ("", "tensorboard", "mlflow")  # the receivers of FLARE that send nothing to other services
LOGIN = 30.0  # seconds to wait for the server


@dataclass(eq=False)
class FlareRun:
    """A federation with FLARE, described by the bundle's ``federate.json`` as the one-process run is.

    Args:
        bundle: Folder of the bundle.
        sites: Names of the inside sites, which are also the names of FLARE's clients.
        rounds: Number of rounds.
        output_dir: Folder to write to. It receives the files of a one-process run (``models/model.pt``,
            ``history.csv``, ``failures.csv``, ``run.json``, TensorBoard events and ``report.html``), and ``flare.pt``,
            from which a run is resumed. On one machine it also receives the final scores, ``sites/<site>`` with what
            each site keeps to itself, and ``flare``, the workspace of FLARE.
        dataset_dir: Folder of the sites; None in production, where each site sets its own.
        round_timeout: Number of seconds after which a round continues without the sites that have not answered; 0 waits
            for all.
        own_process: Whether a site carries out each task in a process of its own. This takes longer, but a process that
            dies costs its site only the round, while otherwise FLARE ends the whole job; and a process that hangs ends
            when the time of the round is over.
        tracking: "tensorboard" or "mlflow": a receiver of FLARE at the server records the metrics while the sites
            report them; empty for none.
        publish: Whether, at the end, the sites that allow it send their personalised models, and every site scores
            those of the others. The results are then ``cross_site.csv`` and all of ``models``, as in one process.
        settings: Other keys of ``federate.json`` or ``train.json``. ``resume`` continues from ``flare.pt``, and
            ``overwrite`` starts again in a folder that such a run has used.

    Raises:
        InputError: If one of the settings is not allowed, before anything starts.
    """

    bundle: Path
    sites: list[str]
    rounds: int
    output_dir: Path
    dataset_dir: Path | None = None
    round_timeout: int = 0
    own_process: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    tracking: str = ""
    publish: bool = False

    def __post_init__(self) -> None:
        """Check the settings and describe the run."""
        self.bundle = Path(self.bundle).resolve()
        self.output_dir = Path(self.output_dir).resolve()
        self.dataset_dir = None if self.dataset_dir is None else Path(self.dataset_dir).resolve()
        given = {**self.settings, "sites": checked_names(self.sites), "rounds": self.rounds}
        self.device = given.pop("device", None)
        self.overwrite = given.pop("overwrite", False)
        check_values({"overwrite": self.overwrite, "publish": self.publish})
        self.federation, self.scoring, self.settings = describe(self.bundle, given)
        self.sites = self.federation.sites
        self.min_sites = self.federation.failures.min_sites
        if not isinstance(self.round_timeout, int) or self.round_timeout < 0:
            raise InputError(f"round_timeout must be whole seconds, 0 for none, but is {self.round_timeout!r}.")
        if self.tracking not in TRACKING:
            known = " or ".join(TRACKING[1:])
            raise InputError(f"tracking must be {known}, or empty for none, but is {self.tracking!r}.")
        self.state: dict[str, Any] = {}

    def simulate(self) -> Path:
        """Run in FLARE's simulator, with one process per site on this machine.

        Returns:
            Path of the global model.
        """
        workspace = self._start_here()
        if re.search(r"[\s'\"\\]", str(workspace)):
            raise InputError(
                f"FLARE's simulator takes no path with spaces or quotes: {workspace}; choose another output_dir."
            )
        self._execute(SimEnv(clients=self.sites, workspace_root=str(workspace), log_config="concise"))
        return self._finish(workspace)

    def prove(self) -> Path:
        """Run as a proof of concept: a provisioned server and clients that communicate by TLS over loopback.

        Returns:
            Path of the global model.
        """
        workspace = self._start_here()
        os.environ["NVFLARE_POC_WORKSPACE"] = str(workspace)
        env = PocEnv(num_clients=len(self.sites), clients=self.sites, extra={"login_timeout": LOGIN})
        try:
            return self._finish(Path(self._execute(env).get_result(clean_up=False) or workspace))
        finally:
            env.stop()

    def export(self) -> Path:
        """Write the job, which a FLARE admin submits.

        Returns:
            Folder of the job.
        """
        self._begin()
        with self._recipe() as recipe:
            recipe.export(str(self.output_dir / "job"))
            finish(self.output_dir)
            return self.output_dir / "job" / recipe.name

    def submit(self, startup_kit: str, username: str | None = None) -> Path:
        """Submit the job to a running FLARE system, wait for its end and collect the results.

        Args:
            startup_kit: Provisioned folder of the admin.
            username: Name of the admin; None: the name of the folder.

        Returns:
            Path of the global model.
        """
        kit = Path(startup_kit).resolve()
        if not (kit / "startup").is_dir():
            raise InputError(f"no startup kit at {kit}: give the folder of the admin that contains 'startup'.")
        username = username or kit.name
        self._check_connected(kit, username)
        self._begin()
        env = ProdEnv(startup_kit_location=str(kit), username=username, login_timeout=LOGIN)
        result = self._execute(env).get_result()
        if result is None:
            raise InputError("FLARE returned no result; see the log of the job at the server.")
        return self._finish(Path(result))

    def _start_here(self) -> Path:
        """Check the data of every site, begin the run, and return the workspace of FLARE."""
        if self.dataset_dir is None:
            raise InputError("no dataset_dir: on one machine, give the folder that holds the sites.")
        given = self.federation.overrides
        how = {name: given[name] for name in ("fractions", "patient", "fold", "folds") if name in given}
        for site in self.sites:
            for part in ("train", "validation") if self.federation.val_interval else ("train",):
                site_cases(self.dataset_dir, site, part, given["split_seed"], **how)
        self._begin()
        for variable in ENVIRONMENT.values():
            os.environ.pop(variable, None)  # they are for a single site; here the job contains the paths for all
        os.environ[PUBLISH] = str(self.publish)  # the user who starts the job decides for all sites
        return self.output_dir / "flare"

    def _check_connected(self, kit: Path, username: str) -> None:
        """Raise `InputError` unless all sites are connected: others would be left out of all rounds of the job."""
        try:
            with closing(new_secure_session(username, str(kit), timeout=LOGIN)) as session:
                there = {client.name for client in session.get_system_info().client_info}
        except Exception as error:
            raise InputError(f"no FLARE server answers to {kit} ({type(error).__name__}): start it.") from error
        if missing := [site for site in self.sites if site not in there]:
            raise InputError(f"not connected to FLARE: {', '.join(missing)}; start them, or leave them out of sites.")

    def _begin(self) -> None:
        """Claim the folder, find the state from which the run starts, and write ``run.json``."""
        first = first_state(self.bundle, self.federation)  # before the claim: if it fails, an earlier run is kept
        path, resume = self.output_dir / CHECKPOINT, self.federation.resume
        sites = {"sites": self.sites}
        folder = claim("flare", self.output_dir, self.dataset_dir, sites, overwrite=self.overwrite, resume=resume)
        folder.replaced = {path} if resume else set()  # the user may have copied it from the machine of the server
        if resume and self.dataset_dir is not None:
            collect(self.output_dir / "flare", self.output_dir, self.federation)  # the run may have been interrupted
        self.state = read_state(path, self.federation) if resume and path.is_file() else first
        (self.output_dir / "models" / CALIBRATION).unlink(missing_ok=True)  # it was fitted to earlier models
        write_architecture(self.output_dir / "models", architecture_of(self.bundle, self.federation))
        settings = {**self.settings, "min_sites": self.min_sites, "engine": f"nvflare {version('nvflare')}"}
        here, root = ([], "") if self.dataset_dir is None else (self.sites, str(self.bundle))
        write_run(str(self.output_dir), settings, str(self.dataset_dir), here, root)

    @contextmanager
    def _recipe(self, all_there: bool = False) -> Iterator[FederationRecipe]:
        run, here = self.federation, self.dataset_dir is not None
        places = {name: str(getattr(self, name)) for name in ("bundle", "dataset_dir", "output_dir")}
        same = ("rounds", "val_interval", "max_update_norm", "server_momentum", "own_rounds", "averaging")
        settings = {"shares": list(run.shares), **{name: getattr(run, name) for name in same}}
        settings |= {"min_sites": self.min_sites, "round_timeout": self.round_timeout, "publish": self.publish}
        rounds = Rounds(sites=self.sites, **settings)
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder)
            how = (self.round_timeout, self.device, places if here else None, self.tracking, self.publish)
            write_files(files, self.bundle, run, self.state, *how)
            needed = len(self.sites) if all_there else self.min_sites
            # at other machines, the Python in which the FLARE of the site runs
            python = (sys.executable if here else "python3") if self.own_process else ""
            recipe = FederationRecipe(f"{self.bundle.name}_federation", rounds, needed, python, files)
            if self.tracking:
                add_experiment_tracking(recipe, self.tracking)
            yield recipe

    def _execute(self, env: Any) -> Any:
        with self._recipe(all_there=isinstance(env, PocEnv)) as recipe:
            try:
                return recipe.run(env)
            except RuntimeError as error:
                raise InputError(f"FLARE stopped: {str(error).splitlines()[0]}") from error

    def _finish(self, result: Path) -> Path:
        """Copy the results of the server to the output folder; if all rounds are done, score and report."""
        state = collect(result, self.output_dir, self.federation, self.state["run"]) or self.state
        if not (state["round"] == self.federation.rounds and state["selected"]):
            rows = read_rows(self.output_dir / FAILURES)
            why = f"round {rows[-1]['round']}: {rows[-1]['reason']} " if rows else ""
            done = f"{state['round']} of {self.federation.rounds} rounds"
            raise InputError(f"stopped after {done}: {why}See the logs in {result}.")
        if self.dataset_dir is not None:
            score(self.scoring, self.output_dir, self.dataset_dir, self.sites, self.device)
        draw(self.output_dir)
        finish(self.output_dir, write_report)
        return Path(model_path(str(self.output_dir / "models")))
