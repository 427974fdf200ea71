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
"""The client of an NVIDIA FLARE job: the same site client as in one process, with FLARE's Client API.

Local weights, the number of training cases and metrics leave the site. Data, paths and error messages stay in
``<output_dir>/sites/<site>``. The personalised model stays there as well, unless the site publishes it (`PUBLISH`) and
the job asks for it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nvflare.client as flare
import torch
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.client.tracking import SummaryWriter
from torch import Tensor

from shared_iopfl.federation.client import SiteClient, time_limit
from shared_iopfl.federation.flare.messages import COUNTED, ENVIRONMENT, JOB_FILE, LAST, PUBLISH, SCORE, SELECT
from shared_iopfl.models.files import load_weights, model_path, save_atomically
from shared_iopfl.utils.errors import InputError, root_input_error
from shared_iopfl.utils.files import check_writable
from shared_iopfl.utils.names import check_site
from shared_iopfl.utils.reading import read_json

LOG_FILE = "training.log"
# loggers whose messages may name files of the site
PRIVATE_LOGGERS = ("ignite", "monai", "shared_iopfl", "py.warnings")
own = logging.getLogger(__name__)
shared = logging.getLogger("iopfl")  # its messages also appear in FLARE's log


def bundle_fingerprint(bundle_root: str | os.PathLike) -> str:
    """Return the SHA-256 of the bundle's training config, by which sites that train differently are recognised.

    Raises:
        InputError: If the config cannot be read.
    """
    path = Path(bundle_root) / "configs" / "train.json"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"no bundle at {bundle_root}: cannot read {path} ({error.strerror}).") from error


class Member:
    """A site that takes part in one job.

    Args:
        job: Settings of the job, which `shared_iopfl.federation.flare.job.write_files` writes to ``federation.json``.
        site: Name of the site.
        environment: Environment variables of the process; those in `ENVIRONMENT` take precedence over the job.

    Raises:
        InputError: If the site has no output folder, or it is not writable.
    """

    def __init__(self, job: Mapping[str, Any], site: str, environment: Mapping[str, str] = os.environ) -> None:
        self.job = job
        self.site = check_site(site)
        self.paths: dict[str, Any] = {
            name: environment.get(variable) or job.get(name) for name, variable in ENVIRONMENT.items()
        }
        self.folder = Path(self._path("output_dir")) / "sites" / site
        check_writable(self.folder)
        self.own_file = Path(model_path(str(self.folder), "personalised", site))
        self.publishes = bool(job.get("publish")) and environment.get(PUBLISH) == "True"
        # receives name, value and round of each metric as soon as it is known, in addition to the answer
        self.stream: Callable[[str, float, int], object] | None = None
        self._client: SiteClient | None = None
        self._scorer: SiteClient | None = None  # scores models after the last round
        self._round = 0  # the client has its state after this round

    def _path(self, name: str) -> str:
        if not self.paths[name]:
            raise InputError(f"site '{self.site}' has no {name}: set the variable {ENVIRONMENT[name]} there.")
        return self.paths[name]

    def client(self, done: int) -> SiteClient:
        """Return the client in its state after round `done`: the last one in which its update was averaged.

        The first task makes the client, so that an error at a site fails that task and does not end the process. It
        starts from the state that the site kept of this run, because the process may be new, the server may have
        returned to an earlier round, or the last update of the site may have been late or refused.
        """
        if self._round != done:
            self._client = None
        if self._client is None:
            client, known = self._restored(done)
            self._put_back(client.personalised if known else None)
            self._client, self._round = client, done
        return self._client

    def _restored(self, done: int) -> tuple[SiteClient, bool]:
        """Make a client with the newest state up to a round; also return whether the site has kept such a state."""
        client = self._make()
        earlier = [number for number in self._states() if number <= done]
        if earlier:
            state = torch.load(self._state(max(earlier)), map_location="cpu", weights_only=True)
            client.load_state_dict(state)
            shared.info("continues from its state after round %d", max(earlier))
        return client, bool(earlier)

    def _put_back(self, personalised: Mapping[str, Tensor] | None) -> None:
        """Write the site's personalised model again: the file may be of an update that was not averaged."""
        if personalised is not None:
            save_atomically(dict(personalised), self.own_file)
        else:
            self.own_file.unlink(missing_ok=True)

    def _make(self) -> SiteClient:
        bundle, dataset_dir = self._path("bundle"), self._path("dataset_dir")
        if bundle_fingerprint(bundle) != self.job["fingerprint"]:
            raise InputError(
                f"the bundle {bundle} of site '{self.site}' trains in another way than that of the federation: "
                "configs/train.json differs; install the same version."
            )
        overrides = {
            **self.job["overrides"],
            "site": self.site,
            "dataset_dir": dataset_dir,
            "output_dir": str(self.folder),
            "ckpt_dir": str(self.folder),
            "epochs": self.job["rounds"] * self.job["local_epochs"],
        }
        if self.paths["device"]:
            overrides["device"] = self.paths["device"]
        with torch.random.fork_rng():
            torch.manual_seed(self.job["seed"])
            return SiteClient(bundle, self.site, self.job["local_epochs"], overrides)

    def _state(self, number: int) -> Path:
        return self.folder / f"state_{self.job['run']}_{number}.pt"

    def _states(self) -> list[int]:
        """The rounds of this run of which the site has kept the state."""
        return [int(path.stem.rpartition("_")[2]) for path in self.folder.glob(f"state_{self.job['run']}_*.pt")]

    def _keep(self, client: SiteClient, number: int) -> None:
        """Keep the states before and after a round, because the server may return to the round before, not further."""
        save_atomically(client.state_dict(), self._state(number))
        for path in set(self.folder.glob("state_*.pt")) - {self._state(number), self._state(self._round)}:
            path.unlink()
        self._round = number

    def answer(self, task: str, received: FLModel) -> FLModel:
        """Carry out a task; if it fails, return the class of the error, while the message stays in ``training.log``.

        Args:
            task: "train" or "validate".
            received: Global weights, round, and the keys of `shared_iopfl.federation.flare.messages`.
        """
        # SIGALRM works in the main thread only, which carries out the task if each task has its own process
        main = threading.current_thread() is threading.main_thread()
        last = received.meta.get(LAST, "")
        selects = last == SELECT
        seconds = self.job["round_timeout"] * (max(1, self.job["own_rounds"]) if selects else 1)
        try:
            with time_limit(self.site, seconds if main else 0):
                if last == SCORE:
                    return self.score(received)
                # the newest global model, next to the site's personalised one
                save_atomically(dict(received.params), model_path(str(self.folder)))
                if selects:
                    return self.select(received)
                return self.validate(received) if task == "validate" else self.train(received)
        except Exception as error:
            kind = type(root_input_error(error) or error).__name__
            # not exc_info: FLARE redirects `print`, with which `logging` formats a traceback
            own.error("'%s' failed: %s", task, "".join(traceback.format_exception(error)))
            shared.warning("'%s' failed with %s; see %s", task, kind, self.folder / LOG_FILE)
            # part of a round may be done; the next task starts from the last state that was kept
            self._client = self._scorer = None
            # if the selection failed, the site publishes the moving average
            publishes = selects and self.publishes and self.own_file.is_file()
            average = load_weights(self.own_file) if publishes else None
            return FLModel(params=average, metrics={}, meta={"error": kind})

    def train(self, received: FLModel) -> FLModel:
        """Train for one round; return local weights, metrics and number of cases, but not the personalised model."""
        client = self.client(self._counted(received))
        began = time.perf_counter()
        update = client.train(received.params)
        seconds = time.perf_counter() - began
        self._keep(client, received.current_round + 1)  # FLARE counts from 0
        metrics = {**client.metrics(), "seconds": seconds}
        self._tell({f"local/{name}": value for name, value in metrics.items()}, received)
        return FLModel(
            params={key: tensor.contiguous() for key, tensor in update.items()},  # FLARE sends only such tensors
            metrics=metrics,
            meta={FLMetaKey.NUM_STEPS_CURRENT_ROUND: client.cases},
        )

    def validate(self, received: FLModel) -> FLModel:
        """Return the metrics of the global and the personalised model on the site's validation cases."""
        client = self.client(self._counted(received))
        models = {"global": received.params, "personalised": client.personalised}
        metrics = {
            f"{name}/{metric}": value
            for name, weights in models.items()
            for metric, value in client.validate(weights).items()
        }
        self._tell(metrics, received)
        return FLModel(metrics=metrics)

    def _tell(self, metrics: Mapping[str, float], received: FLModel) -> None:
        if self.stream is not None:
            for name, value in metrics.items():
                self.stream(name, float(value), received.current_round + 1)

    def select(self, received: FLModel) -> FLModel:
        """Select the personalised model after the last round, and send it if the site publishes it.

        The answer has the selected share, the shift of the site's validation cases, and their Dice with the running
        statistics of the global model and with those of the site. If the task is repeated, for example after a restart
        of the server, it starts again from the state after the last round.
        """
        client = self.client(self._counted(received))
        before = {key: tensor.clone() for key, tensor in client.personalised.items()}
        try:
            share = client.select_personalised(received.params, self.job["own_rounds"], self.job["shares"])
        except Exception:
            self._put_back(before)
            raise
        self._put_back(client.personalised)
        self._client, self._scorer = None, client
        told = {"share": float(share)}
        if (shift := client.shift(received.params)) is not None:
            told["shift"] = float(shift)
        metrics = {**told, **client.dice_by_statistics(received.params)}
        own = {key: tensor.contiguous() for key, tensor in client.personalised.items()}
        return FLModel(params=own if self.publishes else None, metrics=metrics)

    def score(self, received: FLModel) -> FLModel:
        """Return the validation Dice of the global model, or of one that another site publishes; keep nothing of it."""
        if self._scorer is None:
            self._scorer, _ = self._restored(self._counted(received))
        return FLModel(metrics={"dice": self._scorer.validate(received.params)["val_mean_dice"]})

    def _counted(self, received: FLModel) -> int:
        return int(received.meta[COUNTED].get(self.site, 0))

    @contextmanager
    def own_log(self) -> Iterator[None]:
        """Write the log of the training to a file of the site: FLARE sends a site's error log to the server."""
        handler = logging.FileHandler(self.folder / LOG_FILE, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        loggers = [logging.getLogger(name) for name in PRIVATE_LOGGERS]
        for logger in loggers:
            logger.addHandler(handler)
            logger.propagate = False
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
                logger.propagate = True
            handler.close()


def run(script: str) -> None:
    """Take part in a job until it ends.

    Args:
        script: Path of the client script of the job; ``federation.json`` is in the same folder.
    """
    flare.init()
    member = Member(read_json(Path(script).with_name(JOB_FILE)), flare.get_site_name())
    if member.job.get("tracking"):
        member.stream = SummaryWriter().add_scalar
    with member.own_log():
        while flare.is_running():
            received = flare.receive()
            if received is None:
                break
            flare.send(member.answer("validate" if flare.is_evaluate() else "train", received))
