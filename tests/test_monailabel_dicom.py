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
"""MONAI Label's way from a mask to DICOM SEG, for masks that the prostate bundle writes of DICOM series."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from label_server import PYTHON, ROOT, VENV, needs_monailabel
from tiny_scans import dicom_series

from shared_iopfl.data.phantoms.sites import make_prostate_sites

pytestmark = [
    pytest.mark.slow,
    needs_monailabel,
    pytest.mark.skipif(not (VENV / "bin" / "itkimage2segimage").is_file(), reason="no dcmqi beside MONAI Label"),
]
CONVERT = """
import json, sys
import numpy as np, pydicom, pydicom_seg, SimpleITK as sitk
from monailabel.datastore.utils.convert import nifti_to_dicom_seg

series, mask = sys.argv[1:]
dataset = pydicom.dcmread(nifti_to_dicom_seg(series, mask, [{"name": "prostate", "model_name": "prostate_iopfl"}]))
grid = sitk.ReadImage(mask)
segment = pydicom_seg.SegmentReader().read(dataset).segment_image(1)
# in the mask's own grid, which may lie the other way round; no voxel lies between two
segment = sitk.Resample(segment, grid, sitk.Transform(), sitk.sitkNearestNeighbor, 0)
written, read = sitk.GetArrayFromImage(grid) > 0, sitk.GetArrayFromImage(segment) > 0
print(json.dumps({
    "series": dataset.ReferencedSeriesSequence[0].SeriesInstanceUID,
    "label": dataset.SegmentSequence[0].SegmentLabel,
    "voxels": int(written.sum()),
    "differ": int((written != read).sum()),
}))
"""


def test_mask_of_an_oblique_series_becomes_dicom_seg_voxel_by_voxel(tmp_path):
    make_prostate_sites(tmp_path / "sites", sites=["A"], cases=1)
    volume = nib.load(tmp_path / "sites" / "A" / "Case00.nii.gz").get_fdata().astype(np.int16)
    (tmp_path / "scans").mkdir()
    series = dicom_series(tmp_path / "scans" / "series", np.ascontiguousarray(volume.transpose(2, 1, 0)))
    segment = ["-m", "shared_iopfl", "segment", "prostate", str(tmp_path / "scans"), str(tmp_path / "masks")]
    subprocess.run([sys.executable, *segment], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    (mask,) = Path(tmp_path / "masks").glob("*.nii.gz")
    environment = {**os.environ, "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    convert = [PYTHON, "-c", CONVERT, series, mask]
    done = subprocess.run(convert, check=True, capture_output=True, text=True, env=environment)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["voxels"] > 100 and result["differ"] == 0
    assert (result["series"], result["label"]) == ("1.2.3", "prostate")
