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
"""The personalised model of a newcomer: in its cross-validation never worse than the global model, without leaks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from networks import experts, images, unet
from site_folders import saml
from torch import Tensor

from shared_iopfl.commands.main import main
from shared_iopfl.data.phantoms.sites import make_prostate_sites
from shared_iopfl.federation import newcomer
from shared_iopfl.federation.newcomer import GLOBAL_MODEL, Newcomer, deal
from shared_iopfl.models.files import load_experts, load_scores, load_weights
from shared_iopfl.models.manifest import read_manifest, write_manifest
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import read_rows, write_json
from tests.bundles.conftest import process_as_it_was, random_models

State = dict[str, Tensor]
CASES = [f"Case{number:02d}" for number in range(5)]


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


class FakeClient:
    """A site whose training adds 0.1 to all weights, and whose Dice is a function that the test sets."""

    made: ClassVar[list[FakeClient]] = []
    score: Callable[[Mapping[str, Tensor], list[str]], float]

    def __init__(self, bundle_root: str, site: str, local_epochs: int, overrides: Mapping[str, Any]) -> None:
        self.training = [case["case"] for case in overrides["train#dataset#data"]]
        self.held = [case["case"] for case in overrides["validate#dataset#data"]]
        self.kept = {"personalization": type("Handler", (), {"save_path": "somewhere"})()}
        self.made.append(self)

    def measurable(self, weights: Mapping[str, Tensor]) -> tuple[torch.nn.Module, list[Tensor]]:
        return unet(), [CASES.index(case) + images(4, 3, 8, 8) for case in self.held]

    def train(self, weights: Mapping[str, Tensor]) -> State:
        return {key: tensor + 0.1 if tensor.is_floating_point() else tensor for key, tensor in weights.items()}

    def validate(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        return {"val_mean_dice": type(self).score(weights, self.held)}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A published global model and personalised models of two sites, and five labelled cases of a newcomer."""
    folder = tmp_path / "published"
    folder.mkdir()
    torch.save(dict(unet().state_dict()), folder / "model.pt")
    for name, weights in experts().items():
        torch.save(weights, folder / f"model_{name}.pt")
    write_json(folder / "scores.json", {"A": 0.8, "B": 0.7, "global": 0.75, "usual_shift": 0.1})
    write_manifest(folder, {"features": 4, "image_size": 32}, "for tests")
    saml(tmp_path / "data", "N", 5)
    return folder


@pytest.fixture
def run(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Newcomer]:
    def run(score: Callable[[Mapping[str, Tensor], list[str]], float], **options: Any) -> Newcomer:
        FakeClient.made, FakeClient.score = [], staticmethod(score)  # type: ignore[method-assign]
        monkeypatch.setattr(newcomer, "SiteClient", FakeClient)
        found = Newcomer("bundle", str(tmp_path / "data"), "N", str(published), str(tmp_path / "out"), **options)
        found.run()
        return found

    return run


def like(target: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor], list[str]], float]:
    """A Dice of 1 for these weights, and less the farther others are from them."""

    def score(weights: Mapping[str, Tensor], held: list[str]) -> float:
        return 1 / (1 + sum(float((weights[key].double() - target[key].double()).abs().sum()) for key in target))

    return score


def mixture() -> State:
    states = [unet().state_dict(), *experts().values()]
    return {
        key: torch.stack([state[key].double() for state in states]).mean(0).to(tensor.dtype)
        for key, tensor in states[0].items()
    }


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        (dict(unet().state_dict()), GLOBAL_MODEL),
        (mixture(), "equal mixture"),
        (FakeClient.train(None, FakeClient.train(None, mixture())), "trained for 2 rounds, share 1"),  # type: ignore
        (FakeClient.train(None, mixture()), "trained for 1 round, share 1"),  # type: ignore
    ],
)
def test_candidate_with_the_highest_dice_on_held_out_cases_is_written(run, tmp_path, target, chosen):
    found = run(like(target), rounds=3)
    assert found.chosen == chosen
    written = load_weights(tmp_path / "out" / "models" / "model_N.pt")
    assert all(torch.allclose(tensor.double(), target[key].double(), atol=1e-6) for key, tensor in written.items())
    rows = read_rows(tmp_path / "out" / "candidates.csv")
    assert {row["candidate"] for row in rows if row["chosen"] == "True"} == {chosen}
    assert [row["cases"] for row in rows if row["candidate"] == GLOBAL_MODEL] == CASES
    assert f"{chosen}  " in found.print_table() and "<- chosen" in found.print_table()


def test_global_model_is_kept_if_no_candidate_is_better(run, tmp_path, published):
    assert run(lambda weights, held: 0.5).chosen == GLOBAL_MODEL
    assert equal(load_weights(tmp_path / "out" / "models" / "model_N.pt"), load_weights(published / "model.pt"))


