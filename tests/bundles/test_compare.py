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
"""The comparison runs as one config, scores every case once a method, and looks at no label too early."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser, ConfigWorkflow

from shared_iopfl.comparison.protocol import PERSONAL, Comparison
from shared_iopfl.comparison.runs import COLUMNS, Runs
from shared_iopfl.data.splits import find_cases
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.tables import read_rows, write_rows

BUNDLES = Path(__file__).parents[2] / "bundles"
SITES = ["A", "B", "E"]


def small(bundle: str, sites_dir: Path, output_dir: Path, **options: Any) -> Comparison:
    """The bundle's comparison with a tiny network, one round and the methods that are asked for."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLES / bundle / "configs" / "compare.json"))
    paths = {"bundle_root": BUNDLES / bundle, "dataset_dir": sites_dir, "output_dir": output_dir}
    quick = {
        "device": "cpu",
        "image_size": 32,
        "features": 4,
        "rounds": 1,
        "passes": 1,
        "own_rounds": 1,
        "fine_tuning": 0,
    }
    parser.update({**{key: str(path) for key, path in paths.items()}, "sites": SITES, **quick, **options})
    return parser.get_parsed_content("comparison")


@pytest.mark.slow
@pytest.mark.parametrize(("bundle", "choices"), [("prostate_iopfl", True), ("fundus_iopfl", False)])
def test_one_command_compares_every_method_on_every_case(
    bundle: str, choices: bool, make_sites: Callable, run_config: Callable[..., ConfigWorkflow], tmp_path: Path
) -> None:
    """compare.json, with all its methods, ends in a table that holds each case once a method, and in a report.

    What the sites inside choose for one outside knows nothing of the task: one task makes choices.
    """
    sites = make_sites(bundle, tmp_path / "sites")
    run_config(
        "compare",
        bundle,
        dataset_dir=sites,
        output_dir=tmp_path / "out",
        rounds=1,
        passes=1,
        folds=2,
        own_rounds=1,
        fine_tuning=1,
        virtual=["blur"],
        **({} if choices else {"candidates": {}, "federations": {}}),
    )
    rows = [row for row in read_rows(tmp_path / "out" / "comparison.csv") if row["metric"] == "dice"]
    config = json.loads((BUNDLES / bundle / "configs" / "compare.json").read_text(encoding="utf-8"))
    cases = {(site, case["case"]) for site in SITES for case in find_cases(sites, site)}
    inside = {*config["inside"], *PERSONAL, "fine-tuned", "pooled"}
    outside = {*config["outside"], "labelled routes", "pooled"}
    outside |= {*config["federations"], "chosen"} if choices else set()
    for role, methods in (("inside", inside), ("outside", outside)):
        for method in methods:
            of_method = [row for row in rows if row["role"] == role and row["method"] == method]
            counts = Counter((row["site"], row["case"]) for row in of_method)
            assert set(counts) == cases and set(counts.values()) == {1}, (role, method)
    virtual = [row for row in rows if row["role"] == "virtual"]
    assert {row["site"] for row in virtual} == {"blur"}, "a virtual scanner plays the site"
    assert {row["method"] for row in virtual} == {*config["inside"], "pooled"}
    assert len({row["case"] for row in virtual}) == len(cases)
    if choices:
        chosen = json.loads((tmp_path / "out" / "federations.json").read_text(encoding="utf-8"))
        assert [choice["fold"] for choice in chosen] == SITES
    assert (tmp_path / "out" / "comparison.md").is_file() and (tmp_path / "out" / "report.html").is_file()


@pytest.mark.slow
def test_no_label_of_an_outside_site_is_read_before_the_scoring(
    sites_dir: Path, tmp_path: Path, opened_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Federating and choosing for an outside site open none of its masks, and a second run trains nothing."""
    comparison = small(
        "prostate_iopfl",
        sites_dir,
        tmp_path,
        outside={"global": {"mode": "off"}},
        candidates={"routes": {"statistics": 0.0}, "half": {"statistics": 0.5}},
        labelled=False,
    )
    with opened_files.record() as opened:
        comparison.trainings.experts(["A", "B"], 0)
        comparison._choose(0, ["A", "B"])
    labels = {str(Path(case["label"]).resolve()) for case in find_cases(sites_dir, "E")}
    own = {str(Path(case["label"]).resolve()) for case in find_cases(sites_dir, "A")}
    assert not labels & opened and own & opened
    comparison.outside()
    before = (tmp_path / "comparison.csv").read_bytes()
    monkeypatch.setattr(comparison.trainings, "federate", lambda *_: pytest.fail("trained twice"))
    comparison.outside()
    assert (tmp_path / "comparison.csv").read_bytes() == before


def test_the_other_sites_choose_a_training(tmp_path: Path) -> None:
    """For each site the training that is best on average at the others, whatever it scores there itself."""
    scores = {"global": (0.9, 0.2, 0.7), "other": (0.1, 0.6, 0.6)}
    rows = [
        {"seed": 0, "fold": site, "site": site, "role": "outside", "method": method, "case": "c", "metric": "dice"}
        | {"value": value}
        for method, values in scores.items()
        for site, value in zip(SITES, values)
    ]
    write_rows(tmp_path / "comparison.csv", COLUMNS, rows)
    Runs("bundle", "data", tmp_path, {}).choose_trainings(SITES, ["global", "other"])
    choices = json.loads((tmp_path / "federations.json").read_text(encoding="utf-8"))
    assert {choice["fold"]: choice["choice"] for choice in choices} == {"A": "other", "B": "global", "E": "global"}


def test_runs_are_gathered_by_their_folders(tmp_path: Path) -> None:
    """A virtual scanner is the site of its run, and the cases are those of all sites."""
    columns = ("site", "role", "case", "model", "metric", "value")
    for folder, role in (("inside_0", "inside"), ("virtual_curve_1_0", "virtual"), ("outside_A", "outside")):
        rows = [("A", role, case, "FedAvg", "dice", 0.5) for case in ("c0", "c1")]
        write_rows(tmp_path / "seed3" / folder / "metrics.csv", columns, [dict(zip(columns, row)) for row in rows])
    Comparison("bundle", "data", str(tmp_path), SITES, rounds=1).collect()
    gathered = read_rows(tmp_path / "comparison.csv")
    found = [tuple(row[key] for key in ("role", "seed", "fold", "site", "case")) for row in gathered]
    assert found == [
        ("inside", "3", "0", "A", "c0"),
        ("inside", "3", "0", "A", "c1"),
        ("outside", "3", "A", "A", "c0"),
        ("outside", "3", "A", "A", "c1"),
        ("virtual", "3", "0", "curve_1", "A c0"),
        ("virtual", "3", "0", "curve_1", "A c1"),
    ]


def test_comparison_needs_two_sites() -> None:
    """With one site there is nobody to leave out: said in one line."""
    with pytest.raises(InputError, match="two sites"):
        Comparison("bundle", "data", "out", ["A"], rounds=1)
