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
"""Reading scans and masks with checks that speak plainly, and writing masks in the scan's own grid and format."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import DtypeLike, KeysCollection
from monai.data import ImageReader, ITKReader, MetaTensor, NibabelReader, PILReader
from monai.data.utils import affine_to_spacing, is_no_channel, to_affine_nd
from monai.transforms import LoadImage, MapTransform
from monai.utils import ensure_tuple, ensure_tuple_rep
from PIL import Image

from shared_iopfl.errors import InputError
from shared_iopfl.files import whole_file
from shared_iopfl.sites import PICTURES, VOLUMES, case_name, file_ending, is_dicom

__all__ = ["LoadCased", "SaveMaskd", "check_writable"]

NIFTI = (".nii.gz", ".nii")
ITK = tuple(ending for ending in VOLUMES if ending not in NIFTI)
EXIF_ORIENTATION = 0x0112
logger = logging.getLogger(__name__)


# ---- reading --------------------------------------------------------------------------------------------------------


class LoadCased(MapTransform):
    """Load a case's image and label, or say in one line what is wrong with which file.

    The result is, for every key, a float32 `MetaTensor` (channels, *spatial) in the file's own axes and with its
    affine (RAS, mm). Volumes come from NIfTI, MHA, MHD, NRRD, a DICOM file or a folder with one DICOM series; pictures
    from PNG, JPEG, TIFF and BMP, as (channels, width, height). With ``spatial_dims`` 3, a 2D file becomes a volume of
    one slice. A label takes the affine of its image, whose voxels it must match one by one.

    Refused are: files that are missing, empty, cut short or no scans; other shapes than asked for; NaN, infinite or
    constant images; affines without a volume; labels of another shape than their image, with fractions, negative
    values, or one value everywhere (a mask needs foreground and background, whatever numbers stand for them).

    Args:
        keys: keys of the paths to load.
        spatial_dims: 2 or 3.
        channels: channels of an image; a label has one.
        reader: how to read, one MONAI reader for all keys or one a key; None: by the file's ending.
        allow_missing_keys: whether cases without a label may come, as an outside site's do.
        label_key: the key under which labels come; all other keys are images.

    Raises:
        InputError: when a file is refused.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        spatial_dims: int = 3,
        channels: int = 1,
        reader: ImageReader | Sequence[ImageReader | None] | None = None,
        allow_missing_keys: bool = True,
        label_key: str = "label",
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.spatial_dims = spatial_dims
        self.channels = channels
        self.label_key = label_key
        self.readers = ensure_tuple_rep(reader, len(self.keys))
        self._load_image = LoadImage(dtype=np.float32)
        self._warned = False

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        images = []
        for key, reader in self.key_iterator(d, self.readers):
            path = Path(d[key])
            is_label = key == self.label_key
            d[key] = self._load(path, reader, channels=1 if is_label else self.channels)
            (_check_label if is_label else _check_image)(d[key], path)
            if not is_label:
                images.append(d[key])
        if images and isinstance(d.get(self.label_key), MetaTensor):
            d[self.label_key] = self._match(images[0], d[self.label_key])
        return d

    def _load(self, path: Path, reader: ImageReader | None, channels: int) -> MetaTensor:
        if not path.exists():
            raise InputError(f"no such file: {path}")
        if path.is_file() and path.stat().st_size == 0:
            raise InputError(f"{path} is empty (0 bytes): export or copy it again")
        try:
            if file_ending(path) in NIFTI:
                _check_nifti_header(path)
            loaded = self._load_image(path, reader=reader or _reader_for(path))
        except InputError:
            raise
        except Exception as error:  # readers raise whatever their libraries do: zlib.error, EOFError, RuntimeError, ...
            raise InputError(f"{path} cannot be read as a scan ({_reason(error)}): export or copy it again") from error

        shape, channel_dim = tuple(loaded.shape), loaded.meta.get("original_channel_dim", float("nan"))
        scan = loaded.as_tensor()
        scan = scan[None] if is_no_channel(channel_dim) else scan.movedim(int(channel_dim), 0)
        if channels == 1 and file_ending(path) in PICTURES and len(scan) == 3 and bool((scan == scan[:1]).all()):
            scan = scan[:1]  # grey stored as RGB, as the public fundus masks are
        while scan.ndim > self.spatial_dims + 1 and scan.shape[-1] == 1:
            scan = scan[..., 0]  # NIfTI with a fourth axis of length 1; a picture kept as a volume of one slice
        if self.spatial_dims == 3 and scan.ndim == 3:
            scan = scan[..., None]
        if 0 in shape:
            raise InputError(f"{path} has an axis of length 0: shape {shape}")
        if scan.ndim != self.spatial_dims + 1 or len(scan) != channels:
            wanted = "3D scan" if self.spatial_dims == 3 else "2D picture"
            wanted += f" of {channels} channel{'s' * (channels > 1)}" if channels > 1 or self.spatial_dims == 2 else ""
            hint = "; extract one volume first" if self.spatial_dims == 3 and len(shape) > 3 else ""
            raise InputError(f"expected a {wanted}, got shape {shape} in {path}{hint}")

        affine = to_affine_nd(3, np.asarray(loaded.affine, dtype=np.float64))
        _check_affine(affine, path)
        # of the metadata what later transforms and the writer need: the rest differs from format to format, and then
        # cases of one site could not be put into one batch
        meta = {
            "filename_or_obj": str(path),
            "original_affine": affine.copy(),
            "original_channel_dim": 0,
            "spatial_shape": np.asarray(scan.shape[1:]),
            "space": "RAS",
        }
        return MetaTensor(scan.contiguous(), affine=torch.as_tensor(affine), meta=meta)

    def _match(self, image: MetaTensor, label: MetaTensor) -> MetaTensor:
        """The label in the image's grid."""
        names = [tensor.meta["filename_or_obj"] for tensor in (image, label)]
        if image.shape[1:] != label.shape[1:]:
            raise InputError(
                f"{names[1]} has shape {tuple(label.shape[1:])} but its image {names[0]} has {tuple(image.shape[1:])}: "
                "a mask must have a value for each voxel"
            )
        if not self._warned and not _same_grid(image.affine, label.affine, image.shape[1:]):
            self._warned = True
            logger.warning(
                "%s lies elsewhere than its image %s (affines differ); voxels are taken to match one by one, "
                "and no more is said of other cases like it",
                *reversed(names),
            )
        label.affine = image.affine.clone()
        label.meta["original_affine"] = np.array(image.meta["original_affine"])
        return label


