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
"""What a hostile site can send, among two or many sites: updates that are far too long, or of other types."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from fake_clients import FakeClient, equal, fakes, make  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared_iopfl.federation import updates
from shared_iopfl.federation.averaging import Averaging, average_updates
from shared_iopfl.federation.results import cross_site_scores
from shared_iopfl.federation.simulation import Federation
from shared_iopfl.federation.updates import accepted_norms, check_update, far_off, update_norm
from shared_iopfl.models.weights import equal_weights
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import read_rows

norm = update_norm
AVERAGES = get_args(Averaging)
Updates = dict[str, dict[str, Tensor]]
MODEL = {"w": torch.full((4,), 2.0), "n": torch.tensor(3)}  # of norm 4


def moved(by: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"w": MODEL["w"].to(dtype) + by / 2, "n": MODEL["n"] + 1}


# ---- the length of an update ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lengths, earlier, refused",
    [
        ({"A": 1.0}, [], []),
        ({"A": 39.0}, [], []),
        ({"A": 41.0}, [], ["A"]),  # ten times the model's own norm
        ({"A": 1.0, "B": 1000.0}, [], ["B"]),
        ({"A": 1000.0, "B": 1000.0}, [], ["A", "B"]),
        ({"A": 1.0, "B": 39.0}, [1.0, 1.0], []),  # in early rounds, long updates are accepted
        ({"A": 1.0, "B": 59.0}, [6.0, 6.0], []),
        ({"A": 1.0, "B": 61.0}, [6.0, 6.0], ["B"]),  # ten times the median so far
        ({"A": 1.0, "B": 61.0}, [5.0, 3.0, 7.0, 50.0], ["B"]),  # a single long update hardly changes the median
        ({"A": 1.0, "B": 61.0, "C": 61.0, "D": 61.0}, [6.0, 6.0], ["B", "C", "D"]),  # hostile sites are in the majority
        ({"A": 1.0, "B": 39.0}, [0.0, 0.0], []),  # earlier updates of length 0 set no limit
        ({"A": 0.0, "B": 0.0}, [1.0], []),
    ],
)
def test_length_of_an_update_is_limited_by_the_model_and_by_earlier_rounds(lengths, earlier, refused):
    norms = {site: update_norm(moved(length), MODEL) for site, length in lengths.items()}
    found = far_off(norms, MODEL, 10.0, earlier)
    assert list(found) == refused
    assert all(
        f"'{site}'" in str(e) and "max_update_norm" in str(e) and "\n" not in str(e) for site, e in found.items()
    )
    assert far_off(norms, MODEL, 0.0, earlier) == {}


def test_model_of_zeros_sets_no_limit():
    assert far_off({"A": 2.0}, {"w": torch.zeros(4)}, 10.0) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_norm_is_computed_over_floating_point_entries(dtype):
    model, update = {**MODEL, "w": MODEL["w"].to(dtype)}, moved(3.0, dtype)
    kept = copy.deepcopy((model, update))
    assert update_norm(update, model) == pytest.approx(3.0)
    assert update_norm(model) == pytest.approx(4.0)
    assert all(equal_weights(one, other) for one, other in zip((model, update), kept))


@pytest.mark.parametrize("averaging", AVERAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_updates_that_are_averaged_do_not_change(dtype, averaging):
    updates = {site: moved(float(n), dtype) for n, site in enumerate("ABC")}
    kept = copy.deepcopy(updates)
    average_updates(updates, dict.fromkeys(updates, 1), averaging)
    assert all(equal_weights(updates[site], kept[site]) for site in updates)


def too_long(monkeypatch: pytest.MonkeyPatch, times: float, rounds: tuple[int, ...]) -> None:
    """Multiply the update of site B in some of its trainings."""
    train, calls = FakeClient.train, [0]

    def hostile(self: FakeClient, weights: Mapping[str, Tensor]) -> Any:
        update = train(self, weights)
        if self.site != "B":
            return update
        calls[0] += 1
        if calls[0] not in rounds:
            return update
        return {k: weights[k] + times * (v - weights[k]) if v.is_floating_point() else v for k, v in update.items()}

    monkeypatch.setattr(FakeClient, "train", hostile)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("round_", [1, 2, 3])
def test_with_two_sites_an_update_a_thousand_times_too_long_is_left_out(round_, tmp_path, monkeypatch):
    too_long(monkeypatch, 1000.0, (round_,))
    run = make(tmp_path, sites=["A", "B"], min_sites=1)
    run.run()
    assert [(row["round"], row["site"]) for row in read_rows(tmp_path / "failures.csv")] == [(str(round_), "B")]
    assert max(float(weight.abs().max()) for weight in run.weights.values()) < 10


@pytest.mark.usefixtures("fakes")
def test_update_of_a_single_site_is_limited_and_ends_a_run_that_requires_all_sites(tmp_path, monkeypatch):
    too_long(monkeypatch, 1000.0, (2,))
    with pytest.raises(InputError, match=r"'B' sent an update of norm"):
        make(tmp_path, sites=["B"], min_sites=0).run()


@pytest.mark.usefixtures("fakes")
def test_median_of_earlier_rounds_is_known_after_a_resumption(tmp_path, monkeypatch):
    """The update exceeds ten times the median of earlier rounds, which only the history contains."""
    monkeypatch.setattr(updates, "update_norm", lambda update, like=None: 0.0 if like is None else norm(update, like))
    first = make(tmp_path, sites=["A", "B"], min_sites=1, rounds=3)
    first.start()
    for _ in range(2):
        first.run_round()
    assert len(accepted_norms(first.history)) == 4
    usual = accepted_norms(first.history)
    too_long(monkeypatch, 12.0, (1,))
    resumed = make(tmp_path, sites=["A", "B"], min_sites=1, rounds=3, resume=True)
    resumed.run()
    assert accepted_norms(resumed.history)[:4] == usual
    assert [(row["round"], row["site"]) for row in read_rows(tmp_path / "failures.csv")] == [("3", "B")]


# ---- the types of an update -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("averaging", AVERAGES)
def test_update_of_another_precision_does_not_change_the_type_of_the_average(dtype, averaging):
    updates = {"A": moved(1.0, dtype), "B": moved(1.0), "C": moved(1.0)}
    checked = {site: check_update(site, update, MODEL) for site, update in updates.items()}
    average = average_updates(checked, dict.fromkeys(updates, 1), averaging)
    assert average["w"].dtype == torch.float32
    assert average["n"].dtype == torch.int64
    torch.testing.assert_close(average["w"], moved(1.0)["w"])


@pytest.mark.parametrize("value", [1e300, -1e39])
def test_value_that_is_finite_only_in_double_precision_is_refused(value):
    wrong = {**MODEL, "w": torch.full((4,), value, dtype=torch.float64)}
    with pytest.raises(InputError, match=r"'HK' sent NaN or infinite values in 'w', as torch\.float32"):
        check_update("HK", wrong, MODEL)


def test_sparse_tensor_is_refused():
    with pytest.raises(InputError, match="'HK' sent a sparse tensor as 'w'"):
        check_update("HK", {"w": torch.ones(2).to_sparse()}, {"w": torch.ones(2)})


def test_negative_variance_is_refused():
    name = "down.bn.running_var"
    with pytest.raises(InputError, match=f"'HK' sent a negative variance in '{name}'"):
        check_update("HK", {name: torch.tensor([1.0, -0.1])}, {name: torch.ones(2)})


@pytest.mark.parametrize("counts", [{"A": 1e308, "B": 1e308}, {"A": 1.0, "B": float("inf")}, {"A": 0, "B": 1}])
def test_numbers_of_cases_that_give_no_weights_are_refused(counts):
    with pytest.raises(InputError, match="numbers of cases"):
        average_updates({"A": moved(1.0), "B": moved(1.0)}, counts)


# ---- robust averages ------------------------------------------------------------------------------------------------


def average(values: list[list[float]], averaging: Any) -> list[float]:
    updates = {str(n): {"w": torch.tensor(value)} for n, value in enumerate(values)}
    return average_updates(updates, {site: 1 + int(site) for site in updates}, averaging)["w"].tolist()


@pytest.mark.parametrize(
    "values, median, trimmed",
    [
        ([1.0], 1.0, 1.0),
        ([1.0, 3.0], 2.0, 2.0),
        ([1.0, 2.0, 900.0], 2.0, 2.0),
        ([1.0, 2.0, 4.0, 900.0], 3.0, 3.0),
        ([-900.0, 1.0, 2.0, 6.0, 900.0], 2.0, 3.0),
        ([-900.0, -900.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 900.0, 900.0], 3.5, 3.5),
    ],
)
def test_median_and_trimmed_mean_by_hand(values, median, trimmed):
    assert average([[value] for value in values], "median") == pytest.approx([median])
    assert average([[value] for value in values], "trimmed_mean") == pytest.approx([trimmed])


@given(
    st.lists(st.floats(-5, 5), min_size=3, max_size=7),
    st.sampled_from(["median", "trimmed_mean"]),
    st.floats(-1e30, 1e30),
)
@settings(max_examples=50, deadline=None)
def test_one_hostile_site_moves_no_entry_out_of_the_range_of_the_others(honest, averaging, hostile):
    found = average([[value] for value in (hostile, *honest)], averaging)[0]
    assert min(honest) - 1e-5 <= found <= max(honest) + 1e-5


def test_averages_of_equal_updates_are_equal():
    same = [[0.1, -3.0]] * 5
    for averaging in AVERAGES:
        assert average(same, averaging) == pytest.approx(same[0])


def test_sites_are_weighted_by_their_cases_or_equally():
    values = [[1.0], [4.0], [10.0]]  # of sites with one, two and three cases
    assert average(values, "mean") == pytest.approx([(1 + 2 * 4 + 3 * 10) / 6])
    assert average(values, "equal_mean") == pytest.approx([5.0])


def test_unknown_average_is_refused_by_name():
    with pytest.raises(InputError, match="averaging must be one of mean, equal_mean, median, trimmed_mean, but is 'k"):
        average([[1.0]], "krum")
    with pytest.raises(InputError, match="averaging must be"):
        make(Path("nowhere"), averaging="krum")


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("averaging", ["equal_mean", "median", "trimmed_mean"])
def test_federation_uses_the_average_of_its_settings_and_resumes_only_with_the_same(averaging, tmp_path):
    run = make(tmp_path, rounds=1, averaging=averaging)
    weights = run.run()
    # steps of 0.11, 0.21, 0.31 and 0.41: all three give the unweighted mean of the two in the middle
    start = make(tmp_path / "start")
    start.start()
    moved = {key: weights[key] - tensor for key, tensor in start.weights.items() if tensor.is_floating_point()}
    assert all(torch.allclose(step, torch.full_like(step, 0.26), atol=1e-6) for step in moved.values())
    with pytest.raises(InputError, match="averaging"):
        make(tmp_path, rounds=1, resume=True).run()


@pytest.mark.usefixtures("fakes")
def test_scores_that_could_not_be_measured_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeClient, "validate", lambda self, weights: {"val_mean_dice": float("nan")})
    monkeypatch.setattr(FakeClient, "shift", lambda self, weights: float("nan"))
    run: Federation = make(tmp_path)
    run.start()
    assert set(cross_site_scores(run, {"global": run.weights, "A": run.weights}, ["A", "B"]).values()) == {None}


@pytest.mark.usefixtures("fakes")
def test_default_average_is_the_mean(tmp_path):
    assert equal(make(tmp_path / "a").run(), make(tmp_path / "b", averaging="mean").run())
