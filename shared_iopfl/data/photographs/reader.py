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
"""Readers of photographs and their masks, in PNG, JPEG, TIFF, BMP and other formats."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from monai.config import NdarrayOrTensor, PathLike
from monai.data import PILReader
from monai.utils import ensure_tuple
from PIL import Image, ImageOps, TiffImagePlugin

from shared_iopfl.data.photographs.checks import check_colours, check_shape, glance, monochrome
from shared_iopfl.data.scan_names import PICTURES
from shared_iopfl.utils.errors import InputError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM")
MOVING = ("WEBP", "GIF")
LOSSY = ("JPEG", "MPO")  # MPO is Pillow's name of a JPEG that contains a second picture, as some cameras write it
SUFFIXES = tuple(ending[1:] for ending in PICTURES)
MOST_PIXELS = 75 * 10**6  # more than any fundus camera has; processing takes less than 4 GB of memory
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # "I": some 16-bit files are read as 32-bit integers


class _PictureReader(PILReader):
    """Base of the two readers: opens a file as an upright picture, or reports in one line why that fails.

    Args:
        min_size: Smallest width and height in pixels; smaller pictures are thumbnails or broken.
    """

    def __init__(self, min_size: int = 16) -> None:
        super().__init__()
        self.min_size = min_size

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        return all(str(name).lower().endswith(SUFFIXES) for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike | np.ndarray, **kwargs: Any) -> tuple[PathLike, ...]:
        """Return the names of the files, which `get_data` opens.

        If `read` fails, `LoadImage` silently falls back to MONAI's own readers, which would load the files that are
        rejected here; if `get_data` fails, it does not.
        """
        return ensure_tuple(data)

    def get_data(self, img: tuple[PathLike, ...]) -> tuple[np.ndarray, dict]:
        """Return the pixels, (W, H) or (W, H, 3), and the metadata of MONAI's `PILReader`, both of the upright picture.

        Raises:
            InputError: If the file is missing, broken, too small, too large, or not of the requested kind.
        """
        if len(img) != 1:
            raise InputError("a picture is one file, but the case has a list of files: give one")
        name = os.fspath(img[0])
        picture, meta = self._open(name)
        array = self._pixels(picture, str(meta["format"]), name)
        meta["original_channel_dim"] = float("nan") if array.ndim == 2 else -1
        return np.ascontiguousarray(array.swapaxes(0, 1)), meta

    def _open(self, name: str) -> tuple[Image.Image, dict]:
        """Return the decoded picture, rotated by its EXIF orientation so that it is upright, and its metadata."""
        try:
            with Image.open(name, formats=FORMATS) as img:
                if isinstance(img, TiffImagePlugin.TiffImageFile):
                    _refuse_tiff(img, name)
                if img.width * img.height > MOST_PIXELS:
                    raise InputError(_too_large(name))
                pictures = int(getattr(img, "n_frames", 1))
                if img.format in MOVING and pictures > 1:
                    raise InputError(f"{pictures} pictures in {name}: save the one to be used as a file of its own")
                img.load()
                picture = ImageOps.exif_transpose(img)
                meta = {"format": str(img.format), "mode": img.mode, "width": picture.width, "height": picture.height}
        except FileNotFoundError as error:
            raise InputError(f"no such file: {name}; correct the path") from error
        except Image.DecompressionBombError as error:
            raise InputError(_too_large(name)) from error
        except Image.UnidentifiedImageError as error:
            raise InputError(
                f"not a PNG, JPEG, TIFF or BMP (WebP, GIF, PNM) that can be read: {name}; convert it to PNG"
            ) from error
        except InputError:
            raise
        except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:  # raised by Pillow's decoders
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"broken picture {name} ({reason}): export or copy it again") from error
        if min(picture.size) < self.min_size:
            raise InputError(
                f"only {picture.width}x{picture.height} pixels in {name}: give the original, with at least "
                f"{self.min_size} on each side"
            )
        meta["spatial_shape"] = np.asarray(picture.size)
        return picture, meta

    def _pixels(self, picture: Image.Image, file_format: str, name: str) -> np.ndarray:
        """Return the array of a decoded picture, (H, W) or (H, W, 3)."""
        raise NotImplementedError


def file_of(picture: NdarrayOrTensor) -> str:
    """Return the path of the file of a picture, for messages."""
    return str(getattr(picture, "meta", {}).get("filename_or_obj", "a picture without a file name"))


def _too_large(name: str) -> str:
    return f"more than {MOST_PIXELS // 10**6} megapixels in {name}: save it smaller"


def _refuse_tiff(img: TiffImagePlugin.TiffImageFile, name: str) -> None:
    """Raise `InputError` for the kinds of TIFF that Pillow reads incompletely or incorrectly."""
    if img.n_frames > 1:
        raise InputError(f"{img.n_frames} pages in {name}: save the page to be used as a file of its own")
    separate_planes = img.tag_v2.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2
    if separate_planes and max(img.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (8,))) > 8:
        raise InputError(f"16-bit TIFF in separate colour planes, which Pillow garbles: save {name} as PNG")


class PhotographReader(_PictureReader):
    """Reader of colour photographs of any mode, depth and orientation as float32 RGB from 0 to 255.

    It is used as `LoadImaged(keys, reader=...)`. The array is (W, H, 3), as from MONAI's `PILReader`, so the image is
    (3, W, H) after `EnsureChannelFirstd`.

    - The EXIF orientation is applied: the array is the upright picture, and a mask predicted from it has the pixels of
      the upright picture, not those of the file as stored.
    - Palettes are resolved; CMYK, YCbCr and Lab are converted to RGB.
    - An opaque alpha channel is dropped; a transparent picture is placed on black, the colour around a field of view.
    - 16-bit values 0..65535 become 0..255 (Pillow itself reads 16-bit RGB as 8-bit).

    Args:
        grey: How to treat a picture with one channel, with three (nearly) equal channels, or in a single colour, as
            red-free photographs are: ``"refuse"`` rejects it, and also colours that a fundus does not have;
            ``"replicate"`` repeats the one channel three times, and accepts all colours.
        min_size: Smallest width and height in pixels.

    Raises:
        InputError: (by `get_data`) If the file is broken, too small or too large, grey where colour is expected, or not
            a photograph of one fundus by the checks in `photographs.checks`.
    """

    def __init__(self, grey: str = "refuse", min_size: int = 16) -> None:
        super().__init__(min_size)
        if grey not in ("refuse", "replicate"):
            raise InputError(f'grey must be "refuse" or "replicate", got "{grey}"')
        self.grey = grey

    def _pixels(self, picture: Image.Image, file_format: str, name: str) -> np.ndarray:
        if picture.mode == "F":
            raise InputError(f"floating-point pixels in {name}: save the photograph as 8-bit or 16-bit RGB")
        if picture.mode == "PA" or "transparency" in picture.info:
            picture = picture.convert("RGBA")  # a palette or the tRNS chunk of a PNG has a transparent colour
        if picture.mode in SIXTEEN_BIT:
            values = np.asarray(picture).astype(np.float32)
            if values.min() < 0 or values.max() > 65535:
                raise InputError(f"pixel values beyond 16 bits in {name}: save the photograph as 8-bit or 16-bit RGB")
            return self._colour(values / 257, name)
        if picture.mode in ("1", "L"):
            return self._colour(np.asarray(picture.convert("L"), dtype=np.float32), name)
        if picture.mode in ("LA", "La", "RGBA", "RGBa"):
            rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32)
            rgb = rgba[..., :3] * (rgba[..., 3:] / 255)
        else:
            rgb = np.asarray(picture.convert("RGB"), dtype=np.float32)
        if np.array_equal(rgb[..., 0], rgb[..., 1]) and np.array_equal(rgb[..., 0], rgb[..., 2]):
            return self._colour(rgb[..., 0], name)
        small = glance(rgb)
        check_shape(small, name)
        channel = monochrome(small)
        if channel is not None:
            grey = rgb.mean(axis=-1) if channel < 0 else rgb[..., channel]
            return self._colour(grey, name, "grey with a tint" if channel < 0 else "a single colour")
        if self.grey == "refuse":
            check_colours(small, name)
        return rgb

    def _colour(self, grey: np.ndarray, name: str, what: str = "grey") -> np.ndarray:
        """Return three copies of a grey channel, if grey pictures are accepted."""
        if self.grey == "refuse":
            raise InputError(
                f"expected colour (RGB), got {what} in {name}: give the colour photograph, or set --grey replicate"
            )
        return np.repeat(grey[..., None], 3, axis=-1)


class CodedMaskReader(_PictureReader):
    """Reader of drawn masks as the integers stored in the file, (W, H) float32 without any rescaling.

    - With one channel of 1, 8 or 16 bits, these are its values; with three equal channels (and an opaque alpha
      channel), the common value.
    - With a palette of greys, these are the grey values; with a palette of colours, the indices, which then are the
      labels.
    - JPEG is rejected: it blurs the borders between values, so that the blurred pixels would have wrong labels.
    - The EXIF orientation is applied as in `PhotographReader`, so that a mask still fits its photograph.

    `shared_iopfl.data.photographs.codings.DecodeMaskd` gives the integers their meaning.

    Args:
        min_size: Smallest width and height in pixels.

    Raises:
        InputError: (by `get_data`) If the file is broken, lossy, coloured or partly transparent.
    """

    def _pixels(self, picture: Image.Image, file_format: str, name: str) -> np.ndarray:
        if file_format in LOSSY:
            raise InputError(f"mask in a lossy format (JPEG changes labels at their borders): {name}: save it as PNG")
        if picture.mode == "P":
            palette = np.asarray(picture.getpalette("RGB")).reshape(-1, 3)
            index = np.asarray(picture)
            used = np.unique(index)
            if used.max() >= len(palette) or np.ptp(palette[used], axis=-1).max() > 0:
                return index.astype(np.float32)
            return palette[:, 0][index].astype(np.float32)
        if picture.mode in ("1", "L", *SIXTEEN_BIT):
            return np.asarray(picture).astype(np.float32)
        if picture.mode not in ("LA", "RGB", "RGBA"):
            raise InputError(f"mask of mode {picture.mode} in {name}: save it as a PNG of one channel")
        values = np.asarray(picture)
        if picture.mode in ("LA", "RGBA"):
            if values[..., -1].min() < 255:
                raise InputError(f"partly transparent mask in {name}: save it as a PNG of one channel")
            values = values[..., :-1]
        if np.ptp(values, axis=-1).max() > 0:
            raise InputError(f"mask drawn in colours in {name}: save it as a PNG of one channel, one value a label")
        return values[..., 0].astype(np.float32)
