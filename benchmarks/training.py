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
"""What a federated round costs over its sites' bare training loops, and how much of a step is data loading."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor

from benchmarks.networks import agree
from benchmarks.timing import alternate, machine, spread
from shared_iopfl.federation import Federation, SiteClient
from shared_iopfl.handlers import RoundHandler
from shared_iopfl.phantoms import make_prostate_sites

__all__ = ["measure"]

BUNDLE = Path(__file__).parents[1] / "bundles" / "prostate_iopfl"


class _BareSite:
    """A site's training as a plain PyTorch loop, on the very objects that its client uses."""

    def __init__(self, client: SiteClient, device: torch.device) -> None:
        parser: ConfigParser = client.algo.train_workflow.parser  # type: ignore[union-attr]
        self.loader = parser.get_parsed_content("train#dataloader")
        self.network = parser.get_parsed_content("network")
        self.loss = parser.get_parsed_content("loss")
        self.optimizer = parser.get_parsed_content("optimizer")
        self.amp = bool(parser.get_parsed_content("amp"))
        self.bf16 = bool(parser.get_parsed_content("bf16"))
        self.device = device

    def train(self, weights: dict[str, Tensor], epoch: int = 0, seed: int = 0) -> dict[str, Tensor]:
        """One round from the global weights; returns the local ones."""
        state: Any = SimpleNamespace(epoch=epoch, dataloader=self.loader)
        RoundHandler(self.optimizer, seed).start(SimpleNamespace(state=state))  # type: ignore[arg-type]
        self.network.load_state_dict(weights)
        self.network.train()
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp)
        for batch in self.loader:
            images, labels = (batch[key].to(self.device, non_blocking=True) for key in ("image", "label"))
            self.optimizer.zero_grad()
            kind = torch.bfloat16 if self.bf16 else None
            with torch.autocast(self.device.type, dtype=kind, enabled=self.amp or self.bf16):
                loss = self.loss(self.network(images).float(), labels)
            scaler.scale(loss).backward()
            scaler.step(self.optimizer)
            scaler.update()
        return {key: tensor.cpu().clone() for key, tensor in self.network.state_dict().items()}

    def load(self) -> None:
        """Read and augment a round's batches, and no more."""
        for _ in self.loader:
            pass


def measure(
    device: str = "cpu",
    sites: int = 2,
    cases: int = 6,
    image_size: int = 384,
    features: int = 32,
    passes: int = 1,
    bf16: bool = False,
    repeats: int = 3,
) -> dict[str, Any]:
    """Time rounds of a federation on synthetic prostates.

    Args:
        device: "cpu" or "cuda".
        sites, cases: how many; half of a site's cases are for training.
        image_size, features: of slices and network.
        passes: over a site's cases a round, in steps of 16 slices.
        bf16: train in bfloat16.
        repeats: timed pairs.
    """
    place = torch.device(device)
    names = tuple("ABCDEF"[:sites])
    with tempfile.TemporaryDirectory() as folder:
        make_prostate_sites(Path(folder) / "sites", sites=names, cases=cases)
        federation = Federation(
            str(BUNDLE),
            names,
            rounds=repeats + 2,
            output_dir=folder,
            overrides={
                "dataset_dir": f"{folder}/sites",
                "device": device,
                "fractions": [0.5, 0.25, 0.25],
                "image_size": image_size,
                "features": features,
                "passes": passes,
                "bf16": bf16,
                "verbose": False,
                "save_checkpoints": False,
            },
            val_interval=0,
        )
        federation.start()
        bare = {site: _BareSite(client, place) for site, client in federation.clients.items()}
        first = dict(federation.weights)
        differences = {}
        for site in names[:1]:
            before = federation.clients[site].state_dict()
            ours = federation.clients[site].train(first)
            federation.clients[site].load_state_dict(before)  # the learning rate with it
            plain = bare[site].train(first)
            differences[site] = max(agree(ours[key], plain[key]) for key in ours if ours[key].is_floating_point())

        def loops() -> None:
            for alone in bare.values():
                alone.train(first)

        timed = alternate(federation.run_round, loops, place, repeats)
        shares = []
        for _ in range(repeats):
            began = time.perf_counter()
            for alone in bare.values():
                alone.load()
            shares.append((time.perf_counter() - began) / timed["seconds_of_other"]["median"])
    return {
        "ratios": {"round_over_loops": timed["ratio"], "loading_share": spread(shares)},
        "seconds": {"round": timed["seconds"], "loops": timed["seconds_of_other"]},
        "differences": differences,
        "settings": {
            "sites": sites,
            "cases": cases,
            "image_size": image_size,
            "features": features,
            "passes": passes,
            "bf16": bf16,
            "repeats": repeats,
        },
        **machine(place),
    }
