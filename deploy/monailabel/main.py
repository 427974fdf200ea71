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
"""The app that MONAI Label serves: its own app for bundles (`sample.py` beside this file), with three additions.

A wrong request is answered by a status of 400 to 499 with the reason; a strategy of active learning gives the scan
whose mask needs review most; and a scoring method holds the masks of the models against the corrected ones.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.exception import ImageNotFoundException, MONAILabelException
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.tasks.infer.bundle import BundleInferTask
from PIL import Image

from shared_iopfl.utils.errors import root_input_error

QUALITY = "quality"


def _sample() -> Any:
    """MONAI Label's app for bundles, whatever the working folder."""
    spec = importlib.util.spec_from_file_location("monaibundle_sample", Path(__file__).with_name("sample.py"))
    if spec is None or spec.loader is None:
        raise ImportError("sample.py, MONAI Label's own app for bundles, is not beside this file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sample = _sample()


class QualityInferTask(BundleInferTask):
    """Inference that adds the quality of a mask, the agreement of the views of its scan, to the answer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._served = threading.local()
        super().__init__(*args, **kwargs)

    def inferer(self, data: dict[str, Any] | None = None) -> Any:
        """The bundle's inferer with reports of its own, as others may be served at the same time."""
        inferer = copy.copy(super().inferer(data))
        self._served.reports = inferer.reports = deque(maxlen=1)
        return inferer

    def __call__(self, request: dict[str, Any], callbacks: Any = None) -> tuple[str | None, dict[str, Any]]:
        """The mask's file, and the answer."""
        self._served.reports = ()
        file, answer = super().__call__(request, callbacks)
        for report in self._served.reports:
            if QUALITY in report:
                answer[QUALITY] = round(float(report[QUALITY]), 4)
        return file, answer


sample.BundleInferTask = QualityInferTask


class Review(Strategy):
    """The scan without a corrected mask whose mask has the lowest quality; those without a quality come last."""

    def __init__(self) -> None:
        super().__init__("the scan whose mask has the lowest quality, as far as it was segmented")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """The scan's id."""
        images = datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels"))
        quality = {image: datastore.get_image_info(image).get(QUALITY, math.inf) for image in images}
        return {"id": min(images, key=lambda image: (quality[image], image))} if images else None


class Dice(ScoringMethod):
    """Dice of the masks of a model against the corrected ones: the mean over the values of a mask."""

    def __init__(self) -> None:
        super().__init__("Dice of the masks tagged 'original' against those tagged 'final', scan by scan")

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, float]:
        """Scan -> Dice, which is also kept with the scan."""
        tags = (request.get("y", DefaultLabelTag.FINAL), request.get("y_pred", DefaultLabelTag.ORIGINAL))
        found = {}
        for image in datastore.list_images():
            labels = [(datastore.get_label_by_image_id(image, tag), tag) for tag in tags]
            if all(label for label, _ in labels):
                truth, predicted = (_mask(Path(datastore.get_label_uri(*label))) for label in labels)
                if truth.shape == predicted.shape and truth.any():
                    found[image] = _dice(truth, predicted)
                    datastore.update_image_info(image, {"dice": found[image]})
        return found


def _mask(path: Path) -> np.ndarray:
    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"):
        with Image.open(path) as picture:
            return np.asarray(picture)
    return np.squeeze(np.asarray(nib.load(path).dataobj))


def _dice(truth: np.ndarray, predicted: np.ndarray) -> float:
    values = [value for value in np.unique(truth) if value]
    both = [((truth == value) & (predicted == value)).sum() for value in values]
    sizes = [(truth == value).sum() + (predicted == value).sum() for value in values]
    return float(np.mean([2 * common / size for common, size in zip(both, sizes)]))


@contextmanager
def _answered() -> Iterator[None]:
    """Answer what is wrong with a request by its reason; what is wrong with the server stays an error of the server."""
    try:
        yield
    except HTTPException:
        raise
    except MONAILabelException as error:
        status = 404 if isinstance(error, ImageNotFoundException) else 400
        raise HTTPException(status, str(error.msg)) from error
    except Exception as error:
        fault = root_input_error(error)
        if fault is None:
            raise
        raise HTTPException(422, str(fault)) from error


def _known(kind: str, name: Any, names: Any) -> None:
    if name not in names:
        raise HTTPException(404, f"no {kind} '{name}': there is {', '.join(sorted(names)) or 'none'}.")


class App(sample.MyApp, MONAILabelApp):  # MONAI Label looks for the name of its class among the direct bases
    """MONAI Label's app for bundles, with the additions of this module."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        super().__init__(app_dir, studies, conf)
        self._auto_update_scoring = False  # else each label and each question for a scan starts a process that scores

    def init_strategies(self) -> dict[str, Strategy]:
        """By name; "review" besides MONAI Label's own."""
        return {**super().init_strategies(), "review": Review()}

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """By name; "dice" besides MONAI Label's own."""
        return {**super().init_scoring_methods(), "dice": Dice()}

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """The mask of a scan; its quality is kept with the scan."""
        store, image = datastore or self.datastore(), request.get("image")
        _known("model", request.get("model"), self._infers)
        file = request.get("model_filename")
        if isinstance(file, str):
            _known("model_filename", file, self._infers[request["model"]].info()["config"]["model_filename"])
        is_stored = isinstance(image, str) and not Path(image).exists()
        if is_stored and not store.get_image_uri(image):
            raise HTTPException(404, f"no scan '{image}' at this server: send a file, or ask /datastore/ for the ids.")
        with _answered():
            answer = super().infer(request, datastore)
        if is_stored and QUALITY in answer["params"]:
            store.update_image_info(image, {QUALITY: answer["params"][QUALITY]})
        return answer

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """The scan to label next."""
        _known("strategy", request.get("strategy") or "random", self._strategies)
        with _answered():
            return super().next_sample(request)
