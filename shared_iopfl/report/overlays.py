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
"""Overlays of inference: for each mask a picture of the scan with the outline of the mask."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

from shared_iopfl.data.scan_names import case_name, source_of
from shared_iopfl.report import pictures
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import whole_file

logger = logging.getLogger(__name__)
LONGEST_NAME = 255  # bytes, on every common disk
COLOURS = {**pictures.colours(()), "mask": pictures.colours(())["routed"]}


class SaveOverlayd(MapTransform):
    """Write ``<case>_overlay.png``: a scan with the outline of its mask, as in the report.

    Place it after `SaveMaskd`, which adds the file names to the data. For a volume, the axial slice with the largest
    mask area is shown in radiological convention, or the middle slice if the mask is empty. A 2D picture is shown
    whole, with every class outlined. The picture contains nothing from the scan's header; only the file name names the
    case. If a picture cannot be drawn, a warning is logged and the mask is kept.

    Args:
        keys: Keys of the masks; ``<key>_file`` in the data is the mask that was written.
        image_key: Key of the image, whose metadata names the scan.
        output_dir: Folder to write to; it is created if it does not exist.

    Raises:
        InputError: If the picture would replace the scan, or cannot be written.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        image_key: str = "image",
        output_dir: str | os.PathLike = ".",
    ) -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.output_dir = Path(output_dir)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the pictures and return the data unchanged."""
        d = dict(data)
        for key in self.key_iterator(d):
            self._save(source_of(d, self.image_key, key)[0], Path(d[f"{key}_file"]))
        return d

    def _save(self, scan: Path, mask: Path) -> None:
        case = case_name(mask)
        target = self.output_dir / f"{case}_overlay.png"
        if len(os.fsencode(target.name)) > LONGEST_NAME:
            logger.warning("no overlay of %s: its name would be too long", case)
            return
        if target.exists() and scan.exists() and target.samefile(scan):
            raise InputError(f"the overlay {target} would replace the scan itself: choose another output_dir")
        try:
            views = pictures.case_views(pictures.load_case(scan, {"mask": mask}), "mask", case)
            drawn = pictures.png(pictures.overlay_picture(views, "mask", COLOURS, columns=1))
        except ValueError as error:
            logger.warning("no overlay of %s: %s", case, error)
            return
        with whole_file(target) as temporary:
            temporary.write_bytes(drawn)
