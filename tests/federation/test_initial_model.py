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
"""A federation that starts from the model of an earlier one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_clients import equal, fakes, make  # noqa: F401

from shared_iopfl.utils.errors import InputError


def test_a_federation_continues_from_the_model_of_another(fakes, tmp_path: Path):  # noqa: F811
    """The first round starts from the given weights; an interrupted run does not return to them."""
    first = make(tmp_path / "first").run()
    torch.save(first, tmp_path / "model.pt")
    second = make(tmp_path / "second", initial_model=str(tmp_path / "model.pt"))
    second.start()
    assert equal(second.weights, first)
    last = second.run()
    assert not equal(last, first)
    resumed = make(tmp_path / "second", initial_model=str(tmp_path / "model.pt"), resume=True)
    assert equal(resumed.run(), last)


def test_new_models_do_not_keep_the_calibration_of_earlier_ones(fakes, tmp_path: Path):  # noqa: F811
    """The expected Dice of masks would be that of models that are gone."""
    make(tmp_path / "run").run()
    (tmp_path / "run" / "models" / "calibration.json").write_text("{}")
    make(tmp_path / "run").run()
    assert not (tmp_path / "run" / "models" / "calibration.json").exists()


def test_a_model_of_another_network_is_refused(fakes, tmp_path: Path):  # noqa: F811
    """The error names the file and the first weight that differs."""
    weights = make(tmp_path / "first").run()
    for broken in ({**weights, "0.weight": torch.zeros(3, 3)}, {"0.bias": weights["0.bias"]}):
        torch.save(broken, tmp_path / "model.pt")
        with pytest.raises(InputError, match=r"model\.pt does not fit the network: '0\.weight' differs"):
            make(tmp_path / "other", initial_model=str(tmp_path / "model.pt")).start()
    with pytest.raises(InputError, match="no model at"):
        make(tmp_path / "other", initial_model=str(tmp_path / "none.pt")).start()
