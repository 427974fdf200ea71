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
"""From the start of ``python -m monai.bundle run`` to the first mask of one scan, against what no program can save.

No run of a bundle can do without ``import monai, torch`` and the forward passes; the ratio is to these.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fire
import torch
from monai.bundle import ConfigWorkflow

from benchmarks.accuracy import BUNDLES
from benchmarks.networks import make_experts, make_network
from benchmarks.timing import clock, machine, now, spread, use_clock
from shared_iopfl.data.phantoms.sites import make_prostate_sites

__all__ = ["measure"]


def _run(*command: str) -> tuple[float, str]:
    """Seconds that a process of its own takes, by the chosen clock, and what it prints."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    given = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return given if clock() == "process" else wall, done.stdout


def _options(folder: Path, device: str, image_size: int, features: int) -> dict[str, Any]:
    """What is set of the inference's config."""
    return {
        "bundle_root": str(BUNDLES / "prostate_iopfl"),
        "dataset_dir": str(folder / "sites" / "A"),
        "ckpt_dir": str(folder / "models"),
        "output_dir": str(folder / "masks"),
        "device": device,
        "image_size": image_size,
        "features": features,
        "empty_masks": "allow",  # the weights are random
        "overlays": False,
        "overwrite": True,
    }


def measure(
    device: str = "cpu", image_size: int = 128, features: int = 16, experts: int = 4, repeats: int = 3
) -> dict[str, Any]:
    """Time the inference of one synthetic scan of eight slices, in processes of their own, and its parts.

    Args:
        device: "cpu" or "cuda".
        image_size, features: of slices and network.
        experts: networks in the routing space, the global one among them.
        repeats: processes of each kind.
    """
    place = torch.device(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_prostate_sites(folder / "sites", ["A"], cases=1, size=(image_size, image_size, 8))
        for label in (folder / "sites").rglob("*segmentation*"):
            label.unlink()
        network = make_network(features, torch.device("cpu"))
        (folder / "models").mkdir()
        torch.save(network.state_dict(), folder / "models" / "model.pt")
        for index, state in enumerate(make_experts(network, experts - 1).values()):
            torch.save(state, folder / "models" / f"model_{chr(65 + index)}.pt")
        options = _options(folder, device, image_size, features)
        config = str(BUNDLES / "prostate_iopfl" / "configs" / "inference.json")
        command = ["-m", "monai.bundle", "run", f"--config_file={config}"]
        command += [f"--{key}={value}" for key, value in options.items()]
        ratios, wholes, imports, parts = [], [], [], []
        for _ in range(repeats):
            imports.append(_run("-c", "import monai, torch")[0])
            arguments = [name, device, str(image_size), str(features), clock()]
            parts.append(json.loads(_run("-m", "benchmarks.startup", *arguments)[1].splitlines()[-1]))
            wholes.append(_run(*command)[0])
            ratios.append(wholes[-1] / (imports[-1] + parts[-1]["again"]))
    seconds = {part: spread([one[part] for one in parts]) for part in parts[0]}
    return {
        "ratios": {"start_to_mask_over_imports_and_forwards": spread(ratios)},
        "seconds": {"start_to_mask": spread(wholes), "import_monai_torch": spread(imports), **seconds},
        "differences": {},
        "settings": {"image_size": image_size, "features": features, "experts": experts, "repeats": repeats},
        **machine(place),
    }


def print_parts(folder: str, device: str, image_size: int, features: int, clock_name: str = "wall") -> None:
    """The parts of an inference in this process, which has imported MONAI: print them as one JSON object.

    ``parsing``: the config and its checks; ``loading``: models and scan; ``first``: to the first mask, with the check
    of the network and the measurement of the scan; ``again``: the same scan once more, forward passes alone.
    """
    use_clock(clock_name)
    ticks = [_tick()]
    options = _options(Path(folder), device, image_size, features)
    config = Path(options["bundle_root"]) / "configs" / "inference.json"
    workflow = ConfigWorkflow(config_file=str(config), logging_file=False, workflow_type="inference", **options)
    workflow.initialize()
    ticks.append(_tick())
    get = workflow.parser.get_parsed_content
    network, inferer, scan = get("network"), get("inferer"), get("dataset")[0]["image"][None].to(device)
    network.eval()
    ticks.append(_tick())
    with torch.no_grad():
        for _ in range(2):
            inferer(scan, network)
            ticks.append(_tick())
    workflow.finalize()
    names = ("parsing", "loading", "first", "again")
    print(json.dumps({name: later - sooner for name, sooner, later in zip(names, ticks, ticks[1:])}))


def _tick() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return now()


if __name__ == "__main__":
    fire.Fire(print_parts)
