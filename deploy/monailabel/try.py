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
"""Talks to the server that `serve.sh` started, as a viewer does: by MONAI Label's own client, over HTTP.

Run by the Python of the environment that `serve.sh` made: ``.venv-monailabel/bin/python deploy/monailabel/try.py
infer prostate_iopfl scan.nii.gz``. ``--help`` names the commands; ``--url`` says where the server is.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fire
import requests
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

POLL_SECONDS = 1.0


class Commands:
    """What a viewer asks of the server.

    Args:
        url: where the server is.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000") -> None:
        self._url = url.rstrip("/")
        self._folder = tempfile.TemporaryDirectory()
        self._client = MONAILabelClient(self._url, tmpdir=self._folder.name)

    def info(self) -> dict[str, Any]:
        """What is served: for each model its labels and the model files to choose from; how many scans there are."""
        info = self._client.info()
        models = {
            name: {"labels": model["labels"], "model_filename": sorted(model["config"]["model_filename"])}
            for name, model in info["models"].items()
        }
        return {"models": models, "trainers": sorted(info["trainers"]), "scans": info["datastore"]["total"]}

    def infer(self, model: str, scan: str, output: str = "", model_filename: str = "") -> dict[str, Any]:
        """Have a scan segmented.

        Args:
            model: such as prostate_iopfl.
            scan: a file, which is sent; or the id of one of the server's scans (its name without ending).
            output: where the mask goes; by default beside where the command runs, named after the scan.
            model_filename: such as model_SITE.pt, for that site's personalised model. By default the scan is routed
                through the space of all models.
        """
        sent = Path(scan).is_file()
        params: dict[str, Any] = {"model_filename": model_filename} if model_filename else {}
        if Path(scan).suffix.lower() in (".jpg", ".jpeg"):
            params["result_extension"] = ".png"  # the server would write the mask as the scan came, and JPEG blurs it
        mask, answer = self._client.infer(model, "" if sent else scan, params, file=scan if sent else None)
        if not output:
            name = Path(scan).name.split(".")[0] if sent else scan
            output = f"{name}_mask{''.join(Path(mask).suffixes)}"
        shutil.move(mask, output)
        return {"mask": output, "labels": answer["label_names"], "seconds": answer["latencies"]["total"]}

    def next(self, strategy: str = "review") -> dict[str, Any]:
        """The scan to label next, and its quality where it was segmented.

        Args:
            strategy: "review": the lowest quality; "first"; "random".
        """
        scan = self._client.next_sample(strategy, {})
        return {name: scan[name] for name in ("id", "quality") if name in scan}

    def batch(self, model: str, *scans: str, model_filename: str = "") -> dict[str, Any]:
        """Have the server's own scans segmented and the masks kept there, under the tag "original".

        Args:
            model: such as prostate_iopfl.
            scans: their ids; none: all that the server has, which must then be of one kind.
            model_filename: as for infer.
        """
        # one after another: MONAI Label reads a bundle's config when it first needs it, and two at once trip over it
        params: dict[str, Any] = {"multi_gpu": False, "max_workers": 1, "label_tag": "original"}
        params.update({"images": list(scans)} if scans else {})
        params.update({"model_filename": model_filename} if model_filename else {})
        answer = requests.post(f"{self._url}/batch/infer/{model}", json=params, timeout=60)
        answer.raise_for_status()
        return self._finished("batch/infer")

    def mask(self, scan: str, output: str, tag: str = "original") -> str:
        """Fetch a mask that the server keeps: "original" as a model made it, "final" as a person corrected it."""
        shutil.move(self._client.download_label(scan, tag), output)
        return output

    def label(self, scan: str, mask: str) -> dict[str, Any]:
        """Give the server the final mask of one of its scans, to train on."""
        return self._client.save_label(scan, mask, tag="final")

    def train(self, model: str, **settings: Any) -> dict[str, Any]:
        """Train on the scans with final masks, and wait; from then on model.pt is the new one.

        Args:
            model: such as prostate_iopfl.
            settings: MONAI Label's own, such as max_epochs (50) and val_split (0.2, the part kept for validation).
        """
        self._client.train_start(model, {"multi_gpu": False, **settings})
        return self._finished("train/")

    def _finished(self, task: str) -> dict[str, Any]:
        while True:
            status = requests.get(f"{self._url}/{task}", timeout=60).json()
            if status["status"] not in ("SUBMITTED", "RUNNING"):
                break
            time.sleep(POLL_SECONDS)
        if status["status"] != "DONE":
            raise SystemExit("\n".join([*status["details"], f"error: the server's task ended as {status['status']}."]))
        return {"status": status["status"], "started": status["start_ts"], "ended": status["end_ts"]}


if __name__ == "__main__":
    try:
        fire.Fire(Commands, name="try.py")
    except (MONAILabelClientException, requests.RequestException, OSError) as error:
        sys.exit(f"error: {getattr(error, 'msg', error)}")