def _reader_for(path: Path) -> ImageReader:
    ending = file_ending(path)
    if ending in NIFTI:
        return NibabelReader()
    if ending in PICTURES:
        return PILReader()
    if path.is_dir() or ending in ITK or is_dicom(path):
        _itk(path)
        return _SeriesReader() if path.is_dir() else ITKReader()
    kinds = ", ".join(ending[1:] for ending in VOLUMES + PICTURES)
    raise InputError(f"{path} is not of a kind that can be read: expected DICOM or {kinds}")


def _itk(path: Path) -> ModuleType:
    try:
        import itk
    except ImportError as error:
        raise InputError(f"reading and writing {path} needs ITK: pip install itk") from error
    return itk


class _SeriesReader(ITKReader):
    """Reads a folder that is one whole DICOM series: ITK passes over slices it cannot read, and takes one of two."""

    def read(self, data: Any, **kwargs: Any) -> Any:
        folder = Path(ensure_tuple(data)[0])
        files = [file for file in sorted(folder.iterdir()) if file.is_file() and is_dicom(file)]
        if not files:
            raise InputError(f"{folder} holds no DICOM files")
        names = _itk(folder).GDCMSeriesFileNames.New()
        names.SetUseSeriesDetails(True)
        names.AddSeriesRestriction("0008|0021")  # what makes a series, as for MONAI's reader
        names.SetDirectory(str(folder))
        series = [names.GetFileNames(uid) for uid in names.GetSeriesUIDs()]
        if len(series) > 1:
            raise InputError(f"{folder} holds {len(series)} DICOM series: put each into a folder of its own")
        readable = {Path(name).name for found in series for name in found}
        broken = [file.name for file in files if file.name not in readable]
        if broken:
            raise InputError(f"{folder} has {len(broken)} slices that cannot be read, {broken[0]} first: copy it again")
        image = super().read(data, **kwargs)
        meta, key = image.GetMetaDataDictionary(), "ITK_non_uniform_sampling_deviation"
        if meta.HasKey(key) and meta[key] > 0.1 * image.GetSpacing()[2]:
            raise InputError(f"{folder} has slices missing or unevenly spaced (by {meta[key]:.3g} mm): copy it again")
        return image


