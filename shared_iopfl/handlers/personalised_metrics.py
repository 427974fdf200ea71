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
"""Metrics of both models of a site, the received and the personalised one, in one federated evaluation."""

from __future__ import annotations

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
from shared_iopfl.models.weights import check_experts, copy_network


class PersonalisedMetrics:
    """Adds the metrics of a site's personalised model to those of an evaluator, as ``personalised_<metric>``.

    After the evaluation, a second evaluator runs a copy of the network with the personalised weights on the same cases,
    with the same inferer and new metrics. The other handlers, which write masks and tables, see the first run only. As
    long as there is no personalised model, nothing is added.

    Args:
        load_path: Path of the site's personalised model, a plain state_dict.
        key_metric: Metrics as in the evaluator, name -> metric, but other objects, as a metric belongs to one engine.
        postprocessing: Postprocessing as in the evaluator; it must not write files.
    """

    def __init__(
        self, load_path: str, key_metric: Mapping[str, Metric], postprocessing: Transform | None = None
    ) -> None:
        self.load_path = load_path
        self.key_metric = dict(key_metric)
        self.postprocessing = postprocessing

    def attach(self, engine: SupervisedEvaluator) -> None:
        """Register the handler with an evaluator."""
        # a new dictionary in each run, because `MonaiAlgo` returns that of the engine, which would change later
        engine.add_event_handler(Events.STARTED, lambda engine: setattr(engine.state, "metrics", {}))
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: SupervisedEvaluator) -> None:
        if not Path(self.load_path).is_file():
            return
        weights = load_weights(self.load_path)
        network = engine.network.module if isinstance(engine.network, DistributedDataParallel) else engine.network
        check_experts(network, {self.load_path: weights})
        network = copy_network(network)  # a copy, because the evaluator may share its network with the trainer
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
        with torch.random.fork_rng(devices=[]):  # a loader draws a seed for each run, which must not affect training
            second.run()
        engine.state.metrics.update({f"personalised_{name}": value for name, value in second.state.metrics.items()})
