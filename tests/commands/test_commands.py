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
"""The command ``iopfl``: what it shows, what it takes for a value, and what it does not wait for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_scans import AFFINES, PICTURE, dicom_series, nifti

from shared_iopfl.commands.main import RUNS, TOOLS, main
from shared_iopfl.commands.runs import parse_settings, run_config
from shared_iopfl.commands.summary import summary
from shared_iopfl.models.bundles import find_bundle, own_bundles
from shared_iopfl.utils.errors import InputError, one_line_errors

ROOT = Path(__file__).parents[2]
TINY = ["--image_size", "32", "--features", "4", "--device", "cpu", "--empty_masks", "allow"]


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Two scans, one that cannot be read, and a file of another kind."""
    folder = tmp_path / "scans"
    folder.mkdir()
    for seed, name in enumerate(("one", "two")):
        nifti(folder / f"{name}.nii.gz", np.random.RandomState(seed).rand(24, 20, 4).astype("f4"), AFFINES["LPS"])
    (folder / "broken.nii.gz").write_bytes(b"no scan")
    (folder / "notes.txt").write_text("none either")
    return folder


def test_help_shows_every_command_and_examples(capsys):
    main([])
    said = capsys.readouterr().out
    assert all(f"iopfl {name.split()[0]}" in said or f" {name}" in said for name in [*RUNS, *TOOLS])
    for command in RUNS:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        said = capsys.readouterr().out
        assert ended.value.code == 0 and "examples:" in said and f"iopfl {command} prostate" in said


def test_an_unknown_command_is_one_line():
    with pytest.raises(InputError, match="did you mean 'segment'"):
        main(["segmnt"])


@pytest.mark.parametrize(
    "words", [["--help"], ["segment", "--help"], ["scans", "{}"], ["prepare", "{}", "--masks=False"]]
)
def test_help_and_lists_do_without_torch(words, tmp_path):
    """They answer within a second: importing torch and MONAI takes several."""
    (tmp_path / "A").mkdir()
    for name in ("Case00", "Case01", "Case02"):
        nifti(tmp_path / "A" / f"{name}.nii", np.random.RandomState(0).rand(4, 5, 6))
        nifti(tmp_path / "A" / f"{name}_segmentation.nii", np.eye(4, 5, dtype="u1")[..., None])
    code = "import sys; from shared_iopfl.commands.main import main\n"
    code += f"try: main({[word.format(tmp_path) for word in words]})\nexcept SystemExit: pass\n"
    code += "print('loaded', sorted({'torch', 'monai', 'ignite', 'itk'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "loaded []"
    assert len(ran.stdout.splitlines()) > 1


def test_settings_are_read_as_values():
    words = ["--image_size", "64", "--preset=soup", "--ckpt_dir", "2024", "--sites", "A,1", "--overwrite"]
    words += ["--routing", "{'steps': 2}", "--one-component", "False", "--device=cuda:1"]
    assert parse_settings(words) == {
        "image_size": 64,
        "preset": "soup",
        "ckpt_dir": "2024",
        "sites": ["A", "1"],
        "overwrite": True,
        "routing": {"steps": 2},
        "one_component": False,
        "device": "cuda:1",
    }
    with pytest.raises(InputError, match="belongs to no setting"):
        parse_settings(["--seed", "1", "stray"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("device", "$open({!r}, 'w')"), ("routing", "[\"$open({!r}, 'w')\"]"), ("ckpt_dir", "$open({!r}, 'w')")],
)
def test_what_is_typed_is_never_run_as_code(key, value, scans, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    monkeypatch.chdir(tmp_path)
    settings = [*TINY, "--overlays", "False", f"--{key}", value.format(str(mark))]
    with pytest.raises(InputError):
        main(["segment", "prostate", str(scans / "one.nii.gz"), str(tmp_path / "out"), *settings])
    assert not mark.exists()


def test_a_segmentation_ends_with_a_summary(scans, models, tmp_path, capsys):
    """A scan that failed is named, the run still ends with an error; neither the config nor logs are printed."""
    out = tmp_path / "masks"
    with pytest.raises(InputError, match="1 of 3 scans failed"):
        main(["segment", "prostate", str(scans), str(out), "--ckpt_dir", str(models), *TINY])
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].startswith("3 scans in ") and f"2 masks in {out}" in lines[0]
    assert {"case", "volume (ml)", "quality", "seconds"} <= set(map(str.strip, lines[2].split("  ")))
    assert {lines[3].split()[0], lines[4].split()[0]} == {"one", "two"}
    assert any(line.startswith("check first") or line.startswith("no mask was flagged") for line in lines)
    assert any(line.startswith("failed: broken:") for line in lines)
    assert any("1 file was skipped" in line for line in lines)
    assert "_target_" not in said.out + said.err and "INFO" not in said.out + said.err
    assert (out / "not_taken.csv").read_text().splitlines() == ["file,reason", "notes.txt,files of other kinds"]
    assert (out / "one.nii.gz").is_file()


