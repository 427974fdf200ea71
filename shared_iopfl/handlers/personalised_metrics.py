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
"""Metrics of both models of a site in one federated evaluation: the received one and the personalised one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from ignite.metrics import Metric
from monai.engines import SupervisedEvaluator
from monai.transforms.transform import Transform
from torch.nn.parallel import DistributedDataParallel

from shared_iopfl.evaluation.failed_scans import TolerantEvaluator
from shared_iopfl.models.files import load_weights
from shared_iopfl.models.weights import check_experts


class PersonalisedMetrics:
    """Adds the metrics of the site's own model to an evaluator's, as ``personalised_<metric>``.

    When the evaluator is done, its cases go through the same inferer, postprocessing and metrics once more, with a copy
    of its network that has the weights of the file. The other handlers, which write masks and tables, see the first
    pass only. Before there is such a file, nothing is added.

    Args:
        load_path: the site's personalised model, a plain state_dict.
        key_metric: as the evaluator's, name -> metric, but not the same objects: a metric belongs to one engine.
        postprocessing: of the evaluator; it must write no files.
    """

    def __init__(
        self, load_path: str, key_metric: Mapping[str, Metric], postprocessing: Transform | None = None
    ) -> None:
        self.load_path = load_path
        self.key_metric = dict(key_metric)
        self.postprocessing = postprocessing

    def attach(self, engine: SupervisedEvaluator) -> None:
        """Register the handlers with an ignite engine."""
        # a new dictionary each time: `MonaiAlgo` hands out the engine's own, which the next round would change
        engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "metrics", {}))
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: SupervisedEvaluator) -> None:
        if not Path(self.load_path).is_file():
            return
        weights = load_weights(self.load_path)
        network = engine.network.module if isinstance(engine.network, DistributedDataParallel) else engine.network
        check_experts(network, {self.load_path: weights})
        network = copy.deepcopy(network)  # the evaluator's own may be the one in training
        network.load_state_dict(weights)
        options: dict[str, Any] = (
            {"output_dir": engine.output_dir, "strict": False} if isinstance(engine, TolerantEvaluator) else {}
        )
        kind: Any = TolerantEvaluator if options else SupervisedEvaluator
        second = kind(
            **options,
            device=engine.state.device,
            val_data_loader=engine.data_loader,
            network=network,
            non_blocking=engine.non_blocking,
            prepare_batch=engine.prepare_batch,
            inferer=engine.inferer,
            postprocessing=self.postprocessing,
            key_val_metric=self.key_metric,
            amp=engine.amp,
            to_kwargs=engine.to_kwargs,
            amp_kwargs=engine.amp_kwargs,
        )
        second.logger = engine.logger
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed for each run, which training must not notice
            second.run()
        engine.state.metrics.update({f"personalised_{name}": value for name, value in second.state.metrics.items()})
