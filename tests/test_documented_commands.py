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
"""Every command of the README, of the site's pages and of the bundles' documentation runs as it stands there.

The commands of a document run one after the other; the site's pages count as one document, read in this order. The
placeholders become folders, the sites synthetic ones of the names in the text, and the sizes tiny.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typed import typed

from shared_iopfl.data.phantoms.sites import make_fundus_sites, make_prostate_sites

ROOT = Path(__file__).parents[1]
# later pages use what earlier ones leave behind
PAGES = (
    *("tutorials/inside.md", "tutorials/outside.md", "tutorials/researcher.md", "tutorials/engineer.md"),
    *("how-to/own_data.md", "how-to/cross_validation.md", "how-to/publishing.md", "how-to/tracking.md"),
    "how-to/newcomer.md",
)
SITE = "docs"
DOCUMENTS = [
    "README.md",
    SITE,
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("bundles/*/docs/README.md")),
]
PROGRAMS = ("python", "torchrun", "iopfl", "./")
BEGUN = re.compile("^(?:" + "|".join(map(re.escape, PROGRAMS)) + ")", re.MULTILINE)
# too long for here: the file that runs it, and how it does
ELSEWHERE = {
    "./demo.sh": (".ci/run", "./demo.sh prostate"),
    "./runtests.sh": (".ci/run", "./runtests.sh"),
    "venv": (".ci/venv.sh", '"$PYTHON" -m venv .venv'),
    "flare": ("tests/federation/flare/test_flare_processes.py", 'given = ["flare", "--bundle"'),
    "--nproc_per_node=2": ("tests/bundles/prostate/test_prostate.py", '"--nproc_per_node=2"'),
    "configs/compare.json": ("tests/bundles/test_compare.py", 'run_config(\n        "compare"'),
}
ELSEWHERE_PAGES = {
    "flare.md": "tests/federation/flare/test_flare_processes.py",
    "monailabel.md": "tests/test_monailabel.py",
    "global_model.md": "tests/bundles/test_compare.py",
    "how-to/expected_dice.md": "tests/bundles/test_calibrate.py",  # here, hardly trained networks find nothing
    "robustness.md": "tests/federation/test_hostile_sites.py",
    "verdicts.md": "tests/test_benchmarks.py",
    "trials.md": "tests/commands/test_commands.py",
    "extending/task.md": "tests/test_extending.py",
    "extending/inside_method.md": "tests/test_extending.py",
    "extending/outside_method.md": "tests/test_extending.py",
    "extending/objective.md": "tests/test_extending.py",
    "extending/plain_flare.md": "tests/test_extending.py",
}
FOLDERS = {"DIR": "DATA", "PHOTOS": "SCANS"}  # placeholders that stand for the same
NETWORK = {"features": "4"}
TINY = {**NETWORK, "image_size": "32"}
SMALLER = {
    # untrained, each site would keep the global model, and there would be nothing to route
    "configs/federate.json": {
        **TINY,
        "rounds": "1",
        "own_rounds": "1",
        "shares": "[]",
        "passes": "1",
    },
    "configs/train.json": {**TINY, "epochs": "1", "passes": "1"},
    "configs/evaluate.json": TINY,
    "ckpt_export": NETWORK,
    "onnx_export": {**NETWORK, "input_shape": "[1,3,32,32]"},
    "configs/inference.json": {**TINY, "empty_masks": "allow"},  # after the exports, which name it too
    "segment": {**TINY, "empty_masks": "allow"},
    "federate": {**TINY, "rounds": "1", "own_rounds": "1", "shares": "[]", "passes": "1"},
    "personalise": {**TINY, "rounds": "1", "passes": "1", "folds": "2"},
}
SHIPPED = {"empty_masks": "allow"}  # an inference with the bundle's own weights, whose sizes are in their manifest
DOFE = np.array([255, 128, 0], np.uint8)  # of the values 0, 1 and 2


def read(document: str) -> str:
    """The text of a document."""
    files = [ROOT / SITE / page for page in PAGES] if document == SITE else [ROOT / document]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def blocks(text: str) -> list[str]:
    """The content of each fenced block; and of code in a line that is a whole command."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [code.replace("\n", " ") for code in re.findall(r"`(python -m [^`]+)`", prose)]
    return fenced + [code for code in inline if "..." not in code]


def commands(text: str) -> list[list[str]]:
    """Each command's words; of a block of Python, the program that runs it."""
    found = []
    for block in blocks(text):
        if block.startswith(("from ", "import ")):
            found.append(["python", "-c", block])
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(PROGRAMS):
                found.append(shlex.split(line, comments=True))
    return found


def elsewhere(command: list[str]) -> tuple[str, str] | None:
    return next((place for key, place in ELSEWHERE.items() if any(word.endswith(key) for word in command)), None)


def smaller(command: list[str]) -> list[str]:
    """The command with what it names made tiny: a setting that comes last counts."""
    for key, settings in SMALLER.items():
        if key in ("configs/inference.json", "segment") and "--ckpt_dir" not in command:
            settings = SHIPPED
        if any(key in word for word in command) and "-c" not in command:
            return [*command, *(word for name, value in settings.items() for word in (f"--{name}", value))]
    return command


def make_data(folder: Path, text: str) -> None:
    """Synthetic sites of all names that the text gives to sites, of the task it speaks of."""
    names = re.findall(r"--(?:outside_)?sites (?:\"\[(.*?)\]\"|([\w,]+))|--site (\w+)", text)
    sites = sorted(set(re.findall(r"[\w.]+", " ".join(part for pair in names for part in pair))))
    if not any(site.startswith("Domain") for site in sites):
        make_prostate_sites(folder / "DATA", sites=sites, cases=5, size=(32, 32, 8))
        return
    make_fundus_sites(folder / "crops", sites=sites, cases=6, size=32)
    for mask in (folder / "crops").glob("*/masks/*.png"):
        site, part = mask.parts[-3], "test" if int(mask.stem[-1]) % 3 == 0 else "train"
        rois = folder / "DATA" / site / part / "ROIs"
        for name in ("image", "mask"):
            (rois / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "crops" / site / "images" / mask.name, rois / "image" / mask.name)
        Image.fromarray(DOFE[np.asarray(Image.open(mask))]).save(rois / "mask" / mask.name)


def unlabelled(folder: Path) -> None:
    """Scans alone, as a hospital outside has them."""
    (folder / "SCANS").mkdir()
    images = [path for path in (folder / "DATA").rglob("*.*") if path.parent.name == "image" or "Case" in path.name]
    for path in [path for path in sorted(images) if "segmentation" not in path.name][:2]:
        shutil.copy(path, folder / "SCANS" / path.name)


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of(document: str, tmp_path: Path) -> None:
    text = read(document)
    make_data(tmp_path, text)
    unlabelled(tmp_path)
    ignored = shutil.ignore_patterns("eval", "__pycache__")
    shutil.copytree(ROOT / "bundles", tmp_path / "bundles", ignore=ignored)
    bundle = ROOT / document
    here = tmp_path / bundle.parents[1].relative_to(ROOT) if bundle.parent.name == "docs" else tmp_path
    for command in commands(text):
        if (place := elsewhere(command)) is not None:
            assert place[1] in (ROOT / place[0]).read_text(encoding="utf-8"), command
            continue
        names = r"(?<![\w/.-])((?:DATA|DIR|OUT|OWN|SCANS|PHOTOS|MASKS|MODELS)(?:_[A-Z0-9]+)*)(?!\w)"
        there = lambda found: str(tmp_path / FOLDERS.get(found[1], found[1]))  # noqa: E731
        words = [re.sub(names, there, word) for word in smaller(command)]
        if words[0] == "iopfl":  # also where the package is not installed
            words[:1] = ["python", "-m", "shared_iopfl"]
        assert words[0] == "python"
        cwd = here.parent if "-c" in command else here  # Python that names the bundle by its folder
        process = typed(*words[1:], cwd=cwd, environment={"CUDA_VISIBLE_DEVICES": ""})
        assert process.returncode == 0, f"{shlex.join(command)}\n{process.stdout[-800:]}{process.stderr[-1500:]}"
    assert (tmp_path / "MASKS" / "routes.csv").is_file()
    assert bool(list((here / "dist").glob("*.zip"))) == ("shared_iopfl package" in text)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_command_is_overlooked(document: str) -> None:
    """As many are found as lines of the text begin with a program's name."""
    text = read(document)
    begun = BEGUN.findall(text)
    inline = [code for code in re.findall(r"`python -m [^`]+`", text) if "..." not in code]
    assert len([command for command in commands(text) if "-c" not in command]) == len(begun) + len(inline) > 5


def test_every_page_with_commands_is_read() -> None:
    """A page that is not, as it needs several machines or a server, says in which test its commands run."""
    there = {path.relative_to(ROOT / SITE).as_posix() for path in (ROOT / SITE).rglob("*.md")}
    with_commands = {page for page in there if BEGUN.search((ROOT / SITE / page).read_text(encoding="utf-8"))}
    assert with_commands == {*PAGES, *ELSEWHERE_PAGES}
    for test in ELSEWHERE_PAGES.values():
        assert (ROOT / test).is_file()
