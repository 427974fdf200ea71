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
"""All that is to be measured on a machine with CUDA, one command after another, as one JSON and one page.

See ``benchmarks/gpu.sh``. A command that fails is named in both files, and the others run all the same.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fire
import torch

from benchmarks.timing import machine
from shared_iopfl.utils.tables import write_json

__all__ = ["measure"]

ROOT = Path(__file__).parents[1]
BENCHMARKS: dict[str, list[str]] = {
    "routing": ["routing"],
    "adaptation": ["adaptation"],
    "training prostate": ["training", "--task", "prostate"],
    "training fundus": ["training", "--task", "fundus"],
    "scaling": ["scaling"],
    "options": ["options"],
    "startup": ["startup"],
}
TASKS = {"prostate": 24, "fundus": 12}  # cases that are made a site


def measure(
    output_dir: str,
    device: str = "cuda",
    rounds: int = 3,
    prostate_dir: str = "",
    fundus_dir: str = "",
    only: str = "",
    clock: str = "wall",
    image_size: int = 0,
    repeats: int = 0,
    quick: bool = False,
) -> None:
    """Run the tests marked `gpu`, the benchmarks, and a short training of both tasks; write gpu.json and gpu.md.

    Args:
        output_dir: for the two files, the logs and the runs.
        device: that is measured.
        rounds: of the federations, at the bundles' own image size and number of features.
        prostate_dir, fundus_dir: sites to train on; without them synthetic sites are made.
        only: of the steps "tests", "benchmarks" and "training" run this one.
        clock: of the benchmarks; see :func:`benchmarks.timing.use_clock`.
        image_size, repeats: of all benchmarks alike; 0: each benchmark's own.
        quick: tiny networks and images, to see that the script runs; the figures mean nothing.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA on this machine: install a torch with CUDA, or give --device.")
    out = Path(output_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    sizes = {"features": 4, "image_size": 32, "repeats": 1} if quick else {}
    sizes |= {name: value for name, value in {"image_size": image_size, "repeats": repeats}.items() if value}
    arguments = ["--device", device, "--clock", clock, *(f"--{name}={value}" for name, value in sizes.items())]
    found: dict[str, Any] = {**machine(torch.device(device)), "arguments": arguments, "quick": quick}
    if only in ("", "tests"):
        found["tests"] = _tests(out)
    if only in ("", "benchmarks"):
        found["benchmarks"] = {name: _benchmark(name, out, arguments) for name in BENCHMARKS}
    if only in ("", "training"):
        folders = {"prostate": prostate_dir, "fundus": fundus_dir}
        found["training"] = {task: _training(task, folders[task], out, device, rounds, quick) for task in TASKS}
    write_json(out / "gpu.json", found)
    (out / "gpu.md").write_text(page(found), encoding="utf-8")
    print((out / "gpu.md").read_text(encoding="utf-8"))


def _run(name: str, command: list[str], out: Path) -> dict[str, Any]:
    """Run a command of this Python; its exit status, seconds and log, and what it prints as ``stdout``."""
    log, began = out / f"{name.replace(' ', '_')}.log", time.perf_counter()
    print(f"running {name}, log in {log}", file=sys.stderr)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True)
        file.write(done.stdout)
    seconds = round(time.perf_counter() - began, 1)
    return {"status": done.returncode, "seconds": seconds, "log": log.name, "stdout": done.stdout}


