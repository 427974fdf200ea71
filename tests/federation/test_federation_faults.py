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
"""Sites that fail in a round or send a wrong update: the run continues without them, or ends with a one-line error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_clients import SITES, FakeClient, State, by_hand, equal, fakes, make  # noqa: F401
from networks import unet
from torch import Tensor

from shared_iopfl.data.phantoms.sites import make_prostate_sites
from shared_iopfl.data.splits import site_cases
from shared_iopfl.federation.results import cross_site_scores
from shared_iopfl.federation.simulation import Federation
from shared_iopfl.federation.updates import check_update, far_off, update_norm
from shared_iopfl.models.files import load_weights
from shared_iopfl.utils.errors import InputError, root_input_error
from shared_iopfl.utils.reading import read_json
from shared_iopfl.utils.tables import read_rows

BUNDLE = Path(__file__).parents[2] / "bundles" / "prostate_iopfl"

# ---- accepted and refused updates ----------------------------------------------------------------------------------


def moved(state: State, distance: float) -> State:
    """The state, with one entry moved by this distance."""
    result = {key: tensor.clone() for key, tensor in state.items()}
    key = next(key for key, tensor in state.items() if tensor.is_floating_point())
    result[key].view(-1)[0] += distance
    return result


@pytest.mark.parametrize(
    "distances, factor, refused",
    [
        ([1, 1, 1], 10, []),
        ([1, 1, 9.9], 10, []),
        ([1, 1, 10.1], 10, ["C"]),
        ([1, 2, 3, 10.1], 5, ["D"]),
        ([1, 1, 1, 100, 200], 10, ["D", "E"]),
        ([1, 1, 1e9], 0, []),
        ([1, 90], 10, []),  # with two sites, none of them is recognised as wrong
        ([1, 1e9], 10, ["B"]),  # except by the norm of the model
        ([0, 0, 5], 10, []),  # the other sites did not move
        ([0, 5, 5], 10, []),
    ],
)
def test_update_is_far_off_if_it_exceeds_a_multiple_of_the_median_of_the_others(distances, factor, refused):
    state = dict(unet().state_dict())
    norms = {chr(65 + n): update_norm(moved(state, distance), state) for n, distance in enumerate(distances)}
    found = far_off(norms, state, factor)
    assert list(found) == refused
    assert all(f"'{site}'" in str(error) and "max_update_norm" in str(error) for site, error in found.items())


@pytest.mark.parametrize("wrong", [torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.long), [1.0, 1.0]])
def test_update_of_another_kind_is_refused(wrong):
    with pytest.raises(InputError, match=r"'HK' sent .*'w'"):
        check_update("HK", {"w": wrong}, {"w": torch.ones(2)})


# ---- rounds that continue without a site ----------------------------------------------------------------------------


def raising(update: State) -> State:
    raise RuntimeError("CUDA out of memory:\ntried a lot")


def no_data(update: State) -> State:
    raise InputError("site 'B' has no training cases in /data/B.")


SPOILT: dict[str, tuple[Callable[[State], Any], str]] = {
    "raises": (raising, "RuntimeError: CUDA out of memory: tried a lot"),
    "no data": (no_data, "no training cases"),
    "nan": (lambda update: {**update, "0.bias": update["0.bias"] * torch.nan}, "NaN or infinite values in '0.bias'"),
    "inf": (lambda update: {**update, "0.bias": update["0.bias"] + torch.inf}, "NaN or infinite values in '0.bias'"),
    "shape": (lambda update: {**update, "0.bias": update["0.bias"][:1]}, "of shape (1,)"),
    "missing": (lambda update: {key: update[key] for key in update if key != "0.bias"}, "'0.bias'"),
    "extra": (lambda update: {**update, "more": torch.ones(1)}, "'more'"),
    "far": (lambda update: {**update, "0.bias": update["0.bias"] + 1000}, "of norm"),
    "nothing": (lambda update: None, "sent a NoneType"),
}


def spoil(monkeypatch: pytest.MonkeyPatch, faults: Mapping[tuple[str, int], Callable[[State], Any]]) -> None:
    """Let sites fail in their n-th training, counted over all rounds, including failed ones."""
    train, calls = FakeClient.train, dict.fromkeys(SITES, 0)

    def spoilt(self: FakeClient, weights: Mapping[str, Tensor]) -> Any:
        calls[self.site] += 1
        update = train(self, weights)
        fault = faults.get((self.site, calls[self.site]))
        return fault(update) if fault else update

    monkeypatch.setattr(FakeClient, "train", spoilt)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("fault", SPOILT)
def test_round_continues_without_a_site_that_fails_and_the_site_rejoins(fault, tmp_path, monkeypatch, caplog):
    """Weights and state of the site are as if it had not taken part; history, log and table record the failure."""
    expected, clients = by_hand(tmp_path / "hand", {2: "B"})
    spoil(monkeypatch, {("B", 2): SPOILT[fault][0]})
    run = make(tmp_path / "run")
    with caplog.at_level(logging.WARNING, logger="shared_iopfl"):
        assert equal(run.run(), expected)
    assert run.clients["B"].state_dict()["epoch"] == 2
    assert equal(run.clients["B"].personalised, clients["B"].personalised)
    assert equal(load_weights(tmp_path / "run" / "models" / "model_B.pt"), clients["B"].personalised)

    [failure] = read_rows(tmp_path / "run" / "failures.csv")
    assert (failure["round"], failure["site"]) == ("2", "B")
    assert SPOILT[fault][1] in failure["reason"]
    [line] = [record.getMessage() for record in caplog.records if "continues without" in record.getMessage()]
    assert "'B'" in line and SPOILT[fault][1] in line and "\n" not in line
    history = read_rows(tmp_path / "run" / "history.csv")
    failed = [(row["round"], row["site"], row["value"]) for row in history if row["metric"] == "failed"]
    assert failed == [("2", "B", "1.0")]
    told = {(row["round"], row["site"]) for row in history if row["metric"] == "train_loss"}
    assert told == {(str(number), site) for number in (1, 2, 3) for site in SITES} - {("2", "B")}


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("fault", SPOILT)
def test_by_default_a_site_that_fails_ends_the_run(fault, tmp_path, monkeypatch):
    """The run ends with the error of the site; resumed, it gives the weights of an uninterrupted run."""
    whole = make(tmp_path / "whole", min_sites=0).run()
    with monkeypatch.context() as patch:
        spoil(patch, {("B", 2): SPOILT[fault][0]})
        with pytest.raises((InputError, RuntimeError)) as raised:
            make(tmp_path / "run", min_sites=0).run()
    assert SPOILT[fault][1].split(": ")[-1] in " ".join(f"{type(raised.value).__name__} {raised.value}".split())
    assert not (tmp_path / "run" / "failures.csv").exists()
    assert equal(make(tmp_path / "run", min_sites=0, resume=True).run(), whole)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("kind", [TypeError, AttributeError, NameError])
def test_programming_error_is_not_counted_as_a_failure_of_a_site(kind, tmp_path, monkeypatch):
    def wrong(update: State) -> Any:
        raise kind("a misspelt name")

    spoil(monkeypatch, {("B", 2): wrong})
    with pytest.raises(kind):
        make(tmp_path / "run").run()
    assert not (tmp_path / "run" / "failures.csv").exists()


@pytest.mark.usefixtures("fakes")
def test_too_few_sites_end_the_run_with_one_line_that_gives_all_reasons(tmp_path, monkeypatch):
    """The run can be resumed from the round before."""
    whole = make(tmp_path / "whole").run()
    with monkeypatch.context() as patch:
        spoil(patch, {("B", 2): raising, ("D", 2): SPOILT["nan"][0]})
        with pytest.raises(InputError) as raised:
            make(tmp_path / "run").run()
    line = str(root_input_error(raised.value))
    assert "round 2" in line and "min_sites 3" in line and "\n" not in line
    assert "'B': RuntimeError" in line and "'D': site 'D' sent NaN" in line
    assert equal(make(tmp_path / "run", resume=True).run(), whole)


@pytest.mark.usefixtures("fakes")
def test_failures_of_rounds_before_and_after_a_resumption_are_recorded(tmp_path, monkeypatch):
    """Each site fails once in a run of four rounds that is interrupted after the second."""
    absent = {1: "A", 2: "B", 3: "C", 4: "D"}
    expected, _ = by_hand(tmp_path / "hand", absent, rounds=4)
    faults = {(site, number): SPOILT["nan"][0] for number, site in absent.items()}

    def power_cut(update: State) -> State:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        spoil(patch, {**faults, ("A", 3): power_cut})
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "run", rounds=4).run()
    spoil(monkeypatch, {("C", 1): SPOILT["nan"][0], ("D", 2): SPOILT["nan"][0]})
    assert equal(make(tmp_path / "run", rounds=4, resume=True).run(), expected)
    rows = [(int(row["round"]), row["site"]) for row in read_rows(tmp_path / "run" / "failures.csv")]
    assert rows == list(absent.items())


@pytest.mark.usefixtures("fakes")
def test_site_that_fails_every_round_has_no_personalised_model_and_is_named(tmp_path, monkeypatch):
    """An untrained network, or the model of an earlier run, must not be its expert; the others are written."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model_C.pt").touch()
    spoil(monkeypatch, {("C", number): SPOILT["nan"][0] for number in (1, 2, 3)})
    with pytest.raises(InputError, match="'C' failed all 3 rounds"):
        make(tmp_path).run()
    models = {path.name for path in (tmp_path / "models").glob("*.pt")}
    assert models == {"model.pt", "model_A.pt", "model_B.pt", "model_D.pt"}


