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
"""One evaluation scores the received and the personalised model, and has no other effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.handlers import MeanDice, from_engine
from monai.transforms import AsDiscreted
from networks import images, unet
from torch import nn

from shared_iopfl.handlers.personalised_metrics import PersonalisedMetrics
from shared_iopfl.utils.errors import InputError

POSTPROCESSING = AsDiscreted(keys=["pred", "label"], argmax=[True, False], to_onehot=2)


def metric() -> dict[str, Any]:
    return {"dice": MeanDice(output_transform=from_engine(["pred", "label"]))}


def evaluator(network: nn.Module, *handlers: Any) -> SupervisedEvaluator:
    cases = [
        {"image": images(3, 16, 16, seed=n), "label": (images(1, 16, 16, seed=9 - n) > 0).float()} for n in range(3)
    ]
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(cases), batch_size=1),
        network=network,
        postprocessing=POSTPROCESSING,
        key_val_metric=metric(),
        val_handlers=list(handlers),
    )


class Passes:
    """Counts the cases that the handlers of an evaluator see, for example one that writes masks."""

    def __init__(self) -> None:
        self.cases = 0

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.count)

    def count(self, engine: Any) -> None:
        self.cases += 1


def dice_of(network: nn.Module) -> float:
    engine = evaluator(network)
    engine.run()
    return engine.state.metrics["dice"]


def test_the_personalised_model_is_scored_like_a_received_one(tmp_path: Path) -> None:
    """On the same cases; network, random state and other handlers are as in an evaluation without it."""
    network, path, passes = unet(0), tmp_path / "model_A.pt", Passes()
    torch.save(unet(1).state_dict(), path)
    engine = evaluator(network, PersonalisedMetrics(str(path), metric(), POSTPROCESSING), passes)
    kept = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    states = []
    for each in (evaluator(network), engine):
        with torch.random.fork_rng():
            each.run()
            states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in network.state_dict().items())
    assert engine.state.metrics == {"dice": dice_of(unet(0)), "personalised_dice": dice_of(unet(1))}
    assert engine.state.metrics["dice"] != engine.state.metrics["personalised_dice"]
    assert passes.cases == 3
    assert engine.network is network


def test_evaluations_are_independent(tmp_path: Path) -> None:
    """Nothing is added without a file, a new file is scored, and metrics that were returned earlier do not change."""
    path = tmp_path / "model_A.pt"
    engine = evaluator(unet(0), PersonalisedMetrics(str(path), metric(), POSTPROCESSING))
    told = []
    for seed in (None, 1, 2, None):
        path.unlink(missing_ok=True)
        if seed is not None:
            torch.save(unet(seed).state_dict(), path)
        engine.run()
        told.append(engine.state.metrics)
    plain = {"dice": dice_of(unet(0))}
    assert told == [
        plain,
        {**plain, "personalised_dice": dice_of(unet(1))},
        {**plain, "personalised_dice": dice_of(unet(2))},
        plain,
    ]


def test_model_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model_A.pt"
    torch.save(unet(0, outputs=3).state_dict(), path)
    with pytest.raises(InputError, match=r"model_A\.pt"):
        evaluator(unet(0), PersonalisedMetrics(str(path), metric(), POSTPROCESSING)).run()
