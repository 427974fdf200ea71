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
"""What a federation costs over plain training loops, how much of them is data loading, and how much memory it takes."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import fire
import torch
from monai.bundle import ConfigParser
from torch import Tensor

from benchmarks.networks import agree
from benchmarks.timing import alternate, machine, now, peak_memory, print_peak, spread
from shared_iopfl.data.phantoms.sites import make_fundus_sites, make_prostate_sites
from shared_iopfl.federation.simulation import Federation, SiteClient
from shared_iopfl.handlers.rounds import RoundHandler
from shared_iopfl.utils.config_values import Expression

__all__ = ["measure"]

Task = Literal["prostate", "fundus"]
BUNDLES = Path(__file__).parents[1] / "bundles"
VOLUME_SLICES = 24


class _BareSite:
    """A site's training as a plain PyTorch loop, on the very objects that its client uses.

    Attributes:
        loading: seconds that :meth:`train` has spent waiting for batches; on CUDA, the device computes meanwhile.
    """

    def __init__(self, client: SiteClient, device: torch.device) -> None:
        parser: ConfigParser = client.algo.train_workflow.parser  # type: ignore[union-attr]
        self.loader = parser.get_parsed_content("train#dataloader")
        self.network = parser.get_parsed_content("network")
        self.loss = parser.get_parsed_content("loss")
        self.optimizer = parser.get_parsed_content("optimizer")
        self.amp = bool(parser.get_parsed_content("amp"))
        self.bf16 = bool(parser.get_parsed_content("bf16"))
        self.device = device
        self.loading = 0.0

    def train(self, weights: dict[str, Tensor], epoch: int = 0, seed: int = 0) -> dict[str, Tensor]:
        """One round from the global weights; returns the local ones."""
        state: Any = SimpleNamespace(epoch=epoch, dataloader=self.loader)
        RoundHandler(self.optimizer, seed).start(SimpleNamespace(state=state))  # type: ignore[arg-type]
        self.network.load_state_dict(weights)
        self.network.train()
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp)
        began = now()
        for batch in self.loader:
            self.loading += now() - began
            images, labels = (batch[key].to(self.device, non_blocking=True) for key in ("image", "label"))
            self.optimizer.zero_grad()
            kind = torch.bfloat16 if self.bf16 else None
            with torch.autocast(self.device.type, dtype=kind, enabled=self.amp or self.bf16):
                loss = self.loss(self.network(images).float(), labels)
            scaler.scale(loss).backward()
            scaler.step(self.optimizer)
            scaler.update()
            began = now()
        return {key: tensor.cpu().clone() for key, tensor in self.network.state_dict().items()}


def _federation(
    folder: str, task: Task, sites: int, cases: int, size: int, overrides: dict[str, Any], **options: Any
) -> Federation:
    """A federation on synthetic scans, resized to `size` pixels a side, ready to run."""
    names = tuple("ABCDEF"[:sites])
    if task == "prostate":
        make_prostate_sites(Path(folder) / "sites", names, cases, (96, 96, VOLUME_SLICES))
    else:
        make_fundus_sites(Path(folder) / "sites", names, cases)
    # as federate.json has it: the federation validates, not the site's trainer
    quiet = {"val_interval": 0, "save_checkpoints": False, "verbose": False}
    common = {"dataset_dir": f"{folder}/sites", "image_size": size, **quiet}
    federation = Federation(
        str(BUNDLES / f"{task}_iopfl"),
        list(names),
        output_dir=Path(folder),
        overrides={**common, **overrides},
        **options,
    )
    federation.start()
    return federation


def measure(
    device: str = "cpu",
    task: Task = "prostate",
    sites: int = 2,
    cases: int = 4,
    image_size: int = 384,
    features: int = 32,
    passes: int = 1,
    bf16: bool = False,
    recompute: bool = False,
    repeats: int = 3,
    memory: bool = False,
) -> dict[str, Any]:
    """Time rounds of a federation on synthetic scans, or measure the memory of one of 6 sites with 20 cases each.

    Args:
        device: "cpu" or "cuda".
        task: the bundle: "prostate" or "fundus".
        sites, cases: how many; half of a site's cases are for training.
        image_size, features: of scans, slices and network.
        passes: over a site's cases a round, in batches of the bundle's size.
        bf16: train in bfloat16.
        recompute: train with activation checkpointing; the plain loops do not.
        repeats: timed pairs.
        memory: time nothing; measure host memory instead: that of the sites with their "data" cached, and that of a
            "round" with one step a site on top. Of the sizes above it takes `image_size` and `features`.
    """
    if task not in get_args(Task):
        sys.exit(f"error: unknown task '{task}': choose one of {', '.join(get_args(Task))}.")
    place = torch.device(device)
    settings = {"task": task, "image_size": image_size, "features": features, "bf16": bf16, "recompute": recompute}
    if memory:
        arguments = [device, task, str(image_size), str(features), str(bf16), str(recompute)]
        peak = {
            name: peak_memory("benchmarks.training", *arguments, str(rounds))
            for name, rounds in (("data", 0), ("round", 1))
        }
        return {"ratios": {}, "peak_memory_gib": peak, "settings": settings, **machine(place)}
    overrides = {
        "device": device,
        "fractions": [0.5, 0.25, 0.25],
        "features": features,
        "passes": passes,
        "bf16": bf16,
        "recompute": recompute,
    }
    with tempfile.TemporaryDirectory() as folder:
        federation = _federation(folder, task, sites, cases, image_size, overrides, rounds=repeats + 2, val_interval=0)
        bare = {site: _BareSite(client, place) for site, client in federation.clients.items()}
        first, client = dict(federation.weights), next(iter(federation.clients.values()))
        before = client.state_dict()
        ours = client.train(first)
        client.load_state_dict(before)  # the learning rate with it
        plain = bare[client.site].train(first)
        differences = {"weights": max(agree(ours[key], plain[key]) for key in ours if ours[key].is_floating_point())}
        shares = []

        def loops() -> None:
            began, waited = now(), sum(alone.loading for alone in bare.values())
            for alone in bare.values():
                alone.train(first)
            waited = sum(alone.loading for alone in bare.values()) - waited
            shares.append(waited / (now() - began))

        timed = alternate(federation.run_round, loops, place, repeats)
    return {
        "ratios": {"round_over_loops": timed["ratio"], "loading_share": spread(shares[-repeats:])},
        "seconds": {"round": timed["seconds"], "loops": timed["seconds_of_other"]},
        "differences": differences,
        "settings": {**settings, "sites": sites, "cases": cases, "passes": passes, "repeats": repeats},
        **machine(place),
    }


def memory(device: str, task: Task, image_size: int, features: int, bf16: bool, recompute: bool, rounds: int) -> None:
    """So many rounds of one step at each of 6 sites with 20 cases; print the peak. A process of its own."""
    one_batch = {"train#dataloader#sampler#num_samples": Expression("@batch_size")}
    overrides = {"device": device, "features": features, "bf16": bf16, "recompute": recompute, **one_batch}
    with tempfile.TemporaryDirectory() as folder:
        federation = _federation(folder, task, 6, 20, image_size, overrides, rounds=1, val_interval=0)
        for _ in range(rounds):
            federation.run_round()
        print_peak(torch.device("cpu"))  # host memory, whatever the device


if __name__ == "__main__":
    fire.Fire(memory)
