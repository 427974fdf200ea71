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
"""A handler that makes the training of a site fail once, for processes that a test cannot change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from torch import nn


class Fault:
    """Makes a site fail at the end of an epoch, the first time that the site reaches it.

    Args:
        network: what the site trains.
        site: the site.
        plan: site -> its epoch -> "raise", "kill" (the process), "hang" or "nan" (in what it sends).
        folder: where it is noted what has gone wrong.
    """

    def __init__(self, network: nn.Module, site: str, plan: Mapping[str, Mapping[str, str]], folder: str) -> None:
        self.network, self.site, self.plan, self.folder = network, site, plan, Path(folder)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        fault = self.plan.get(self.site, {}).get(str(engine.state.epoch))
        mark = self.folder / f"{self.site}_{engine.state.epoch}_{fault}"
        if fault is None or mark.exists():
            return
        mark.touch()
        if fault == "raise":
            raise RuntimeError("the disk with Case00.nii.gz has gone")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(3600)
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.fill_(torch.nan)


def faulty_bundle(bundle: Path, folder: Path, plan: Mapping[str, Mapping[str, str]]) -> Path:
    """Copy a bundle, with sites that fail as planned."""
    copy = folder / bundle.name
    shutil.copytree(bundle / "configs", copy / "configs")
    (folder / "gone_wrong").mkdir()
    path = copy / "configs" / "train.json"
    config = json.loads(path.read_text())
    fault = {"_target_": "faulty_sites.Fault", "network": "@network", "site": "@site"}
    config["train"]["handlers"].append({**fault, "plan": plan, "folder": str(folder / "gone_wrong")})
    path.write_text(json.dumps(config))
    return copy