def _check_nifti_header(path: Path) -> None:
    image: Any = nib.load(path)
    with image.file_map["image"].get_prepare_fileobj() as file:
        raw = type(image.header).from_fileobj(file, check=False)  # with the check, a voxel size of 0 becomes 1 mm
    sizes = raw["pixdim"][1 : 1 + min(len(image.shape), 3)]
    if raw["sform_code"] == 0 and not np.all(np.abs(sizes) > 0):
        raise InputError(f"{path} has voxels of size {tuple(sizes.tolist())} mm: mend its header")
    dtype = image.header.get_data_dtype()
    if dtype.fields or dtype.kind == "c":
        kind = "colours (RGB)" if dtype.fields else "complex numbers"
        raise InputError(f"{path} holds {kind}: expected one real value for each voxel")
    _check_affine(image.affine, path)


def _check_affine(affine: np.ndarray, path: Path) -> None:
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not spacing.all() or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-6:
        rows = np.array2string(affine[:3], precision=3, separator=" ").replace("\n", "")
        raise InputError(f"{path} has a broken affine or voxel size ({rows}): mend its header")


def _check_image(image: MetaTensor, path: Path) -> None:
    bad = int((~torch.isfinite(image)).sum())
    if bad:
        raise InputError(f"{path} holds {bad} NaN or infinite voxels of {image.numel()}: export it again")
    if image.min() == image.max():
        raise InputError(f"{path} holds nothing to see: it is {image.min():g} everywhere")


def _check_label(label: MetaTensor, path: Path) -> None:
    values = torch.unique(label.as_tensor())
    wrong = values[~torch.isfinite(values) | (values != values.round()) | (values < 0)]
    if len(wrong):
        some = ", ".join(f"{value:g}" for value in wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise InputError(f"{path} is not a mask: its values must be 0, 1, 2, ... but include {some}")
    if len(values) == 1:
        raise InputError(f"{path} has no foreground to learn from or to score: it is {values[0]:g} everywhere")


def _same_grid(first: Any, second: Any, shape: Sequence[int]) -> bool:
    """Whether no corner of the volume moves by half a voxel or more from one affine to the other."""
    a, b = (to_affine_nd(3, np.asarray(affine, dtype=np.float64)) for affine in (first, second))
    size = (*shape, 1, 1)[:3]
    corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)]) * (*(np.array(size) - 1), 1)
    moved = np.linalg.norm(corners @ (a - b).T, axis=1).max()
    return bool(moved < 0.5 * affine_to_spacing(a).min())


