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
"""The page of an inference: all masks in the order of the review list, in one file, also for many scans."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import write_csv

from shared_iopfl.report.inference.page import write_inference_report
from shared_iopfl.utils.errors import InputError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def make_inference(folder: Path, count: int, side: int = 300) -> Path:
    """The files of an inference, made up; the last cases are the worst."""
    cases = [f"Case<{number:03d}>" for number in range(count)]
    review = [
        [rank, case, 0.5 + 0.4 * rank / count, 1.0, "", "views disagree" if rank <= count // 4 else ""]
        for rank, case in enumerate(reversed(cases), 1)
    ]
    write_csv(folder / "review.csv", "rank,case,quality,shift,decision,reasons", review)
    write_csv(folder / "measures.csv", "case,volume_ml", [[case, 30 + n % 40] for n, case in enumerate(cases)])
    known = {"experts": {"A": 0.25, "global": 0.75}, "seconds": 1.5}
    routes = {case: {**known, "statistics": [0.0] if number else [0.0, 0.5]} for number, case in enumerate(cases)}
    (folder / "routes.json").write_text(json.dumps({"experts": ["A", "global"], "cases": routes}))
    write_csv(folder / "failed.csv", "case,file,reason", [["bad", "/home/doe/bad.nii", "/home/doe/bad.nii is empty"]])
    write_csv(folder / "not_taken.csv", "file,reason", [["notes.txt", "files of other kinds"]])
    y, x = np.mgrid[:side, :side]
    for number, case in enumerate(cases):
        picture = np.stack([(x + y + 7 * number) % 255, 255 * ((x - 150) ** 2 + (y - 150) ** 2 < 2500), 0 * x], -1)
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{case}_overlay.png")
    return folder


def test_masks_come_in_the_order_of_the_review_list_with_what_is_known_of_them(tmp_path):
    page = write_inference_report(make_inference(tmp_path, 8)).read_text(encoding="utf-8")
    shown = [page.index(f'alt="Case&lt;{number:03d}&gt;"') for number in reversed(range(8))]
    assert shown == sorted(shown)
    assert page.count('class="noticed"') == 2 and page.count("<em>views disagree</em>") == 2
    assert "8 masks · 2 flagged · 1 failed · 1 file skipped" in page
    assert "largest weight: global, 0.75" in page and "Volume (ml) 30" in page
    assert page.count("shares of own statistics: 0, 0.5") == 1, "said where predictions by several are averaged"
    assert "notes.txt" in page and "published without distributions of the inside sites" in page
    assert "<td>bad is empty</td>" in page
    assert "/home/doe" not in page and "<script" not in page and "http" not in page.replace("http://www.w3.org", "")


def test_published_quantiles_are_drawn_behind(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    measures = {"volume_ml": {"A": [20, 30, 40, 50, 80], "wrong": [1, 2]}}
    (models / "manifest.json").write_text(
        json.dumps({"format": 1, "architecture": {}, "metrics": {"measures": measures}})
    )
    plain, behind = (
        write_inference_report(make_inference(tmp_path / name, 2), ckpt_dir).read_text(encoding="utf-8")
        for name, ckpt_dir in (("plain", None), ("behind", models))
    )
    assert "the published distribution at each inside site" in behind and "was published" not in behind
    assert len(plain) != len(behind)


def test_five_hundred_scans_make_a_page_that_opens(tmp_path):
    folder = make_inference(tmp_path, 500, side=80)
    began = time.process_time()
    page = write_inference_report(folder)
    assert time.process_time() - began < 30
    assert page.stat().st_size < 20e6
    assert page.read_text(encoding="utf-8").count('src="data:image/jpeg') == 500


def test_what_is_missing_is_left_out_and_a_folder_without_masks_is_one_line(tmp_path):
    write_csv(tmp_path / "measures.csv", "case,volume_ml", [["one", 40.0]])
    page = write_inference_report(tmp_path).read_text(encoding="utf-8")
    assert "<b>one</b>" in page and "<h2>Experts</h2>" not in page and "<img" in page
    with pytest.raises(InputError, match="holds no inference"):
        write_inference_report(tmp_path / "nothing")


def test_masks_without_measures_and_review_are_shown(tmp_path):
    """As of a task that measures nothing, in plain inference."""
    write_csv(tmp_path / "scans.csv", "case,file", [["one", "one.png"], ["bad", "bad.png"], ["two", "two.png"]])
    write_csv(tmp_path / "failed.csv", "case,file,reason", [["bad", "bad.png", "is empty"]])
    page = write_inference_report(tmp_path).read_text(encoding="utf-8")
    assert "2 masks · 0 flagged · 1 failed" in page
    assert "<b>one</b>" in page and "<b>two</b>" in page and "<b>bad</b>" not in page


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_shows_it(tmp_path):
    page = write_inference_report(make_inference(tmp_path, 12))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--window-size=1200,2000"]
    subprocess.run([*command, f"--screenshot={tmp_path / 'shot.png'}", page.as_uri()], check=True, timeout=120)
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).astype(int)
    assert (shot[..., 1] - shot[..., 0] > 100).sum() > 10_000  # the green discs of the thumbnails