def _tests(out: Path) -> dict[str, Any]:
    told = _run("tests", ["-m", "pytest", "-m", "gpu", "-rs", f"--junitxml={out / 'tests.xml'}"], out)
    del told["stdout"]
    if (out / "tests.xml").is_file():
        suite = ElementTree.parse(out / "tests.xml").getroot().find("testsuite")
        counts = {} if suite is None else suite.attrib
        told |= {key: int(counts.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    return told


def _benchmark(name: str, out: Path, arguments: list[str]) -> dict[str, Any]:
    told = _run(name, ["-m", "benchmarks", *BENCHMARKS[name], *arguments], out)
    printed = told.pop("stdout")
    try:
        return {**told, **(json.loads(printed) if told["status"] == 0 else {})}
    except json.JSONDecodeError:
        # what else a library prints must not cost the results of the other benchmarks
        return {**told, "status": "no JSON object"}


def _training(task: str, folder: str, out: Path, device: str, rounds: int, quick: bool) -> dict[str, Any]:
    """A federation of all sites of a folder but the last, which is outside; or of synthetic sites A to D, with E."""
    tiny = ["--features=4", "--image_size=32", "--passes=1"] if quick else []
    if not folder:
        folder = str(out / f"{task}_sites")
        size = ["--size", "(32,32,8)" if task == "prostate" else "32"] if quick else []
        made = ["-m", "shared_iopfl", "phantoms", task, "--output_dir", folder, "--cases", str(TASKS[task]), *size]
        if (told := _run(f"sites {task}", made, out))["status"]:
            return {key: value for key, value in told.items() if key != "stdout"}
    names = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    bundle, run = ROOT / "bundles" / f"{task}_iopfl", out / f"{task}_run"
    command = ["-m", "monai.bundle", "run", f"--config_file={bundle / 'configs' / 'federate.json'}"]
    command += [f"--bundle_root={bundle}", f"--dataset_dir={folder}", f"--output_dir={run}", f"--device={device}"]
    command += [f"--sites={names[:-1]}", f"--outside_sites={names[-1:]}", f"--rounds={rounds}", "--own_rounds=1"]
    told = _run(f"federation {task}", [*command, "--val_interval=1", "--overwrite=True", *tiny], out)
    del told["stdout"]
    return {**told, **({"scores": _scores(run / "metrics.csv")} if told["status"] == 0 else {})}


def _scores(path: Path) -> dict[str, float]:
    """The mean Dice of each model over cases and targets."""
    values: dict[str, list[float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"].endswith("dice"):
                values.setdefault(f"{row['role']} {row['model']}", []).append(float(row["value"]))
    return {model: round(sum(of) / len(of), 4) for model, of in values.items()}


def page(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    where = found["machine"]
    lines = [f"# Results on {where.get('gpu', where['cpu'])}", ""]
    lines += [", ".join(f"{name} {version}" for name, version in found["versions"].items()) + ".", ""]
    if found["quick"]:
        lines += ["A trial of the script on tiny networks: the figures mean nothing.", ""]
    if tests := found.get("tests"):
        counts = ", ".join(f"{tests[key]} {key}" for key in ("tests", "failures", "errors", "skipped") if key in tests)
        lines += ["## Tests", "", f"{counts or 'no result'}; exit status {tests['status']}, {tests['seconds']} s.", ""]
    if "benchmarks" in found:
        lines += ["## Benchmarks", "", "| benchmark | figure | median | min | max |", "|---|---|---|---|---|"]
        for name, told in found["benchmarks"].items():
            if told["status"]:
                lines += [f"| {name} | failed, see {told['log']} | | | |"]
            for kind in ("ratios", "seconds"):
                for figure, of in told.get(kind, {}).items() if isinstance(told.get(kind), dict) else ():
                    of = of if isinstance(of, dict) else {"median": of, "min": "", "max": ""}
                    lines += [f"| {name} | {figure}, {kind} | {of['median']} | {of['min']} | {of['max']} |"]
            for figure, peak in told.get("peak_memory_gib", {}).items():
                lines += [f"| {name} | {figure}, peak GiB | {peak} | | |"]
        lines += [""]
    if "training" in found:
        lines += ["## Training", "", "| task | seconds | mean Dice |", "|---|---|---|"]
        for task, told in found["training"].items():
            scores = ", ".join(f"{model} {score}" for model, score in told.get("scores", {}).items())
            lines += [f"| {task} | {told['seconds']} | {scores or 'failed, see ' + told['log']} |"]
        lines += [""]
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(measure)
