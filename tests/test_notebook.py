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
"""The tutorial runs from its first cell to its last, and is kept without outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "iopfl_tutorial.ipynb"


def test_it_is_kept_without_outputs() -> None:
    """So that no picture of a scan is ever committed with it."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    assert [cell.source for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both bundles, inside and outside: models, masks and routes, and a picture for each that was promised."""
    monkeypatch.setenv("MONAI_DATA_DIRECTORY", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (training,) = [cell for cell in notebook.cells if cell.source.startswith("SIZE = ")]
    # minutes on two tasks; so briefly trained, all sites would keep the global model
    shorter, changes = re.subn(r'"(rounds|passes)": \d+', r'"\1": 2', training.source)
    training.source = shorter.replace("shares=[0.5, 1.0]", "shares=[]")
    assert changes == 4 and training.source != shorter
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
    for task in ("prostate", "fundus"):
        run = tmp_path / task
        models = {path.name for path in (run / "inside" / "models").glob("*.pt")}
        assert models == {"model.pt", "model_A.pt", "model_B.pt", "model_C.pt"}
        assert (run / "inside" / "report.html").is_file()
        routes = json.loads((run / "routed" / "routes.json").read_text())
        # a site that keeps the global model adds no expert
        assert routes["experts"][0] == "global" and 2 <= len(routes["experts"]) <= 4
        assert len(routes["cases"]) == len(
            [path for path in (run / "global").iterdir() if path.suffix in (".gz", ".png")]
        )
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert printed.count("mean Dice") == 4
