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
"""A client of a MONAI Label server, written from MONAI Label's documentation alone: it knows nothing of this project.

Run by ``test_monailabel_plain.py``, in MONAI Label's environment, as

    python third_party_label.py URL MODEL FOLDER SCAN SCAN [LABEL LABEL]

It keeps the masks in FOLDER under what was asked, with ``answers.json``; with labels it has the server train on them.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import requests
from monailabel.client import MONAILabelClient


def main(url: str, model: str, folder: str, *files: str) -> None:
    client = MONAILabelClient(url, tmpdir=folder)
    scans, labels = files[:2], files[2:]
    suffix = "".join(Path(scans[0]).suffixes)

    def infer(name: str, image: str = "", params: dict[str, Any] | None = None, **source: str) -> dict[str, Any]:
        mask, answer = client.infer(model, image, params or {}, **source)
        shutil.move(mask, Path(folder) / f"{name}{(params or {}).get('result_extension', suffix)}")
        return answer

    offered = client.info()["models"][model]
    first, second = (client.upload_image(scan, Path(scan).name[: -len(suffix)])["image"] for scan in scans)
    infer("first", first)
    answers = {"offered": offered, "answer": infer("second", second)}
    infer("sent", file=scans[0])
    infer("session", session_id=client.create_session(scans[0])["session_id"])
    infer("chosen", first, {"model_filename": offered["config"]["model_filename"][-1]})
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(infer, ("first_at_once", "second_at_once"), (first, second)))
    if suffix != ".png":
        infer("slicer", first, {"result_extension": ".nrrd"})
    if labels:
        requests.post(f"{url}/batch/infer/{model}", json={"multi_gpu": False}, timeout=60).raise_for_status()
        while (batch := requests.get(f"{url}/batch/infer", timeout=60).json())["status"] in ("SUBMITTED", "RUNNING"):
            time.sleep(1)
        shutil.move(client.download_label(first, "original"), Path(folder) / f"batch{suffix}")
        for image, label in zip((first, second), labels):
            client.save_label(image, label, tag="final")
        client.train_start(model, {"max_epochs": 1, "multi_gpu": False})
        while (train := client.train_status())["status"] in ("SUBMITTED", "RUNNING"):
            time.sleep(1)
        answers.update(batch=batch["status"], train=train["status"])
        infer("trained", first)
    (Path(folder) / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
