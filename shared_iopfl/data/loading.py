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
"""Loading of scans and labels with checks, and resizing and padding of volumes that take less memory than MONAI's."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import ImageReader, ITKReader, MetaTensor, NibabelReader, PILReader
from monai.data.utils import is_no_channel, to_affine_nd
from monai.transforms import BorderPadd, GaussianSmooth, LoadImage, MapTransform, Resized
from monai.transforms.traits import RandomizableTrait
from monai.utils import convert_to_dst_type, ensure_tuple_rep, fall_back_tuple
from torch import Tensor

from shared_iopfl.data.scan_names import ITK, NIBABEL, PICTURES, VOLUMES, file_ending, is_dicom
from shared_iopfl.data.volumes.dicom import DicomReader
from shared_iopfl.data.volumes.geometry import check_affine, describe_grid, in_grid_of
from shared_iopfl.data.volumes.headers import check_header, import_itk, millimetres
from shared_iopfl.utils.errors import InputError

LABEL = "label"
ROUNDING = 1e-3  # largest difference of a label value from a whole number
SMOOTHED = 4  # slices that are smoothed at a time


class LoadCased(MapTransform):
    """Load the image of a case and, if it has one, its label; or report in one line which file is wrong and why.

    Each key becomes a float32 `MetaTensor` (channels, *spatial) in the axes of the file, with its affine (RAS, in mm
    whatever the unit in the header). Volumes are read from NIfTI, MGZ, MHA, MHD, NRRD, a DICOM file or a folder with
    one DICOM series, pictures from PNG, JPEG, TIFF, BMP, WebP, GIF and PNM, as (channels, width, height). With
    ``spatial_dims`` 3, a 2D file becomes a volume of one slice. A label is returned in the grid of its image: if it
    covers the same box in world coordinates with flipped or permuted axes, it is reoriented; if it lies elsewhere, it
    is rejected.

    The following are rejected: files that are missing, empty, truncated or no scans; shapes other than requested;
    images that contain NaN or infinite values or are constant; affines that span no volume, and NIfTI files whose qform
    and sform differ; labels in another grid than their image, with fractions or negative values, or with one value
    everywhere (a mask needs foreground and background, whatever their values).

    Args:
        keys: Keys of the paths to load: "label", and those of images. A case may lack some of them.
        spatial_dims: 2 or 3.
        channels: Number of channels of an image; a label has one.
        reader: MONAI reader for all keys, or one per key; None selects it by the ending of the file.
        check_values: Whether the values of images and labels are checked; not those of a mask that may be empty.

    Raises:
        InputError: If a file is rejected.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image", "label"),
        spatial_dims: int = 3,
        channels: int = 1,
        reader: ImageReader | Sequence[ImageReader | None] | None = None,
        check_values: bool = True,
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.spatial_dims = spatial_dims
        self.channels = channels
        self.readers = ensure_tuple_rep(reader, len(self.keys))
        self.check_values = check_values
        self._load_image = LoadImage(dtype=np.float32)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        images = []
        for key, reader in self.key_iterator(d, self.readers):
            path = Path(d[key])
            is_label = key == LABEL
            d[key] = self._load(path, reader, channels=1 if is_label else self.channels)
            if is_label and self.check_values:
                d[key] = _whole_numbers(d[key], path)
            elif self.check_values:
                _check_image(d[key], path)
            images += [] if is_label else [d[key]]
        if images and isinstance(d.get(LABEL), MetaTensor):
            d[LABEL] = self._match(images[0], d[LABEL])
        return d

    def _load(self, path: Path, reader: ImageReader | None, channels: int) -> MetaTensor:
        if not path.exists():
            raise InputError(f"no such file: {path}; correct the path")
        if not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} is neither a file nor a folder: give the scan itself")  # a pipe would block
        if path.is_file() and path.stat().st_size == 0:
            raise InputError(f"{path} is empty (0 bytes): export or copy it again")
        try:
            check_header(path)
            loaded = self._load_image(path, reader=reader or _reader_for(path))
        except InputError:
            raise
        except Exception as error:  # the readers' libraries raise many kinds: zlib.error, EOFError, RuntimeError, ...
            raise InputError(f"{path} cannot be read as a scan ({reason(error)}): export or copy it again") from error

        shape, channel_dim = tuple(loaded.shape), loaded.meta.get("original_channel_dim", float("nan"))
        scan = loaded.as_tensor()
        scan = scan[None] if is_no_channel(channel_dim) else scan.movedim(int(channel_dim), 0)
        if channels == 1 and file_ending(path) in PICTURES and len(scan) == 3 and bool((scan == scan[:1]).all()):
            scan = scan[:1]  # a grey picture stored as RGB, such as the public fundus masks
        while scan.ndim > self.spatial_dims + 1 and scan.shape[-1] == 1:
            scan = scan[..., 0]  # NIfTI with a fourth axis of length 1; a picture kept as a volume of one slice
        if self.spatial_dims == 3 and scan.ndim == 3:
            scan = scan[..., None]
        if 0 in shape:
            raise InputError(f"{path} has an axis of length 0 (shape {shape}): export it again")
        if scan.ndim != self.spatial_dims + 1 or len(scan) != channels:
            wanted = "3D scan" if self.spatial_dims == 3 else "2D picture"
            wanted += f" of {channels} channel{'s' * (channels > 1)}" if channels > 1 or self.spatial_dims == 2 else ""
            hint = "; extract one volume first" if self.spatial_dims == 3 and len(shape) > 3 else ""
            raise InputError(f"expected a {wanted}, got shape {shape} in {path}{hint}")

        affine = to_affine_nd(3, np.asarray(loaded.affine, dtype=np.float64))
        check_affine(affine, path)
        affine[:3] *= millimetres(path)
        # only the metadata that later transforms and the writer need: other entries differ between formats, which would
        # prevent batches of cases of one site
        meta = {
            "filename_or_obj": str(path),
            "original_affine": affine.copy(),
            "original_channel_dim": 0,
            "spatial_shape": np.asarray(scan.shape[1:]),
            "space": "RAS",
        }
        return MetaTensor(scan.contiguous(), affine=torch.as_tensor(affine), meta=meta)

    def _match(self, image: MetaTensor, label: MetaTensor) -> MetaTensor:
        """Return the label in the image's grid."""
        image_grid, label_grid = ((tensor.affine.numpy(), tensor.shape[1:]) for tensor in (image, label))
        values = in_grid_of(label[0].numpy(), label_grid[0], *image_grid)
        if values is None:
            names = [tensor.meta["filename_or_obj"] for tensor in (image, label)]
            raise InputError(
                f"{names[1]} is not in the grid of its image {names[0]}: {describe_grid(*label_grid)} instead of "
                f"{describe_grid(*image_grid)}; resample the mask to its image, or correct the header that is wrong"
            )
        label = MetaTensor(torch.from_numpy(values)[None], meta=label.meta)
        label.affine = image.affine.clone()
        label.meta["original_affine"] = np.array(image.meta["original_affine"])
        label.meta["spatial_shape"] = np.asarray(label.shape[1:])
        return label


