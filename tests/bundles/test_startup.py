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
"""What an inference imports: beside MONAI itself nothing that takes seconds, as a mask needs none of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from shared_iopfl.data.phantoms.sites import make_prostate_sites

BUNDLES = Path(__file__).parents[2] / "bundles"
# pictures, other formats, curves, federations, experiment tracking, torch's compiler
HEAVY = ("matplotlib", "itk", "tensorboard", "nvflare", "mlflow", "torch._inductor", "torch._dynamo", "torch.onnx")
# MONAI imports some of them itself, as far as they are installed: only what comes on top is the bundle's doing
# The page of an inference is drawn when all masks are written: it is left out here.
CODE = """
import json, sys, types
import monai.bundle
page = types.ModuleType("page")
page.write_inference_report = lambda *args: None
sys.modules["shared_iopfl.report.inference.page"] = page
before = set(sys.modules)
monai.bundle.run(**json.loads(sys.argv[1]))
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_an_inference_imports_nothing_that_a_mask_does_not_need(
    tmp_path: Path, random_models: Callable[..., Path]
) -> None:
    bundle = "prostate_iopfl"
    make_prostate_sites(tmp_path / "sites", sites=("E",), cases=1, size=(32, 32, 8))
    options = {
        "config_file": str(BUNDLES / bundle / "configs" / "inference.json"),
        "bundle_root": str(BUNDLES / bundle),
        "dataset_dir": str(tmp_path / "sites" / "E"),
        "ckpt_dir": str(random_models(tmp_path / "models", bundle)),
        "output_dir": str(tmp_path / "masks"),
        **{"image_size": 32, "features": 4, "device": "cpu", "empty_masks": "allow", "overlays": False},
    }
    command = [sys.executable, "-c", CODE, json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    told = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert told.returncode == 0, told.stderr[-2000:]
    imported = json.loads(told.stdout.splitlines()[-1])
    assert "shared_iopfl.inferers.routing" in imported
    heavy = [name for name in imported if name in HEAVY or name.startswith(tuple(f"{one}." for one in HEAVY))]
    assert not heavy, f"imported beside MONAI: {', '.join(heavy[:5])}"
    assert any((tmp_path / "masks").rglob("*.nii.gz"))
