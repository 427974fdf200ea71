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
"""Nothing that came with data, weights, a run or a command line is evaluated by MONAI, and it arrives as it was."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from config_start import BUNDLES, PROSTATE, start
from hypothesis import example, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from typed import typed

from shared_iopfl.data.splits import list_sites
from shared_iopfl.evaluation.scoring import Scoring
from shared_iopfl.federation.client import SiteClient
from shared_iopfl.federation.monai_fl.bundle_client import own_site
from shared_iopfl.federation.simulation import Federation
from shared_iopfl.utils.config_values import NAMES, PATHS, WORDS, Expression, as_value, as_values
from shared_iopfl.utils.errors import InputError, root_input_error

EVIL = "$__import__('os').system('touch PWNED')"
HOSTILE = (EVIL, "$import os", "@bundle_root", "%/x.json#y", "%configs", "@#x", "a#b", "$'", "\\", "'\"#@$%", "\udcff")


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "PWNED").exists()


@pytest.fixture(autouse=True)
def hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle's first step, `one_line_errors`, sets the process's."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def read_back(value: Any) -> Any:
    parser = ConfigParser({"bundle_root": "elsewhere", "value": None})
    parser.update({"value": as_value(value)})
    return parser.get_parsed_content("value")


@given(st.recursive(st.text(), lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text("ab"), some)))
@settings(max_examples=60, deadline=None)
@example(list(HOSTILE))
@example({"a": list(HOSTILE), "b": {"c": EVIL}})
def test_a_value_comes_out_of_a_config_as_it_was_put_in(value: Any) -> None:
    assert read_back(value) == value


def test_what_is_no_text_stays_the_same_object() -> None:
    device = torch.device("cpu")
    assert read_back(device) is device
    assert read_back((0.5, None, True)) == [0.5, None, True]


def test_our_own_expressions_are_evaluated_and_dictionaries_of_others_build_nothing() -> None:
    assert read_back(Expression("$1 + 1")) == 2
    with pytest.raises(InputError, match=r"_target_ 'os.getcwd' would be built"):
        as_values({"features": [{"_target_": "os.getcwd"}]})


def line(**options: Any) -> str:
    with pytest.raises(Exception) as error:
        start(**options)
    found = root_input_error(error.value)
    assert found is not None, error.value
    assert "\n" not in str(found)
    return str(found)


@pytest.mark.parametrize("text", [EVIL, "$import os", "@output_dir"])
@pytest.mark.parametrize("name", ["dataset_dir", "output_dir", "ckpt_dir", "site_model", "pseudonyms", "preset"])
def test_a_path_or_name_that_was_typed_is_no_expression(name: str, text: str) -> None:
    assert f"begins with '{text[0]}'" in line(**{name: text})


@pytest.mark.parametrize("config", ["train", "evaluate", "federate", "compare", "personalise"])
def test_every_config_looks_at_what_was_typed_first(config: str) -> None:
    assert "begins with '$'" in line(config=config, dataset_dir=EVIL)
    assert "begins with '$'" in line(config=config, bundle=BUNDLES / "fundus_iopfl", dataset_dir=EVIL)


@pytest.mark.parametrize("given", [EVIL, [EVIL], ["A", "@dataset_dir"], ["../A"], ["Global"], ["A", "a"], 1.5, [1.5]])
def test_sites_that_were_typed_have_sites_names(given: Any) -> None:
    assert "site" in line(config="federate", sites=given)
    assert "site" in line(config="federate", sites=["X"], outside_sites=given)


def test_the_process_of_a_site_that_is_called_like_code_ends(tmp_path: Path) -> None:
    """MONAI FL hands a client's name to the config, with the time behind it."""
    assert "run_name" in line(config="train", run_name=f"{EVIL} or x_20261126_120000", dataset_dir=str(tmp_path))


def test_an_expression_for_what_is_no_path_or_name_stays_monais_feature() -> None:
    assert start(device="$torch.device('cpu')").get_parsed_content("device") == torch.device("cpu")


@pytest.mark.parametrize(
    "text, parsed",
    [
        ("2024", 2024),
        ("1e3", 1000.0),
        ("a,b", ("a", "b")),
        ("[A,1]", ["A", 1]),
        ("0x10", 16),
        ("1_000", 1000),
        ("True", True),
        ("a#b", "a"),
        ("a b#c", "a b#c"),
        ("'x'", "x"),
    ],
)
def test_a_path_is_the_text_that_was_typed(text: str, parsed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["--dataset_dir", text], [f"--dataset-dir={text}"]):
        monkeypatch.setattr(sys, "argv", ["monai.bundle", "run", *words, "--seed", "1"])
        expected = "x" if text == "'x'" else text
        assert start(dataset_dir=parsed).get_parsed_content("dataset_dir") == expected


@pytest.mark.parametrize(
    "text, parsed, names",
    [
        ("A,site-1", "A,site-1", ["A", "site-1"]),
        ("A,1", ("A", 1), ["A", "1"]),
        ("[A,1]", ["A", 1], ["A", "1"]),
        ("['A','09']", ["A", "09"], ["A", "09"]),
        ("09", "09", ["09"]),
        ("1e3", 1000.0, ["1e3"]),
        ("A", "A", ["A"]),
    ],
)
def test_sites_are_the_names_that_were_typed(
    text: str, parsed: Any, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["monai.bundle", "run", "--sites", text])
    assert start(config="federate", sites=parsed).get_parsed_content("sites") == names


