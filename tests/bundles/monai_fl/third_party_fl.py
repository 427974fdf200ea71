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
"""A federation written from MONAI's documentation alone: it knows a bundle's folder and nothing of what is in it.

Two clients, plain averaging of weight differences. Run by ``test_monai_fl.py`` as

    python third_party_fl.py BUNDLE DATA FOLDER CLIENT CLIENT

with the overrides of the bundle's configs as JSON on the standard input; it writes ``FOLDER/metrics.json``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, WeightType
from monai.fl.utils.exchange_object import ExchangeObject

ROUNDS = 2


def main(bundle: str, dataset_dir: str, folder: str, *names: str) -> None:
    options = {"dataset_dir": dataset_dir, **json.load(sys.stdin)}
    clients = {}
    for name in names:  # each has the app in a folder of its own, as a federated system provides it
        shutil.copytree(bundle, Path(folder) / name / "app")
        clients[name] = MonaiAlgo(bundle_root="app", train_kwargs=dict(options), eval_kwargs=dict(options))
        clients[name].initialize({ExtraItems.CLIENT_NAME: name, ExtraItems.APP_ROOT: str(Path(folder) / name)})

    parser = ConfigParser()
    parser.read_config(str(Path(bundle) / "configs" / "train.json"))
    parser.update(options)
    weights = parser.get_parsed_content("network_def").state_dict()

    rounds = []
    for _ in range(ROUNDS):
        differences = []
        for client in clients.values():
            client.train(ExchangeObject(weights=weights))
            update = client.get_weights()
            assert update.weight_type == WeightType.WEIGHT_DIFF
            differences.append(update.weights)
        for key in weights:
            mean = torch.stack([difference[key].float() for difference in differences]).mean(dim=0)
            weights[key] = weights[key] + mean
        results = {name: client.evaluate(ExchangeObject(weights=weights)).metrics for name, client in clients.items()}
        rounds.append({"size": sum(float(mean.abs().sum()) for mean in differences[0].values()), "metrics": results})
    for client in clients.values():
        client.finalize()
    (Path(folder) / "metrics.json").write_text(json.dumps(rounds))


if __name__ == "__main__":
    main(*sys.argv[1:])