def test_a_summary_speaks_of_quality_where_there_is_one(tmp_path):
    """Not in plain inference, nor where a single view is predicted from; and without measures, too."""
    (tmp_path / "scans.csv").write_text("case,file\none,one.png\ntwo,two.png\n")
    assert "no review list" in summary(tmp_path, 1.0) and "quality is the agreement" not in summary(tmp_path, 1.0)
    (tmp_path / "measures.csv").write_text("case,volume_ml\none,2.5\ntwo,nan\n")
    (tmp_path / "review.csv").write_text("rank,case,quality,shift,decision,reasons\n1,one,,,,\n2,two,,,,\n")
    lines = summary(tmp_path, 1.0).splitlines()
    assert "no mask was flagged" in lines and lines[4].split() == ["two", "-", "-", "-", "-"]
    (tmp_path / "review.csv").write_text("rank,case,quality,shift,decision,reasons\n1,one,0.95,,,\n")
    (tmp_path / "measures.csv").unlink()
    (tmp_path / "scans.csv").unlink()
    assert "no mask was flagged; quality is the agreement" in summary(tmp_path, 1.0)


def test_a_run_that_is_refused_does_not_sum_up_the_earlier_one(scans, models, tmp_path, capsys):
    """Neither where it asks for a folder that is in use, nor where it ends before it replaced anything."""
    out, settings = tmp_path / "masks", ["--ckpt_dir", str(models), *TINY, "--overlays", "False"]
    main(["segment", "prostate", str(scans / "one.nii.gz"), str(out), *settings])
    assert "1 scan in " in capsys.readouterr().out
    for more in ([], ["--overwrite", "--routing", "{'tail': 1}"]):
        with pytest.raises(InputError):
            main(["segment", "prostate", str(scans / "two.nii.gz"), str(out), *settings, *more])
        assert capsys.readouterr().out == ""