def test_candidate_that_is_better_in_one_fold_but_worse_in_the_mean_is_not_chosen(run):
    start = unet().state_dict()

    def score(weights: Mapping[str, Tensor], held: list[str]) -> float:
        return 0.5 if equal(weights, start) else 0.9 if held == ["Case00"] else 0.3

    found = run(score)
    assert found.chosen == GLOBAL_MODEL
    assert all(max(dice) == 0.9 for name, dice in found.dice.items() if name != GLOBAL_MODEL)


def test_fold_without_a_dice_is_ignored(run, tmp_path):
    start = unet().state_dict()

    def score(weights: Mapping[str, Tensor], held: list[str]) -> float:
        return math.nan if held == ["Case03"] else 0.5 if equal(weights, start) else 0.6

    assert run(score).chosen == "equal mixture"
    with pytest.raises(InputError, match="no Dice of N is defined"):
        run(lambda weights, held: math.nan)


def test_no_candidate_is_scored_on_cases_that_it_was_made_with(run, monkeypatch):
    """Held-out cases are used neither in the training nor for the statistics of batch norm."""
    measured: list[set[int]] = []
    batches = newcomer.mixed_batches

    def record(stacks: list[Tensor]) -> Any:
        measured.append({round(float(stack.mean())) for stack in stacks})
        return batches(stacks)

    monkeypatch.setattr(newcomer, "mixed_batches", record)
    run(like(FakeClient.train(None, mixture())))  # type: ignore
    *folds, final = FakeClient.made
    for fold, numbers in zip(folds, measured):
        assert sorted(fold.training + fold.held) == CASES and fold.held
        assert numbers == {CASES.index(case) for case in fold.training}
    assert sorted(case for fold in folds for case in fold.held) == CASES
    assert final.training == CASES and final.held == [] and measured[-1] == set(range(5))
    assert all(client.kept["personalization"].save_path is None for client in FakeClient.made)


def test_new_model_is_written_next_to_copies_of_the_published_models(run, published, tmp_path):
    before = {path.name: path.read_bytes() for path in published.iterdir()}
    run(like(mixture()))
    assert {path.name: path.read_bytes() for path in published.iterdir()} == before
    models = tmp_path / "out" / "models"
    assert equal(load_weights(models / "model.pt"), load_weights(published / "model.pt"))
    assert set(load_experts(str(models))) == {"A", "B", "N"}
    assert (read_manifest(models) or {})["architecture"] == {"features": 4, "image_size": 32}
    assert load_scores(str(models)) == load_scores(str(published))
    assert json.loads((models / "scores.json").read_text())["N"] is None


def test_site_with_a_published_model_is_refused(published, tmp_path):
    saml(tmp_path / "data", "A", 3)
    with pytest.raises(InputError, match="holds a personalised model of 'A' already"):
        Newcomer("bundle", str(tmp_path / "data"), "A", str(published), str(tmp_path / "out"))


def test_each_patient_is_in_one_fold_and_each_case_is_held_out_once():
    cases = [{"case": f"{patient}{eye}", "patient": patient} for patient in "abcdefg" for eye in "lr"]
    groups = deal(cases, 3)
    assert len(groups) == 3 and sorted(case["case"] for group in groups for case in group) == sorted(
        case["case"] for case in cases
    )
    patients = [{case["patient"] for case in group} for group in groups]
    assert sum(map(len, patients)) == len(set().union(*patients)) == 7
    assert len(deal(cases, 99)) == 7
    for few, folds in ((cases[:2], 5), (cases, 1)):
        with pytest.raises(InputError, match="needs two folds and two patients"):
            deal(few, folds)


def test_command_makes_a_personalised_model(tmp_path, capsys):
    """With the training of the bundle on three synthetic cases: a table, and a folder of models that can be used."""
    make_prostate_sites(tmp_path / "data", sites=("N",), cases=3, size=(32, 32, 8))
    models = random_models(tmp_path / "published")
    capsys.readouterr()
    words = ["--ckpt_dir", str(models), "--image_size", "32", "--features", "4", "--device", "cpu"]
    words += ["--passes", "1", "--rounds", "1", "--folds", "2"]
    with process_as_it_was():
        main(["personalise", "prostate", str(tmp_path / "data"), str(tmp_path / "out"), *words])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].startswith("candidate") and lines[1].startswith(GLOBAL_MODEL) and "INFO" not in said.out + said.err
    assert sum("<- chosen" in line for line in lines) == 1
    dice: dict[str, list[float]] = {}
    for row in read_rows(tmp_path / "out" / "candidates.csv"):
        dice.setdefault(row["candidate"], []).extend([float(row["dice"])] * (row["cases"].count(";") + 1))
    assert len(dice) == 8 and all(len(values) == 3 for values in dice.values())
    chosen = next(name for name in dice for line in lines if line.startswith(f"{name}  ") and "<- chosen" in line)
    assert sum(dice[chosen]) == max(map(sum, dice.values())) >= sum(dice[GLOBAL_MODEL])
    assert set(load_experts(str(tmp_path / "out" / "models"), equal_too=True)) == {"A", "B", "N"}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "finished"