def test_what_a_number_was_typed_as_is_not_guessed() -> None:
    assert start(dataset_dir=2024).get_parsed_content("dataset_dir") == "2024"
    assert "dataset_dir must be text, but is 1000.0" in line(dataset_dir=1000.0)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("datset_dir", "did you mean 'dataset_dir'?"),
        ("image_sise", "did you mean 'image_size'?"),
        ("rounds", "nothing in this config reads it"),
        ("zzz", "nothing in this config reads it"),
    ],
)
def test_a_setting_that_nothing_reads_is_named_with_the_nearest(name: str, hint: str) -> None:
    assert line(**{name: 64}) == f"unknown setting '{name}'" + ("; " if "mean" in hint else ": ") + hint + (
        "." if "mean" not in hint else ""
    )


def test_keys_that_another_config_brings_or_something_refers_to_are_known() -> None:
    start(config="inference", one="$True", one_component="@one")
    start(config="train", train={**json.loads((PROSTATE / "configs" / "train.json").read_text())["train"]})


def test_every_setting_that_is_text_is_looked_at() -> None:
    looked_at = {*PATHS, *WORDS, *NAMES}
    for path in BUNDLES.glob("*/configs/*.json"):
        content = json.loads(path.read_text())
        if "imports" in content:
            texts = {k for k, v in content.items() if isinstance(v, str) and not v.startswith(("$", "@"))}
            paths = {key for key in content if key.endswith(("_dir", "_root", "site"))}
            assert (texts | paths) <= looked_at, path
        if "initialize" in content:
            steps = content["initialize"]
            assert steps[:2] == ["$errors.one_line_errors()", "$config_values.check_settings()"], path


def test_a_folder_that_is_called_like_code_is_no_site(tmp_path: Path) -> None:
    for name in ("A", EVIL):
        (tmp_path / "sites" / name / "images").mkdir(parents=True)
    with pytest.raises(InputError, match="no name that a site may have"):
        list_sites(tmp_path / "sites")
    shutil.rmtree(tmp_path / "sites" / "A")
    with pytest.raises(InputError, match="no name that a site may have"):
        own_site(tmp_path / "sites", None, "A")


def test_names_are_checked_wherever_a_program_sets_them() -> None:
    bundle = str(PROSTATE)
    for made in (
        lambda: Federation(bundle, ["A", EVIL], 1, "out"),
        lambda: SiteClient(bundle, EVIL, 1, {}),
        lambda: SiteClient(EVIL, "A", 1, {}),
        lambda: Scoring(bundle, "out").score(EVIL, "global"),
        lambda: Scoring.check(["A"], [EVIL]),
    ):
        with pytest.raises(InputError, match=r"no name that a site may have|would be evaluated"):
            made()


@pytest.mark.parametrize("name", ["dataset_dir", "model", "routing", "ckpt_dir", "device", "role"])
def test_a_scoring_evaluates_nothing_that_it_is_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workflow gets text that comes out as it went in."""
    seen: dict[str, Any] = {}

    def record(self: Any, **options: Any) -> None:
        seen.update(options)
        raise InputError("seen")

    monkeypatch.setattr("shared_iopfl.evaluation.scoring.ConfigWorkflow.__init__", record)
    options = {"model": EVIL} if name == "model" else {"model": "global", name: EVIL}
    with pytest.raises(InputError, match="seen"):
        Scoring(str(PROSTATE), EVIL).score("A", **options)
    parser = ConfigParser({name: seen[name], "output_dir": seen["output_dir"]})
    assert parser.get_parsed_content(name) == EVIL
    assert parser.get_parsed_content("output_dir") == EVIL


@pytest.mark.parametrize("config", ["train", "evaluate", "inference"])
@pytest.mark.parametrize("name", ["output_dir", "bundle_root", "dataset_dir", "ckpt_dir"])
def test_experiment_tracking_evaluates_no_path(config: str, name: str) -> None:
    """MONAI patches a tracked config while the workflow is made, before its first step."""
    assert "begins with '$'" in line(config=config, tracking="mlflow", **{name: EVIL})


@pytest.mark.parametrize("name", ["output_dir", "bundle_root", "dataset_dir"])
def test_a_tracked_config_that_is_to_be_saved_evaluates_no_path(name: str) -> None:
    """MONAI evaluates `output_dir` then, in a process that has imported nothing of ours yet."""
    given = {"output_dir": "$@bundle_root + '/out'", "save_execute_config": True, name: EVIL}
    code = (
        "import sys; from monai.bundle import ConfigWorkflow; "
        f"ConfigWorkflow({str(PROSTATE / 'configs' / 'inference.json')!r}, logging_file=False, tracking='mlflow', "
        f"**{given!r}).initialize()"
    )
    done = typed("-c", code)
    assert done.returncode == 1
    assert f"error: {name} " in done.stderr
    assert "begins with '$' and would be evaluated" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_tracked_runs_config_is_written_into_a_folder_called_like_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["monai.bundle", "run", "--output_dir", f"./{EVIL}"])
    parser = start(config="inference", tracking="mlflow", output_dir=f"./{EVIL}")
    written = Path(parser.get_parsed_content("save_execute_config"))
    assert written.is_file()
    assert written.parent == Path(EVIL)


@pytest.mark.parametrize("key", ["loss#_target_", "train::trainer::_target_", "loss#_disabled_", "_target_", 1])
def test_a_key_that_changes_what_is_built_is_refused(key: Any) -> None:
    """A federation's settings reach the sites as id -> value."""
    with pytest.raises(InputError, match="would change what is built"):
        as_values({key: "os.system"})
    with pytest.raises(InputError, match="would change what is built"):
        SiteClient(str(PROSTATE), "A", 1, {key: "os.system"})
