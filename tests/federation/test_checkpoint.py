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
"""The checkpoint of a federation, which is checked field by field before a run is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_clients import fakes, make  # noqa: F401

from shared_iopfl.federation.checkpoint import check_state
from shared_iopfl.utils.errors import InputError

ALTERED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "round below": (lambda state: state.update(round=-5), "round must be a whole number from 1 to 3, but is -5"),
    "round beyond": (lambda state: state.update(round=4), "round must be"),
    "round in words": (lambda state: state.update(round="two"), "round must be"),
    "client missing": (lambda state: state["clients"].pop("B"), "clients lacks 'B'"),
    "client's past": (lambda state: state["clients"]["B"].update(epoch=-1), "clients.B.epoch must be a whole number"),
    "shape": (
        lambda state: state["weights"].update({"0.weight": torch.ones(3, 2)}),
        r"weights\.0\.weight must have shape \(2, 2\) of float32, but has \(3, 2\)",
    ),
    "type": (lambda state: state["weights"].update({"0.bias": torch.ones(2, dtype=torch.half)}), ".*of float16"),
    "NaN": (
        lambda state: state["clients"]["A"]["personalised"]["0.bias"].fill_(torch.nan),
        r"clients\.A\.personalised\.0\.bias has NaN",
    ),
    "no tensor": (lambda state: state["weights"].update({"0.bias": "two"}), r"weights\.0\.bias must be a tensor"),
    "velocity": (
        lambda state: state.update(server={"velocity": {"0.bias": torch.ones(5)}}),
        r"server\.velocity\.0\.bias must have shape",
    ),
    "history": (lambda state: state.update(history=[{"round": 1}]), "history is not a table"),
    "figures": (lambda state: state["history"][0].update(value="high"), "history is not a table"),
}


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("what", ALTERED)
def test_an_altered_checkpoint_is_refused_by_one_line_that_names_file_and_field(what: str, tmp_path: Path) -> None:
    change, line = ALTERED[what]
    make(tmp_path).run()
    state = torch.load(tmp_path / "federation.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "federation.pt")
    with pytest.raises(InputError, match=rf"federation\.pt: {line}") as error:
        make(tmp_path, resume=True).run()
    assert "\n" not in str(error.value)


def test_a_checkpoint_may_have_optimiser_moments_that_a_new_run_lacks() -> None:
    moments = {"state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(2)}}}
    check_state(moments, {"state": {}}, Path("f"))
    moments["state"][0]["exp_avg"][1] = torch.inf
    with pytest.raises(InputError, match=r"state\.0\.exp_avg has NaN or infinite"):
        check_state(moments, {"state": {}}, Path("f"))
