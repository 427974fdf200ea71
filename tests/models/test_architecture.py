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
"""Models are run with what they were trained with, or one line says what differs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from shared_iopfl.federation.monai_fl.bundle_client import OwnModels
from shared_iopfl.models.architecture import (
    check_architecture,
    check_training,
    describe_architecture,
    unet_features,
    write_architecture,
)
from shared_iopfl.models.manifest import check_manifest, read_manifest, setting, write_manifest
from shared_iopfl.utils.errors import InputError

NETWORK = {"_target_": "BasicUNet", "in_channels": 3, "features": (4, 8, 16, 32, 64, 4), "norm": "batch"}
VALUES = {"image_size": 96, "features": 4, "normalise": True, "crop": "never", "coding": "dofe"}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write_architecture(tmp_path, describe_architecture(VALUES, NETWORK))
    (tmp_path / "model.pt").write_bytes(b"x")
    return tmp_path


def test_training_records_the_architecture(models: Path) -> None:
    """Numbers, truth values and texts are read as they were written, and the folder does not count as published."""
    manifest = read_manifest(models)
    assert manifest is not None and manifest["architecture"]["network_def"]["norm"] == "batch"
    found = [setting(models, name, default) for name, default in (("image_size", 384), ("normalise", False))]
    assert found == [96, True]
    assert setting(models, "crop", "auto") == "never"
    assert setting(models, "slices", 3) == 3
    with pytest.raises(InputError, match="not published"):
        check_manifest(models)


@pytest.mark.parametrize(
    ("values", "network", "said"),
    [
        ({"image_size": 384}, {}, "--image_size 384 contradicts .*manifest.json.* trained with 96"),
        ({"normalise": False}, {}, "--normalise False .* trained with True"),
        ({"crop": "always"}, {}, "--crop always .* trained with never"),
        ({"features": 8}, {"features": [8, 16, 32, 64, 128, 8]}, "--features 8 .* trained with 4"),
        ({}, {"norm": "instance"}, "--network_def#norm instance .* trained with batch"),
        ({}, {"_target_": "UNet"}, "--network_def#_target_ UNet .* trained with BasicUNet"),
    ],
)
def test_a_different_setting_is_refused_by_one_line(
    models: Path, values: dict[str, Any], network: dict[str, Any], said: str
) -> None:
    """The line names the flag and both values; with match False there is no error."""
    given = {**VALUES, **values}, {**NETWORK, **network}
    with pytest.raises(InputError, match=said) as error:
        check_architecture(models, given[0], network_def=given[1])
    assert "\n" not in str(error.value)
    check_architecture(models, given[0], False, given[1])


@pytest.mark.parametrize(
    "values", [{}, {"coding": "index"}, {"features": [4, 8, 16, 32, 64, 4]}, {"spacing": 1}, {"normalise": 1}]
)
def test_what_is_the_same_or_free_is_no_contradiction(models: Path, values: dict[str, Any]) -> None:
    check_architecture(models, {**VALUES, **values}, network_def=NETWORK)


def test_models_without_a_manifest_give_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "model.pt").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        check_architecture(tmp_path, VALUES, network_def=NETWORK)
    (record,) = caplog.records
    assert "no manifest.json" in record.getMessage() and "image_size 96" in record.getMessage()
    caplog.clear()
    check_architecture(tmp_path / "nowhere", VALUES, network_def=NETWORK)
    assert not caplog.records


def test_models_of_different_architectures_are_not_mixed_in_a_folder(models: Path) -> None:
    """Models that training replaces do not matter; those that stay must have the same architecture."""
    other = describe_architecture({**VALUES, "image_size": 128}, NETWORK)
    check_training(models, other, ["model.pt"])
    (models / "model_B.pt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"model_B.pt was trained with image_size 96.*128: choose another"):
        OwnModels(str(models), ["model.pt", "model_A.pt"], {"image_size": 128})
    OwnModels(str(models), ["model.pt", "model_A.pt"], {"image_size": 96}).start(None)  # type: ignore[arg-type]


def test_a_published_set_keeps_its_manifest(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"x")
    write_manifest(tmp_path, {"image_size": 96}, "research only")
    before = (tmp_path / "manifest.json").read_bytes()
    write_architecture(tmp_path, {"image_size": 96, "features": 4})
    assert (tmp_path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("features", [4, [4, 8, 16, 32, 64, 4], (4, 8, 16, 32, 64, 4)])
def test_the_widths_of_a_unet(features: Any) -> None:
    assert unet_features(features) == [4, 8, 16, 32, 64, 4]