def _reason(error: Exception) -> str:
    """The first line of a library's complaint, without ITK's addresses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and ".cxx:" not in line]
    return re.sub(r"^ITK ERROR: \w+\(\w+\): ", "", lines[0])[:200] if lines else type(error).__name__


# ---- writing --------------------------------------------------------------------------------------------------------


class SaveMaskd(MapTransform):
    """Write a mask in the grid, orientation and format of the scan it was predicted from.

    Comes last in a bundle's postprocessing: the mask is inverted (`Invertd`) and discrete (`AsDiscreted`), so (1,
    *spatial) in the axes of the scan's file. Shape and affine (qform and sform, or origin, spacing and direction) are
    copied from that file. NIfTI gives NIfTI, NRRD gives NRRD, MHA and MHD give MHA, DICOM gives NIfTI, and a picture
    gives a PNG with the class of each pixel, which lies on the picture as it was read. A file appears whole or not at
    all. Scans of one name do not overwrite each other: the second gets ``_2``, with a warning.

    Args:
        keys: keys of the masks.
        image_key: key of the image they belong to, whose metadata names the file.
        output_dir: folder to write to; made if it is not there.
        name: file name without ending, in which ``{case}`` and other strings of the case (``{site}``) are filled in.
        dtype: an integer type.
        allow_missing_keys: whether cases without a mask may come.

    Raises:
        InputError: when a mask cannot be written, holds NaN, or would replace its scan.
        ValueError: when a mask is not one channel of whole numbers in the scan's grid.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        image_key: str = "image",
        output_dir: str | os.PathLike = ".",
        name: str = "{case}",
        dtype: DtypeLike = np.uint8,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.image_key = image_key
        self.output_dir = Path(output_dir)
        self.name = name
        self.dtype = np.dtype(dtype)
        self._written: dict[Path, tuple[Path, Hashable]] = {}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The data with, under ``<key>_file``, the path that was written."""
        d = dict(data)
        for key in self.key_iterator(d):
            meta = getattr(d.get(self.image_key), "meta", None) or d[key].meta
            source = Path(ensure_tuple(meta["filename_or_obj"])[0])
            array = self._array(d[key], source)
            original = meta.get("original_affine")
            if isinstance(d[key], MetaTensor) and original is not None:
                _check_grid(_same_grid(d[key].affine, original, array.shape), "affine", source)
            target = self._target(d, source, key)
            with whole_file(target) as temporary:
                _write(array, source, original, temporary)
            d[f"{key}_file"] = str(target)
        return d

    def _array(self, mask: Any, source: Path) -> np.ndarray:
        array = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
        if len(array) != 1:
            raise ValueError(f"a mask has one channel but this one has shape {array.shape}: AsDiscreted(argmax=True)?")
        if not np.isfinite(array).all():
            raise InputError(
                f"the mask of {source} holds NaN: the model's weights or the scan's intensities are broken"
            )
        limits = np.iinfo(self.dtype)
        if (array != np.round(array)).any() or array.min() < limits.min or array.max() > limits.max:
            raise ValueError(f"a mask holds whole numbers from {limits.min} to {limits.max}: AsDiscreted(argmax=True)?")
        return array[0].astype(self.dtype)

    def _target(self, data: Mapping[Hashable, Any], source: Path, key: Hashable) -> Path:
        fields = {str(k): v for k, v in data.items() if isinstance(v, str)}
        fields = {"case": case_name(source), "key": str(key), **fields}
        try:
            name = self.name.format(**fields)
        except (KeyError, IndexError) as error:
            raise InputError(f"cannot name a mask {self.name!r}: known of {source} are {', '.join(fields)}") from error
        ending = _mask_ending(source)
        target, number = self.output_dir / f"{name}{ending}", 2
        while self._written.get(target, (source, key)) != (source, key):
            target, number = self.output_dir / f"{name}_{number}{ending}", number + 1
        if number > 2 and target not in self._written:
            logger.warning("another scan is called %s too: the mask of %s is %s", name, source, target)
        if target.exists() and source.exists() and target.samefile(source):
            raise InputError(f"the mask of {source} would replace the scan itself: choose another output_dir")
        self._written[target] = (source, key)
        return target


def check_writable(output_dir: str | os.PathLike) -> None:
    """Make a folder if it is not there and try to write to it, before hours of work end at a full or locked disk.

    Raises:
        InputError: when nothing can be written there.
    """
    folder = Path(output_dir)
    with whole_file(folder / ".writable") as temporary, open(temporary, "wb") as file:
        file.write(bytes(2**16))
        os.fsync(file.fileno())
    (folder / ".writable").unlink(missing_ok=True)


def _mask_ending(source: Path) -> str:
    ending = file_ending(source)
    if ending in PICTURES:
        return ".png"
    return {".nii": ".nii", ".mha": ".mha", ".mhd": ".mha", ".nrrd": ".nrrd"}.get(ending, ".nii.gz")


def _write(array: np.ndarray, source: Path, affine: Any, target: Path) -> None:
    """Write an array in the axes of the source file, with the source's header."""
    ending = file_ending(source)
    if ending in NIFTI:
        scan: Any = nib.load(source)
        header = scan.header.copy()
        header.set_data_dtype(array.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"] = header["cal_max"] = 0  # the scan's display window would hide the mask
        nib.save(type(scan)(_as_shape(array, scan.shape, source), scan.affine, header), target)
    elif ending in PICTURES:
        with Image.open(source) as picture:
            size = picture.size
            turned = picture.getexif().get(EXIF_ORIENTATION, 1) >= 5 and array.squeeze().shape == size[::-1]
        Image.fromarray(_as_shape(array, size[::-1] if turned else size, source).T).save(target)
    elif ending in ITK:
        itk = _itk(source)
        scan = itk.imread(str(source))
        mask = itk.image_from_array(np.ascontiguousarray(_as_shape(array, tuple(itk.size(scan)), source).T))
        mask.CopyInformation(scan)
        try:
            itk.imwrite(mask, str(target), compression=True)
            written = np.array_equal(itk.array_from_image(itk.imread(str(target))), itk.array_from_image(mask))
        except RuntimeError as error:
            raise OSError(_reason(error)) from error
        if not written:
            raise OSError("the file came out incomplete")
    else:  # DICOM: its axes and affine as ITK reads them
        nib.save(nib.Nifti1Image(array, np.asarray(affine)), target)


def _as_shape(array: np.ndarray, shape: tuple[int, ...], source: Path) -> np.ndarray:
    """The array with the axes of length 1 that the file has."""
    same = [length for length in array.shape if length != 1] == [length for length in shape if length != 1]
    _check_grid(same, "shape", source)
    return array.reshape(shape)


def _check_grid(same: bool, what: str, source: Path) -> None:
    if not same:
        raise ValueError(f"a mask has another {what} than its scan {source}: Invertd must come before SaveMaskd")
