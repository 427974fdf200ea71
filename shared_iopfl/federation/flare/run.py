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
"""A federation by NVIDIA FLARE: simulated, as a proof of concept on one machine, or in production.

See ``docs/flare.md``.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
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
from shared_iopfl.report.run import write_report
from shared_iopfl.utils.checks import check_values
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import read_rows

TRACKING = ("", "tensorboard", "mlflow")  # of FLARE's receivers, those that send nothing elsewhere
LOGIN = 30.0  # seconds to wait for the server


class FlareRun:
    """A federation by FLARE, described by the bundle's ``federate.json`` as the one-process run is.

    Args:
        bundle: the bundle's folder.
        sites: names of the inside sites, which are the names of FLARE's clients too.
        rounds: number of rounds.
        output_dir: where the files go, those of a one-process run: ``models/model.pt``, ``history.csv``,
            ``failures.csv``, ``run.json``, TensorBoard events, ``report.html``, and ``flare.pt`` to resume from. On one
            machine also the final scoring's, ``sites/<site>``, what each site keeps to itself, and ``flare``, FLARE's
            workspace.
        dataset_dir: folder of the sites; None in production, where each site names its own.
        round_timeout: seconds after which a round goes on without those who have not answered; 0: wait for all.
        own_process: a site does each task in a process of its own. That takes longer, but one that dies costs its site
            the round, where else FLARE ends the whole job; and one that hangs ends with the round's time.
        tracking: "tensorboard" or "mlflow": the server keeps the figures as the sites tell them, by FLARE's receiver.
        publish: at the end the sites that say so themselves hand over their personalised models, and every site scores
            those of the others: ``cross_site.csv`` and all of ``models``, as in one process.
        settings: any other key of ``federate.json`` or ``train.json``; ``resume`` goes on from ``flare.pt``, and
            ``overwrite`` starts afresh in a folder that such a run has used.

    Raises:
        InputError: where one of them is not as it must be, before anything starts.
    """

    def __init__(
        self,
        bundle: str,
        sites: Sequence[str],
        rounds: int,
        output_dir: str,
        dataset_dir: str | None = None,
        round_timeout: int = 0,
        own_process: bool = False,
        settings: Mapping[str, Any] | None = None,
        tracking: str = "",
        publish: bool = False,
    ) -> None:
        self.bundle = Path(bundle).resolve()
        self.output_dir = Path(output_dir).resolve()
        self.dataset_dir = None if dataset_dir is None else Path(dataset_dir).resolve()
        given = {**(settings or {}), "sites": checked_names(sites), "rounds": rounds}
        self.device = given.pop("device", None)
        self.overwrite = given.pop("overwrite", False)
        check_values({"overwrite": self.overwrite})
        self.federation, self.scoring, self.settings = describe(self.bundle, given)
        self.sites = self.federation.sites
        self.min_sites = self.federation.failures.min_sites
        self.round_timeout = round_timeout
        self.own_process = own_process
        if not isinstance(round_timeout, int) or round_timeout < 0:
            raise InputError(f"round_timeout must be whole seconds, 0 for none, but is {round_timeout!r}.")
        self.tracking = tracking
        if tracking not in TRACKING:
            raise InputError(f"tracking must be {' or '.join(TRACKING[1:])}, or empty for none, but is {tracking!r}.")
        self.publish = publish
        check_values({"publish": publish})
        self.state: dict[str, Any] = {}

    def simulate(self) -> Path:
        """Run in FLARE's simulator: a process a site, on this machine.

        Returns:
            The global model's file.
        """
        workspace = self._start_here()
        if re.search(r"[\s'\"\\]", str(workspace)):
            raise InputError(f"FLARE's simulator takes no path with spaces or quotes: {workspace}; choose another.")
        self._execute(SimEnv(clients=self.sites, workspace_root=str(workspace), log_config="concise"))
        return self._finish(workspace)

    def prove(self) -> Path:
        """Run as a proof of concept: a provisioned server and clients that speak TLS to each other over loopback.

        Returns:
            The global model's file.
        """
        workspace = self._start_here()
        os.environ["NVFLARE_POC_WORKSPACE"] = str(workspace)
        env = PocEnv(num_clients=len(self.sites), clients=self.sites, extra={"login_timeout": LOGIN})
        try:
            return self._finish(Path(self._execute(env).get_result(clean_up=False) or workspace))
        finally:
            env.stop()

    def export(self) -> Path:
        """Write the job that a FLARE admin submits.

        Returns:
            The job's folder.
        """
        self._begin()
        with self._recipe() as recipe:
            recipe.export(str(self.output_dir / "job"))
            finish(self.output_dir)
            return self.output_dir / "job" / recipe.name

    def submit(self, startup_kit: str, username: str | None = None) -> Path:
        """Submit the job to a running FLARE system, wait for its end and collect the results.

        Args:
            startup_kit: the admin's folder, as provisioned.
            username: the admin's name; default: the folder's.

        Returns:
            The global model's file.
        """
        kit = Path(startup_kit).resolve()
        if not (kit / "startup").is_dir():
            raise InputError(f"no startup kit at {kit}: give the admin's folder, in which 'startup' lies.")
        username = username or kit.name
        self._check_connected(kit, username)
        self._begin()
        env = ProdEnv(startup_kit_location=str(kit), username=username, login_timeout=LOGIN)
        result = self._execute(env).get_result()
        if result is None:
            raise InputError("FLARE gave no result; the job's log at the server tells why.")
        return self._finish(Path(result))

    def _start_here(self) -> Path:
        """Check every site's data, and begin; FLARE's workspace."""
        if self.dataset_dir is None:
            raise InputError("no dataset_dir: on one machine, give the folder that holds the sites.")
        of = self.federation.overrides
        for site in self.sites:
            for part in ("train", "validation") if self.federation.val_interval else ("train",):
                how = {name: of[name] for name in ("fractions", "patient", "fold", "folds") if name in of}
                site_cases(self.dataset_dir, site, part, of["split_seed"], **how)
        workspace = self.output_dir / "flare"
        self._begin()
        for variable in ENVIRONMENT.values():
            os.environ.pop(variable, None)  # they speak of one site; here the job names the paths of all
        os.environ[PUBLISH] = str(self.publish)  # who starts the job is every site
        return workspace

    def _check_connected(self, kit: Path, username: str) -> None:
        """A site that is not connected when a job starts takes no part in any of its rounds."""
        try:
            with closing(new_secure_session(username, str(kit), timeout=LOGIN)) as session:
                there = {client.name for client in session.get_system_info().client_info}
        except Exception as error:
            raise InputError(f"no FLARE server answers to {kit} ({type(error).__name__}): is it running?") from error
        if missing := [site for site in self.sites if site not in there]:
            raise InputError(f"not connected to FLARE: {', '.join(missing)}; start them, or leave them out of sites.")

    def _begin(self) -> None:
        """Take the folder, find the state to begin with, and write what is run."""
        first = first_state(self.bundle, self.federation)  # where it cannot be built, an earlier run stays
        path, resume = self.output_dir / CHECKPOINT, self.federation.resume
        sites = {"sites": self.sites}
        folder = claim("flare", self.output_dir, self.dataset_dir, sites, overwrite=self.overwrite, resume=resume)
        folder.replaced = {path} if resume else set()  # it may have been copied there from the server's machine
        if resume and self.dataset_dir is not None:
            collect(self.output_dir / "flare", self.output_dir, self.federation)  # what a run that was cut off has left
        self.state = read_state(path, self.federation) if resume and path.is_file() else first
        write_architecture(self.output_dir / "models", architecture_of(self.bundle, self.federation))
        settings = {**self.settings, "min_sites": self.min_sites, "engine": f"nvflare {version('nvflare')}"}
        here = [] if self.dataset_dir is None else self.sites
        root = str(self.bundle) if here else ""
        write_run(str(self.output_dir), settings, str(self.dataset_dir), here, root)

    @contextmanager
    def _recipe(self, all_there: bool = False) -> Iterator[FederationRecipe]:
        machine = {
            "bundle": str(self.bundle),
            "dataset_dir": str(self.dataset_dir),
            "output_dir": str(self.output_dir),
        }
        rounds = Rounds(
            sites=self.sites,
            rounds=self.federation.rounds,
            min_sites=self.min_sites,
            val_interval=self.federation.val_interval,
            max_update_norm=self.federation.max_update_norm,
            server_momentum=self.federation.server.momentum,
            own_rounds=self.federation.own_rounds,
            shares=list(self.federation.shares),
            round_timeout=self.round_timeout,
            publish=self.publish,
            averaging=self.federation.averaging,
        )
        with tempfile.TemporaryDirectory() as folder:
            files = Path(folder)
            here = None if self.dataset_dir is None else machine
            how = (self.round_timeout, self.device, here, self.tracking, self.publish)
            write_files(files, self.bundle, self.federation, self.state, *how)
            needed = len(self.sites) if all_there else self.min_sites
            python = sys.executable if here else "python3"  # elsewhere, the one that the site's FLARE runs in
            name = f"{self.bundle.name}_federation"
            recipe = FederationRecipe(name, rounds, needed, python if self.own_process else "", files)
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
        """Bring what the server left to the output folder; once all rounds are done, score and report."""
        state = collect(result, self.output_dir, self.federation, self.state["run"]) or self.state
        if not (state["round"] == self.federation.rounds and state["selected"]):
            rows = read_rows(self.output_dir / FAILURES)
            why = f"round {rows[-1]['round']}: {rows[-1]['reason']} " if rows else ""
            done = f"{state['round']} of {self.federation.rounds} rounds"
            raise InputError(f"stopped after {done}: {why}The logs in {result} tell more.")
        if self.dataset_dir is not None:
            score(self.scoring, self.output_dir, self.dataset_dir, self.sites, self.device)
        draw(self.output_dir)
        finish(self.output_dir, write_report)
        return Path(model_path(str(self.output_dir / "models")))
