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
"""What the prostate bundle refuses, in one line that names it, by the config and on the command line."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prostate_runs import BUNDLE, FEDERATE, Run
from typed import run_bundle

from shared_iopfl.data.splits import site_cases
from shared_iopfl.utils.errors import root_input_error


def broken(sites_dir: Path, folder: Path, name: str, content: bytes | None) -> Path:
    """A copy of site A by links, with one file replaced, or left out."""
    (folder / "A").mkdir(parents=True)
    for path in (sites_dir / "A").iterdir():
        if path.name != name:
            (folder / "A" / path.name).symlink_to(path)
    if content is not None:
        (folder / "A" / name).write_bytes(content)
    return folder


def training_file(sites_dir: Path, key: str) -> Path:
    return Path(site_cases(sites_dir, "A", "train")[0][key])


@pytest.mark.parametrize("key", ["image", "label"])
@pytest.mark.parametrize("damage", ["empty", "cut short"])
def test_a_bad_file_is_named_in_one_line(
    key: str, damage: str, sites_dir: Path, tmp_path: Path, run_config: Run
) -> None:
    """A federation over a site with a broken scan or mask stops before its first round."""
    path = training_file(sites_dir, key)
    content = b"" if damage == "empty" else path.read_bytes()[: path.stat().st_size // 2]
    data = broken(sites_dir, tmp_path / "data", path.name, content)
    with pytest.raises(Exception) as caught:
        run_config("federate", dataset_dir=data, output_dir=tmp_path / "run", **{**FEDERATE, "sites": ["A"]})
    cause = root_input_error(caught.value)
    assert cause is not None
    assert str(data / "A" / path.name) in str(cause)
    assert "\n" not in str(cause)
    assert not (tmp_path / "run" / "federation.pt").exists()


@pytest.mark.parametrize(
    ("config", "overrides", "words"),
    [
        ("federate", {"sites": ["A", "Atlantis"]}, "Atlantis"),
        ("federate", {"sites": []}, "list"),
        ("federate", {"rounds": 0}, "rounds"),
        ("evaluate", {"site": "A"}, "model.pt"),
        ("evaluate", {"site": "A", "model": "personalised"}, "model_A.pt"),
        ("evaluate", {"site": "A", "split": "tset"}, "tset"),
        ("inference", {"preset": "fastest"}, "fastest"),
        ("inference", {"mode": "sometimes"}, "sometimes"),
        ("inference", {"dataset_dir": "nowhere"}, "nowhere"),
    ],
)
def test_a_wrong_word_is_named_in_one_line(
    config: str, overrides: dict[str, Any], words: str, sites_dir: Path, tmp_path: Path, run_config: Run
) -> None:
    """What a user may misspell or leave out on the command line ends in one line that repeats it."""
    given = {"dataset_dir": sites_dir / "E" if config == "inference" else sites_dir, "output_dir": tmp_path / "run"}
    with pytest.raises(Exception) as caught:
        run_config(config, **{**given, "ckpt_dir": tmp_path / "models", **overrides})
    cause = root_input_error(caught.value)
    assert cause is not None
    assert words in str(cause)
    assert "\n" not in str(cause)


def errors_of(process: subprocess.CompletedProcess) -> list[str]:
    """The lines that speak of errors, of both streams; the traceback of an unmended one would be among them."""
    lines = (process.stdout + process.stderr).replace("\r", "\n").splitlines()
    return [line for line in lines if "error" in line.lower() or "Traceback" in line or line.startswith("  File")]


def test_command_line_ends_an_unknown_site_in_one_line(sites_dir: Path, tmp_path: Path) -> None:
    process = run_bundle(BUNDLE, "federate", dataset_dir=sites_dir, sites="['A','Atlantis']", output_dir=tmp_path)
    assert process.returncode == 1
    (line,) = errors_of(process)
    assert line.startswith("error: ")
    assert "Atlantis" in line


def test_command_line_ends_a_bad_scan_in_one_line(
    sites_dir: Path, tmp_path: Path, random_models: Callable[[Path], Path]
) -> None:
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes(training_file(sites_dir, "image").read_bytes()[:500])
    given = {"dataset_dir": scan, "ckpt_dir": random_models(tmp_path / "models"), "output_dir": tmp_path / "masks"}
    process = run_bundle(BUNDLE, "inference", **given, image_size=32, features=4)
    assert process.returncode == 1
    (line,) = errors_of(process)
    assert line.startswith("error: ")
    assert str(scan) in line
    assert "INFO - Engine run" not in process.stdout
    assert not list((tmp_path / "masks").glob("*.nii.gz"))


def test_resuming_with_other_settings_is_refused(sites_dir: Path, tmp_path: Path, run_config: Run) -> None:
    """A run begun with one alpha does not go on with another in silence."""
    run = {**FEDERATE, "dataset_dir": sites_dir, "output_dir": tmp_path, "rounds": 1}
    run_config("federate", **run)
    with pytest.raises((RuntimeError, ValueError)) as raised:
        run_config("federate", **{**run, "alpha": 0.9, "resume": True})
    assert "alpha" in str(root_input_error(raised.value))
