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
"""Fundus sites in every coding and layout federate; a wrong coding or a bad file is refused before the first round."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fundus_runs import (
    GLANCE,
    Run,
    bare_retina,
    check_mask,
    cut_short,
    grey,
    pixels,
    refusal,
    rows,
    run_fundus,
    vertical_ratio,
)
from PIL import Image

from shared_iopfl.data.splits import site_cases
from shared_iopfl.federation.simulation import Federation


@dataclass
class PublicRun:
    folder: Path
    read_in_rounds: set[str]


@pytest.fixture(scope="module")
def public(sites: Path, tmp_path_factory: pytest.TempPathFactory, run_config: Run, opened_files: Any) -> PublicRun:
    """A short run over the public layout and coding, and what its rounds opened."""
    folder, opened = tmp_path_factory.mktemp("public"), set()
    rounds = Federation.run

    def recorded_rounds(self: Federation) -> dict[str, torch.Tensor]:
        with opened_files.record() as paths:
            result = rounds(self)
        opened.update(paths)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "run", recorded_rounds)
        run_fundus(
            run_config, "federate", dataset_dir=sites, output_dir=folder, sites=["Domain1"],
            outside_sites=["Domain2"], coding="dofe", **GLANCE,
        )  # fmt: skip
    return PublicRun(folder, opened)


def test_the_public_split_is_kept(public: PublicRun, sites: Path) -> None:
    """Rounds train and validate on the train folder, all of it, and open nothing else of the public sites."""
    train, test = (
        {os.path.abspath(path) for path in (sites / "Domain1" / part).rglob("*.png")} for part in ("train", "test")
    )
    assert len(test) == 4
    assert train <= public.read_in_rounds
    assert not test & public.read_in_rounds
    assert not any("Domain2" in path for path in public.read_in_rounds)
    scored = {row["case"] for row in rows(public.folder / "metrics.csv") if row["site"] == "Domain1"}
    assert scored == {Path(path).stem for path in test}


def check_references(run: Path, originals: Path, site: str, count: int) -> None:
    """The scored references of a site are its eyes', whatever values its files have."""
    metrics = [row for row in rows(run / "metrics.csv") if row["site"] == site and row["metric"] == "vcdr_reference"]
    assert len({row["case"] for row in metrics}) == count
    for row in metrics:
        mask = pixels(originals / "masks" / f"{row['case']}.png")
        assert float(row["value"]) == pytest.approx(vertical_ratio(mask >= 1, mask == 2), abs=1e-6)


def test_public_masks_are_read_as_they_are_coded(public: PublicRun, sites: Path) -> None:
    """A mask of 255, 128, 0 is the same reference as one of 0, 1, 2; masks are written as 0, 1, 2; all are pictured."""
    check_references(public.folder, sites / "A", "Domain1", 2)
    check_references(public.folder, sites / "B", "Domain2", 5)
    for case in rows(public.folder / "cases.csv"):
        check_mask(public.folder / case["mask"], pixels(case["image"]).shape)
    assert "Left out" not in (public.folder / "report.html").read_text(encoding="utf-8")


def test_a_coding_for_each_site(sites: Path, tmp_path: Path, run_config: Run) -> None:
    """Sites of different codings federate."""
    run_fundus(
        run_config, "federate", dataset_dir=sites, output_dir=tmp_path, sites=["Domain1", "A"],
        coding={"Domain1": "dofe", "A": "index"}, **GLANCE,
    )  # fmt: skip
    check_references(tmp_path, sites / "A", "Domain1", 2)
    check_references(tmp_path, sites / "A", "A", len(site_cases(sites, "A", "test")))


def test_a_coding_of_ones_own(sites: Path, tmp_path: Path, run_config: Run) -> None:
    """A coding may be spelt out instead of named; the values mean what it says, not what another coding says."""
    swapped = {"disc": [1, 2], "cup": [1], "background": [0]}  # the rim taken for the cup
    run_fundus(
        run_config, "federate", dataset_dir=sites, output_dir=tmp_path, sites=["A"], coding=swapped, **GLANCE
    )  # fmt: skip
    for row in rows(tmp_path / "metrics.csv"):
        if row["metric"] == "vcdr_reference":
            assert float(row["value"]) == 1


def test_whole_photographs_federate(photographs: Path, tmp_path: Path, run_config: Run) -> None:
    """A site of whole photographs trains on crops around the disc, and is scored in the photographs' own pixels."""
    run_fundus(
        run_config, "federate", dataset_dir=photographs.parent, output_dir=tmp_path, sites=["E"],
        **{**GLANCE, "crop": "auto"},
    )  # fmt: skip
    assert {row["metric"] for row in rows(tmp_path / "history.csv")} >= {"train_loss", "val_mean_dice"}
    check_references(tmp_path, photographs, "E", 1)
    for case in rows(tmp_path / "cases.csv"):
        assert check_mask(tmp_path / case["mask"], (192, 256)).any()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "coding", "value", "fitting"), [("A", "dofe", "1, 2", "index"), ("Domain1", "index", "128, 255", "dofe")]
)
def test_a_wrong_coding_is_refused(
    site: str, coding: str, value: str, fitting: str, sites: Path, tmp_path: Path, run_config: Run
) -> None:
    """Before the first round, naming a file, its unexpected values, and the coding that would fit."""
    line = refusal(
        run_config, "federate", dataset_dir=sites, sites=[site], coding=coding, output_dir=tmp_path, **GLANCE
    )
    assert f"values {value} in " in line
    assert any(case["label"] in line for case in site_cases(sites, site, "train"))
    assert f"'{fitting}' would fit" in line
    assert not (tmp_path / "federation.pt").exists()


def test_an_unknown_coding_is_refused(sites: Path, tmp_path: Path, run_config: Run) -> None:
    for coding in ("dofee", {"A": "dofee"}):
        line = refusal(
            run_config, "federate", dataset_dir=sites, sites=["A"], coding=coding, output_dir=tmp_path, **GLANCE
        )
        assert "dofee" in line
        assert "'dofe', 'index'" in line


def smaller(path: Path) -> None:
    Image.open(path).resize((90, 90), Image.Resampling.NEAREST).save(path)


def unexpected_value(path: Path) -> None:
    mask = pixels(path).copy()
    mask[0, 0] = 7
    Image.fromarray(mask).save(path)


def blurred(path: Path) -> None:
    """A mask saved as JPEG has values in between."""
    Image.open(path).save(path, "JPEG")


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (cut_short, "image", "broken picture"),
        (grey, "image", "grey"),
        (bare_retina, "image", "no optic disc"),
        (smaller, "label", "grid"),
        (unexpected_value, "label", "values 7 "),
        (blurred, "label", "lossy"),
    ],
)
def test_a_bad_file_is_named_in_one_line(
    damage: Callable[[Path], None], kind: str, words: str, sites: Path, tmp_path: Path, run_config: Run
) -> None:
    """A federation over a site with one bad picture or mask stops before its first round."""
    for name in ("images", "masks"):
        (tmp_path / "data" / "A" / name).mkdir(parents=True)
        for path in (sites / "A" / name).iterdir():
            (tmp_path / "data" / "A" / name / path.name).write_bytes(path.read_bytes())
    bad = Path(site_cases(tmp_path / "data", "A", "train")[0][kind])
    damage(bad)
    options = {**GLANCE, "crop": "auto", "dataset_dir": tmp_path / "data", "output_dir": tmp_path / "run"}
    line = refusal(run_config, "federate", sites=["A"], **options)
    assert str(bad) in line
    assert words in line
    assert not (tmp_path / "run" / "federation.pt").exists()
