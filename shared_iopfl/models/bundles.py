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
"""The folders of the bundles: in a checkout, beside an installed package, or around the code of a packed bundle."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.names import nearest

METADATA = Path("configs") / "metadata.json"
SUFFIX = "_iopfl"  # end of the name of a bundle's folder; the beginning is the task


def own_bundles() -> dict[str, Path]:
    """Find the bundles that come with the package: task -> folder."""
    above = Path(__file__).parents
    packed = [above[3]] if above[2].name == "scripts" else []  # the code is in a packed bundle
    # in a checkout, and where pip puts them with --target
    beside = [above[2] / "bundles", above[2] / "share" / "shared_iopfl" / "bundles"]
    found = [*packed, *(folder for place in beside for folder in sorted(place.glob(f"*{SUFFIX}")))] or _installed()
    return {folder.name.removesuffix(SUFFIX): folder for folder in found if (folder / METADATA).is_file()}


def _installed() -> list[Path]:
    """The bundles that an installation has put beside the package."""
    try:
        listed = files("shared_iopfl") or []
    except PackageNotFoundError:
        return []
    return [Path(str(file.locate())).resolve().parents[1] for file in listed if file.parts[-2:] == METADATA.parts]


def find_bundle(bundle: str | Path) -> Path:
    """Find the folder of a bundle.

    Args:
        bundle: Task (``prostate``), name of a bundle that comes with the package (``prostate_iopfl``), or folder of a
            bundle. As with any MONAI bundle, the configs of such a folder are run as code.

    Raises:
        InputError: If there is no such bundle.
    """
    own = own_bundles()
    name = str(bundle)
    if (folder := own.get(name.removesuffix(SUFFIX))) is not None:
        return folder
    if (Path(bundle) / METADATA).is_file():
        return Path(bundle).resolve()
    tasks = ", ".join(own) or "none"
    raise InputError(f"no bundle {name!r}{nearest(name, [*own])}; give a task ({tasks}) or the folder of a bundle.")
