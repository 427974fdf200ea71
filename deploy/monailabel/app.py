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
"""Builds the folder that MONAI Label serves: its own app for bundles, `main.py` of this folder, and the bundles.

Configs are as in the repository each time; models are copied once, for training at the server writes them. Prints the
names of the bundles that have models.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

BUNDLES = Path(__file__).resolve().parents[2] / "bundles"
SAMPLE = Path(sys.prefix) / "monailabel" / "sample-apps" / "monaibundle"
MODEL_SET = ("*.pt", "manifest.json", "scores.json")


def build_app(app: Path, models: dict[str, Path]) -> list[str]:
    """Make or refresh the app.

    Args:
        app: its folder.
        models: bundle -> folder with its models; a bundle that is not named takes its own ``models``.

    Returns:
        The names of the bundles that have models.
    """
    shutil.copytree(SAMPLE, app, dirs_exist_ok=True)
    (app / "main.py").replace(app / "sample.py")
    shutil.copyfile(Path(__file__).with_name("main.py"), app / "main.py")
    names = []
    for bundle in sorted(path.parents[1] for path in BUNDLES.glob("*/configs/metadata.json")):
        served, source = app / "model" / bundle.name, models.get(bundle.name, bundle / "models")
        for room in ("configs", "docs"):
            shutil.copytree(bundle / room, served / room, dirs_exist_ok=True)
        label_values(served / "configs" / "metadata.json")
        if not (served / "models").is_dir() and not copy_models(source, served / "models"):
            wanted = f"train it, or give --models {bundle.name}=DIR"
            print(f"{bundle.name} is not served: no model.pt in {source}; {wanted}", file=sys.stderr)
            continue
        names.append(bundle.name)
    return names


def copy_models(source: Path, target: Path) -> bool:
    """Copy a model set, all of it or nothing; False where there is none."""
    if not (source / "model.pt").is_file():
        return False
    part = target.with_name("models.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    began = time.time()
    for number, file in enumerate(path for pattern in MODEL_SET for path in source.glob(pattern)):
        shutil.copyfile(file, part / file.name)
        os.utime(part / file.name, (began - number,) * 2)  # the server distinguishes models by their time alone
    part.rename(target)
    return True


def label_values(metadata_file: Path) -> None:
    """Name the values of a mask, not the channels of the network, which is how the server's viewers read the metadata.

    Where targets overlap, the network has no channel for the background, and the k-th target is coded as k + 1.
    """
    metadata = json.loads(metadata_file.read_text(encoding="utf-8"))
    pred = next(iter(metadata["network_data_format"]["outputs"].values()))
    names = pred["channel_def"]
    if "background" not in names.values():
        pred["channel_def"] = {"0": "background", **{str(int(channel) + 1): name for channel, name in names.items()}}
        metadata_file.write_text(json.dumps(metadata, indent=4), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--app", type=Path, required=True)
    parser.add_argument("--models", action="append", default=[], metavar="BUNDLE=DIR")
    given = parser.parse_args()
    models = {name: Path(folder) for name, _, folder in (text.partition("=") for text in given.models)}
    for name, folder in models.items():
        if not (BUNDLES / name).is_dir():
            sys.exit(f"error: --models wants BUNDLE=DIR, and no bundle is called '{name}'.")
        if not (folder / "model.pt").is_file():
            sys.exit(f"error: no model.pt in {folder}, where the models of {name} should be.")
    names = build_app(given.app, models)
    if not names:
        sys.exit("error: no bundle has models: train one first, or give a folder with --models BUNDLE=DIR.")
    print(",".join(names))


if __name__ == "__main__":
    main()
