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
"""Postprocessing of masks: one component per target, and files in the grid and format of the scan."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import convert_data_type, convert_to_dst_type
from PIL import Image
from scipy import ndimage

from shared_iopfl.data.loading import reason
from shared_iopfl.data.scan_names import ITK, NIFTI, PICTURES, case_name, file_ending, source_of
from shared_iopfl.data.volumes.geometry import same_grid
from shared_iopfl.data.volumes.headers import import_itk
from shared_iopfl.utils.errors import InputError
from shared_iopfl.utils.files import whole_file

EXIF_ORIENTATION = 0x0112
logger = logging.getLogger(__name__)


class EachKey(MapTransform):
    """Base of dictionary transforms that apply an array transform, `array_transform`, to several keys.

    Args:
        keys: Keys of the arrays.
        args, kwargs: Arguments of the array transform.
    """

    array_transform: type[Transform]

    def __init__(self, keys: KeysCollection, *args: Any, **kwargs: Any) -> None:
        super().__init__(keys)
        self.transform: Any = self.array_transform(*args, **kwargs)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, **{key: self.transform(data[key]) for key in self.key_iterator(data)}}


class KeepMiddleComponent(Transform):
    """Keep one connected component of a volume's mask: the largest one near the middle slice.

    The slices of a scan are planned from end to end of the organ, so that the last ones show something else. The
    largest component may be a bladder there that a network mistakes for the prostate. Each voxel is therefore weighted
    by its slice: slice i of n by ``sin(pi (i + 1/2) / n)^2`` (a Hann window). The position within a slice is not
    weighted, as an endorectal coil moves the prostate away from the middle.

    Args:
        data: Mask (1, X, Y, Z), foreground above 0; voxels are connected by faces, edges or corners. Slices are
            perpendicular to the axis from feet to head by the affine of a `MetaTensor`, otherwise to the last axis.

    Returns:
        The mask with the voxels of the other components set to 0.
    """

    def __call__(self, data: NdarrayOrTensor) -> NdarrayOrTensor:
        mask = convert_data_type(data, np.ndarray)[0]
        components, number = ndimage.label(mask[0] > 0, np.ones((3,) * (mask.ndim - 1)))
        if number < 2:
            return data
        axis = int(data.affine[2, :3].abs().argmax()) if isinstance(data, MetaTensor) else components.ndim - 1
        slices = components.shape[axis]
        weights = np.sin(np.pi * (np.arange(slices) + 0.5) / slices) ** 2
        along = weights.reshape([-1 if each == axis else 1 for each in range(components.ndim)])
        sums = ndimage.sum_labels(np.broadcast_to(along, components.shape), components, np.arange(1, number + 1))
        return convert_to_dst_type(mask * (components == 1 + np.argmax(sums)), data)[0]


class KeepMiddleComponentd(EachKey):
    """Dictionary-based `KeepMiddleComponent`."""

    array_transform = KeepMiddleComponent


class SaveMaskd(MapTransform):
    """Write a mask in the grid, orientation and format of the scan that it was predicted from; `SaveImaged` has one
    format.

    This is the last transform of a bundle's postprocessing: the mask has been inverted (`Invertd`) and made discrete
    (`AsDiscreted`), so it is (1, *spatial) in the axes of the scan's file. Shape and affine (qform and sform, or
    origin, spacing and direction) are copied from that file, but nothing about the patient. NIfTI becomes NIfTI, NRRD
    becomes NRRD, MHA and MHD become MHA, DICOM and other volumes become NIfTI, and a picture becomes a PNG of the
    upright picture with the class of each pixel. Files are written atomically. If several scans have the same name, the
    second mask gets the suffix ``_2``, with a warning.

    Args:
        keys: Keys of the masks.
        image_key: Key of the image that they belong to; its metadata names the file.
        output_dir: Folder to write to; it is created if necessary.

    Raises:
        InputError: If a mask cannot be written, contains NaN, or would replace its scan.
        ValueError: If a mask is not one channel of whole numbers in the scan's grid.
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
        self._written: dict[Path, tuple[Path, Hashable]] = {}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the masks, and return the data with the path of each file under ``<key>_file``."""
        d = dict(data)
        for key in self.key_iterator(d):
            source, meta = source_of(d, self.image_key, key)
            array = self._array(d[key], source)
            original = meta.get("original_affine")
            if isinstance(d[key], MetaTensor) and original is not None:
                _check_grid(same_grid(d[key].affine, original, array.shape), "affine", source)
            target = self._target(d, source, key)
            with whole_file(target) as temporary:
                _write(array, source, original, temporary)
            d[f"{key}_file"] = str(target)
        return d

    def _array(self, mask: Any, source: Path) -> np.ndarray:
        array = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
        if len(array) != 1:
            raise ValueError(f"a mask has one channel, but its shape is {array.shape}: use AsDiscreted(argmax=True)")
        if not np.isfinite(array).all():
            raise InputError(f"the mask of {source} contains NaN: check the model's weights and the scan's intensities")
        if (array != np.round(array)).any() or array.min() < 0 or array.max() > 255:
            raise ValueError("a mask holds whole numbers from 0 to 255: use AsDiscreted(argmax=True)")
        return array[0].astype(np.uint8)

    def _target(self, data: Mapping[Hashable, Any], source: Path, key: Hashable) -> Path:
        name, ending = str(data.get("case", case_name(source))), _mask_ending(source)
        target, number = self.output_dir / f"{name}{ending}", 2
        while self._written.get(target, (source, key)) != (source, key):
            target, number = self.output_dir / f"{name}_{number}{ending}", number + 1
        if number > 2 and target not in self._written:
            logger.warning("another scan is also named %s: the mask of %s is %s", name, source, target)
        if target.exists() and source.exists() and target.samefile(source):
            raise InputError(f"the mask of {source} would replace the scan itself: choose another output_dir")
        self._written[target] = (source, key)
        return target


def _mask_ending(source: Path) -> str:
    ending = file_ending(source)
    if ending in PICTURES:
        return ".png"
    return {".nii": ".nii", ".mha": ".mha", ".mhd": ".mha", ".nrrd": ".nrrd", ".nhdr": ".nrrd"}.get(ending, ".nii.gz")


def _write(array: np.ndarray, source: Path, affine: Any, target: Path) -> None:
    """Write an array in the axes of the source file, with the source's header."""
    ending = file_ending(source)
    if ending in NIFTI:
        scan: Any = nib.load(source)
        header = scan.header.copy()
        header.set_data_dtype(array.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"] = header["cal_max"] = 0  # the scan's display window would hide the mask
        header.extensions.clear()  # extensions and free text may identify the patient
        for field in {"descrip", "aux_file", "db_name", "data_type", "intent_name"} & set(header.keys()):
            header[field] = b""
        nib.save(type(scan)(_as_shape(array, scan.shape, source), scan.affine, header), target)
    elif ending in PICTURES:
        with Image.open(source) as picture:
            size = picture.size
            turned = picture.getexif().get(EXIF_ORIENTATION, 1) >= 5 and array.squeeze().shape == size[::-1]
        Image.fromarray(_as_shape(array, size[::-1] if turned else size, source).T).save(target)
    elif ending in ITK:
        itk = import_itk(source)
        scan = itk.imread(str(source))
        mask = itk.image_from_array(np.ascontiguousarray(_as_shape(array, tuple(itk.size(scan)), source).T))
        mask.CopyInformation(scan)
        try:
            itk.imwrite(mask, str(target), compression=True)
            written = np.array_equal(itk.array_from_image(itk.imread(str(target))), itk.array_from_image(mask))
        except RuntimeError as error:
            raise OSError(reason(error)) from error
        if not written:
            raise OSError("the file was written incompletely")
    else:  # DICOM and others keep the axes and the affine with which they were read
        nib.save(nib.Nifti1Image(array, np.asarray(affine)), target)


def _as_shape(array: np.ndarray, shape: tuple[int, ...], source: Path) -> np.ndarray:
    """Return the array with the axes of length 1 that the file has."""
    same = [length for length in array.shape if length != 1] == [length for length in shape if length != 1]
    _check_grid(same, "shape", source)
    return array.reshape(shape)


def _check_grid(same: bool, what: str, source: Path) -> None:
    if not same:
        raise ValueError(f"a mask differs in its {what} from its scan {source}: Invertd must come before SaveMaskd")
