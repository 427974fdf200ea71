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
"""The files that the NVIDIA FLARE server writes in each round: global model, tables and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs
from torch import Tensor

from shared_iopfl.federation.averaging import ServerMomentum
from shared_iopfl.federation.results import write_matrix
from shared_iopfl.federation.updates import FAILED, FAILURES, HISTORY, last_rounds
from shared_iopfl.handlers.norm_statistics import STATISTICS
from shared_iopfl.models.files import model_path, save_atomically
from shared_iopfl.models.manifest import SCORES
from shared_iopfl.utils.tables import write_json, write_rows

RESULTS = "iopfl"  # folder in the run of the server, with the layout of the output_dir of a one-process run
CHECKPOINT = "flare.pt"


class ServerFiles(ModelPersistor):
    """Writes after every round the global model as a plain state_dict, the history, and a checkpoint.

    A run is resumed from the checkpoint; the first checkpoint is sent with the job.

    Attributes:
        state: Content of the newest checkpoint.
        history: Rows of ``history.csv``.
        failures: Rows of ``failures.csv``.
        server: Server momentum, whose state is part of the checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Any] = {}
        self.server = ServerMomentum()
        self.history: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []

    @property
    def round(self) -> int:
        """The number of the last finished round."""
        return self.state["round"]

    def counted(self) -> dict[str, int]:
        """Return the last round, up to this one, in which each site's update was averaged, site -> round."""
        return last_rounds(self.history)

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """Load the global model from which the next round starts (FLARE's persistor interface)."""
        fobs.register(TensorDecomposer)  # weights are sent as tensors, in any precision
        folder = fl_ctx.get_engine().get_workspace().get_app_custom_dir(fl_ctx.get_job_id())
        self.state = torch.load(Path(folder) / CHECKPOINT, map_location="cpu", weights_only=True)
        self.history, self.failures = list(self.state["history"]), list(self.state["failures"])
        self._save_state(fl_ctx)  # also for a run that ends in its first round
        return make_model_learnable(weights=self.state["weights"], meta_props={})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """Write the checkpoint of a finished round (FLARE's persistor interface)."""
        weights = model[ModelLearnableKey.WEIGHTS]
        self.state |= {"round": self.round + 1, "weights": weights, "server": self.server.state_dict()}
        self.save_tables(fl_ctx)
        save_atomically(weights, model_path(str(self._folder(fl_ctx) / "models")))
        self._save_state(fl_ctx)

    def save_selected(
        self,
        shares: Mapping[str, float],
        scores: Mapping[str, float | None],
        statistics: Sequence[Mapping[str, Any]],
        fl_ctx: FLContext,
    ) -> None:
        """Record that the sites have selected their personalised models, and what they reported.

        Args:
            shares: site -> weight of the moving average in its personalised model.
            scores: Content of ``scores.json``.
            statistics: Rows of ``statistics.csv``.
            fl_ctx: Context of FLARE.
        """
        self.state["selected"] = True
        models = self._folder(fl_ctx) / "models"
        if shares:
            write_json(models / "shares.json", dict(shares))
        write_json(models / SCORES, dict(scores))
        write_rows(models.parent / STATISTICS, ("site", "global", "own"), statistics)
        self._save_state(fl_ctx)

    def save_published(
        self, models: Mapping[str, Mapping[str, Tensor]], dice: Mapping[str, Mapping[str, float]], fl_ctx: FLContext
    ) -> None:
        """Write the personalised models that sites publish, and how well each model does at the other sites.

        Args:
            models: site -> its personalised model.
            dice: model -> site -> validation Dice.
            fl_ctx: Context of FLARE.
        """
        folder = self._folder(fl_ctx)
        for site, weights in models.items():
            save_atomically(dict(weights), model_path(str(folder / "models"), "personalised", site))
        write_matrix(folder, dice)

    def save_tables(self, fl_ctx: FLContext) -> None:
        """Write ``history.csv`` and, if a site has failed, ``failures.csv``."""
        write_rows(self._folder(fl_ctx) / "history.csv", HISTORY, self.history)
        if self.failures:
            write_rows(self._folder(fl_ctx) / FAILURES, FAILED, self.failures)

    def _save_state(self, fl_ctx: FLContext) -> None:
        self.state |= {"history": self.history, "failures": self.failures}
        save_atomically(self.state, self._folder(fl_ctx) / CHECKPOINT)

    @staticmethod
    def _folder(fl_ctx: FLContext) -> Path:
        return Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())) / RESULTS