@pytest.mark.usefixtures("fakes")
def test_site_whose_scoring_fails_is_left_out_of_the_scoring_only(tmp_path, monkeypatch):
    """Its update is averaged, the history has no validation of it, and it scores no models."""
    whole = make(tmp_path / "whole").run()
    validate = FakeClient.validate

    def broken(self: FakeClient, weights: Mapping[str, Tensor]) -> dict[str, float]:
        if self.site == "B":
            raise OSError("disk of B")
        return validate(self, weights)

    monkeypatch.setattr(FakeClient, "validate", broken)
    assert equal(make(tmp_path / "run").run(), whole)
    history = read_rows(tmp_path / "run" / "history.csv")
    assert {row["site"] for row in history if row["metric"] == "val_mean_dice"} == set(SITES) - {"B"}
    assert len(read_rows(tmp_path / "run" / "failures.csv")) == 3
    assert (tmp_path / "run" / "models" / "model_B.pt").is_file()


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("step", ["validate", "shift"])
def test_site_that_fails_in_the_cross_site_scoring_scores_no_models_and_is_named(step, tmp_path, monkeypatch):
    run = make(tmp_path)
    run.run()
    models = {"global": run.weights, **{site: run.clients[site].personalised for site in SITES}}
    expected = cross_site_scores(run, models, [site for site in SITES if site != "B"])
    ours = getattr(FakeClient, step)

    def broken(self: FakeClient, weights: Mapping[str, Tensor]) -> Any:
        if self.site == "B":
            raise OSError("disk of B")
        return ours(self, weights)

    monkeypatch.setattr(FakeClient, step, broken)
    assert cross_site_scores(run, models, SITES) == expected
    assert [row["site"] for row in read_rows(tmp_path / "failures.csv")] == ["B"]