class ResizedByParts(Resized):
    """A `Resized` whose anti-aliasing smooths a volume a few slices at a time, with the same result.

    MONAI smooths the whole volume at once, by convolutions that need as much memory as a volume per weight of their
    kernel.

    Args:
        keys, args, kwargs: As in `Resized`.
        anti_aliasing: As in `Resized`.
    """

    def __init__(
        self, keys: KeysCollection, *args: Any, anti_aliasing: Sequence[bool] | bool = False, **kwargs: Any
    ) -> None:
        super().__init__(keys, *args, **kwargs)
        self.smoothed = ensure_tuple_rep(anti_aliasing, len(self.keys))

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """Smooth the images along the axes that become shorter, and resize them."""
        d = dict(data)
        for key, smoothed in self.key_iterator(d, self.smoothed):
            if smoothed:
                d[key] = self._smooth(d[key])
        return super().__call__(d, lazy)

    def _smooth(self, image: torch.Tensor) -> torch.Tensor:
        size = torch.tensor(fall_back_tuple(self.resizer.spatial_size, image.shape[1:]))
        sigma = ((torch.tensor(image.shape[1:]) / size - 1) / 2).clamp(min=0).tolist()
        if not any(sigma):
            return image
        plain = convert_to_dst_type(image, torch.empty(0))[0]
        # without smoothing across slices, each slice can be smoothed without its neighbours
        parts = plain.split(SMOOTHED, dim=-1) if image.ndim == 4 and not sigma[-1] else [plain]
        smoothed = torch.cat([GaussianSmooth(sigma)(part).as_tensor() for part in parts], dim=-1)
        return convert_to_dst_type(smoothed, image)[0]


class UncachedBorderPadd(BorderPadd, RandomizableTrait):
    """A `BorderPadd` whose result `CacheDataset` does not cache, so that volumes are cached without their padding.

    It is not random: a `CacheDataset` repeats all transforms from the first one with this trait.
    """


def compact(label: Tensor) -> Tensor:
    """Return a label as it is cached: as uint8 if its values are whole numbers, otherwise as float16.

    A label that is not resampled, or is resampled to its nearest voxels, has whole numbers.
    """
    small = label.to(torch.uint8)
    return small if torch.equal(small.to(label.dtype), label) else label.to(torch.float16)


def _reader_for(path: Path) -> ImageReader:
    ending = file_ending(path)
    if ending in NIBABEL:
        return NibabelReader()
    if ending in PICTURES:
        return PILReader()
    is_series = path.is_dir() or is_dicom(path)
    if is_series or ending in ITK:
        import_itk(path)
        return DicomReader() if is_series else ITKReader()
    kinds = ", ".join(ending[1:] for ending in VOLUMES + PICTURES)
    raise InputError(f"{path} is not of a kind that can be read: expected DICOM or {kinds}")


def _check_image(image: MetaTensor, path: Path) -> None:
    bad = int((~torch.isfinite(image)).sum())
    if bad:
        raise InputError(f"{path} holds {bad} NaN or infinite voxels of {image.numel()}: export it again")
    if image.min() == image.max():
        raise InputError(f"{path} shows nothing: it is {image.min():g} everywhere; export it again")


def _whole_numbers(label: MetaTensor, path: Path) -> MetaTensor:
    """Return the label with rounded values, as tools that scale values leave 0.9999999 in place of 1."""
    values = torch.unique(label.as_tensor())
    whole = values.round()
    wrong = values[~torch.isfinite(values) | ((values - whole).abs() > ROUNDING) | (whole < 0)]
    if len(wrong):
        some = ", ".join(f"{value:.7g}" for value in wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise InputError(f"{path} is not a mask: its values must be 0, 1, 2, ... but include {some}: correct them")
    if len(torch.unique(whole)) == 1:
        raise InputError(f"{path} has no foreground, it is {whole[0]:g} everywhere: complete it, or remove the case")
    return label.round()  # type: ignore[return-value]


def reason(error: Exception) -> str:
    """Return the first line of a library's error message, without source files and addresses of ITK."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not re.search(r"\.[ch]xx:\d", line)]
    return re.sub(r"(?i)^itk(?: |::)error: \w+\(\w+\): ", "", lines[0])[:200] if lines else type(error).__name__