def test_ctrl_c_says_how_to_go_on_and_no_summary(scans, models, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("shared_iopfl.evaluation.run.provenance.InferenceRecorder.__call__", interrupt)
    out, settings = tmp_path / "masks", ["--ckpt_dir", str(models), *TINY, "--overlays", "False"]
    with pytest.raises(KeyboardInterrupt) as ended:
        main(["segment", "prostate", str(scans / "one.nii.gz"), str(out), *settings])
    one_line_errors(in_any_process=True)
    with pytest.raises(SystemExit):
        sys.excepthook(KeyboardInterrupt, ended.value, None)
    said = capsys.readouterr()
    assert said.out == "" and (out / "measures.csv").is_file()
    assert f"interrupted: {out} holds the results so far; the same command with --overwrite True" in said.err


def test_quiet_prints_nothing_and_verbose_uses_the_bundle_s_logging(scans, models, tmp_path, capsys):
    settings = ["--ckpt_dir", str(models), *TINY, "--overlays", "False"]
    (scans / "broken.nii.gz").unlink()
    main(["segment", "prostate", str(scans), str(tmp_path / "quiet"), "--quiet", *settings])
    said = capsys.readouterr()
    assert said.out == said.err == ""
    main(["segment", "--verbose", "prostate", str(scans), str(tmp_path / "verbose"), *settings])
    assert " - shared_iopfl.models.architecture - WARNING - " in capsys.readouterr().out


def test_a_config_that_is_not_there_and_a_wrong_setting_are_one_line(scans, tmp_path):
    with pytest.raises(InputError, match="no bundle 'prostat'; did you mean 'prostate'"):
        main(["segment", "prostat", str(scans), str(tmp_path / "out")])
    with pytest.raises(InputError, match="unknown setting 'image_siz'; did you mean 'image_size'"):
        main(["segment", "prostate", str(scans), str(tmp_path / "out"), "--image_siz", "32"])
    with pytest.raises(InputError, match=r"no nothing\.json"):
        run_config("prostate", "nothing", {})


def test_a_bundle_is_found_by_its_task_its_name_or_its_folder():
    prostate = ROOT / "bundles" / "prostate_iopfl"
    assert own_bundles() == {"fundus": ROOT / "bundles" / "fundus_iopfl", "prostate": prostate}
    assert find_bundle("prostate") == find_bundle("prostate_iopfl") == find_bundle(prostate) == prostate


@pytest.mark.slow
def test_an_installed_package_brings_its_bundles_and_its_command(tmp_path):
    """From a wheel, in a folder that is no checkout."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(ROOT)], check=True, capture_output=True, cwd=tmp_path)
    code = "import shared_iopfl.models.bundles as b; print(*(f for f in b.own_bundles().values()))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    folders = [Path(word) for word in ran.stdout.split()]
    assert len(folders) == 2 and all(folder.is_relative_to(tmp_path) for folder in folders), ran.stderr
    assert all((folder / "models" / "model.pt").is_file() for folder in folders)
    assert (tmp_path / "site" / "bin" / "iopfl").is_file()
    assert (tmp_path / "site" / "shared_iopfl" / "report" / "templates" / "page.html.jinja").is_file()


def test_a_dicom_export_gives_masks_in_all_formats(models, tmp_path):
    """Named after the patient's folder; the table says which series is which, and the page is written."""
    pydicom = pytest.importorskip("pydicom")
    pytest.importorskip("highdicom")
    uid = "1.2.826.0.1.3680043.8.498.10203040506070809"
    array = np.random.RandomState(0).randint(0, 1000, (4, 24, 20)).astype(np.int16)
    (tmp_path / "scans" / "P001" / uid).mkdir(parents=True)
    series = dicom_series(tmp_path / "scans" / "P001" / uid / f"{uid}.1", array, f"{uid}.1")
    for file in series.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.FrameOfReferenceUID, dataset.SeriesDescription = f"{uid}.2", "t2 tra"
        dataset.save_as(file)
    out = tmp_path / "masks"
    settings = ["--ckpt_dir", str(models), *TINY, "--output_format", "nifti,dicomseg,rtstruct"]
    main(["segment", "prostate", str(tmp_path / "scans"), str(out), *settings])
    written = {path.name for path in out.iterdir()}
    assert {f"P001_t2_tra{ending}" for ending in (".nii.gz", ".seg.dcm", ".rtstruct.dcm", "_overlay.png")} <= written
    assert (out / "scans.csv").read_text().splitlines() == ["case,file", f"P001_t2_tra,{uid}.1"]
    assert "P001_t2_tra" in (out / "report.html").read_text(encoding="utf-8")


def test_dicom_asked_of_a_picture_is_one_line_in_the_table_of_failures(fundus_models, tmp_path):
    pytest.importorskip("highdicom")
    (tmp_path / "photos").mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.kron(PICTURE, np.ones((8, 8, 1), np.uint8))).save(tmp_path / "photos" / f"{name}.png")
    settings = ["--ckpt_dir", str(fundus_models), *TINY, "--crop", "never", "--output_format", "dicomseg"]
    with pytest.raises(InputError, match="2 of 2 scans failed"):
        main(["segment", "fundus", str(tmp_path / "photos"), str(tmp_path / "out"), *settings])
    assert "is not a DICOM series, which dicomseg output requires" in (tmp_path / "out" / "failed.csv").read_text()


def test_the_tables_of_a_comparison_follow_from_the_scores_of_its_cases(tmp_path, capsys):
    columns = "seed,fold,site,role,method,case,metric,value\n"
    rows = [
        f"0,{site},{site},outside,{method},c{case},dice,{0.5 + 0.1 * (method == 'default') + case / 100}\n"
        for site in "AB"
        for method in ("global", "default")
        for case in range(4)
    ]
    (tmp_path / "comparison.csv").write_text(columns + "".join(rows), encoding="utf-8")
    main(["report", str(tmp_path)])
    assert "+10.0" in (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "report.html" in capsys.readouterr().out