@pytest.mark.usefixtures("fakes")
def test_site_that_fails_to_select_publishes_its_moving_average(tmp_path, monkeypatch):
    """The site is named, scores no models and has no selected share; the other sites score its model."""
    averages = {}

    def fail(self: FakeClient, weights: Mapping[str, Tensor], own_rounds: int, shares: Any) -> float:
        averages[self.site] = self.personalised
        self.train(weights)
        if self.site == "B":
            raise OSError("disk of B")
        return 1.0

    monkeypatch.setattr(FakeClient, "select_personalised", fail, raising=False)
    run = make(tmp_path)
    run.shares = (1.0,)
    run.run()
    assert equal(load_weights(tmp_path / "models" / "model_B.pt"), averages["B"])
    assert set(read_json(tmp_path / "models" / "shares.json")) == set(SITES) - {"B"}
    matrix = {(row["model"], row["site"]) for row in read_rows(tmp_path / "cross_site.csv")}
    assert ("B", "A") in matrix and "B" not in {site for _, site in matrix}
    assert [row["site"] for row in read_rows(tmp_path / "failures.csv")] == ["B"]


@pytest.mark.usefixtures("fakes")
def test_failures_of_an_earlier_run_are_removed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, {("B", 2): raising})
        make(tmp_path).run()
    make(tmp_path).run()
    assert read_rows(tmp_path / "failures.csv") == []


@pytest.mark.usefixtures("fakes")
def test_limits_out_of_range_are_refused(tmp_path):
    wrong: list[dict[str, Any]] = [{"min_sites": -1}, {"min_sites": 5}, {"min_sites": 0.5}, {"max_update_norm": -1.0}]
    for given in [*wrong, {"max_update_norm": float("nan")}]:
        with pytest.raises(InputError, match=next(iter(given))):
            make(tmp_path, **given)


def test_one_error_names_every_file_that_cannot_be_read(tmp_path):
    """It names training and validation cases of each site."""
    make_prostate_sites(tmp_path / "sites", sites=["A", "B"], cases=6, size=(32, 32, 8))
    bad = [
        case["image"]
        for site in ("A", "B")
        for part, count in (("train", 2), ("validation", 1))
        for case in site_cases(tmp_path / "sites", site, part)[:count]
    ]
    for path in bad:
        Path(path).write_bytes(b"")
    overrides = {"dataset_dir": str(tmp_path / "sites"), "device": "cpu", "image_size": 16, "features": 1}
    overrides |= {"val_interval": 0, "save_checkpoints": False, "tensorboard": False}
    federation = Federation(str(BUNDLE), ["A", "B"], 1, str(tmp_path / "out"), overrides=overrides)
    with pytest.raises(InputError) as error:
        federation.run()
    assert all(f"{path} is empty" in str(error.value) for path in bad)
    assert str(error.value).count("is empty") == len(bad) == 6
    assert "\n" not in str(error.value)
