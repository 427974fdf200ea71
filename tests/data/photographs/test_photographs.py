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
"""Properties of reading photographs and coded masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from monai.transforms import LoadImage
from PIL import Image, ImageFile

from shared_iopfl.data.photographs import reader
from shared_iopfl.data.photographs.reader import CodedMaskReader, PhotographReader
from shared_iopfl.utils.errors import InputError


def colours(height: int = 30, width: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def load(path: Path, reader: PhotographReader | CodedMaskReader) -> np.ndarray:
    """Load a picture as the bundles do, through MONAI with the channel first, and return (C, H, W)."""
    return LoadImage(reader=reader, ensure_channel_first=True)(path).numpy().swapaxes(1, 2)


def photograph(path: Path, **kwargs) -> np.ndarray:
    return load(path, PhotographReader(**kwargs))


def mask(path: Path) -> np.ndarray:
    return load(path, CodedMaskReader())


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_lossless_colour_is_read_exactly(tmp_path, suffix):
    Image.fromarray(colours()).save(tmp_path / f"a.{suffix}")
    read = photograph(tmp_path / f"a.{suffix}")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, np.moveaxis(colours(), -1, 0))


def test_metadata_are_those_of_the_upright_picture(tmp_path):
    """A photograph that is stored sideways (EXIF 6) is returned upright, and so are its metadata."""
    stored = Image.fromarray(np.rot90(colours()).copy())  # turned left; orientation 6 says: turn right to view
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "a.png", exif=exif)
    picture = LoadImage(reader=PhotographReader(), ensure_channel_first=True)(tmp_path / "a.png")
    np.testing.assert_array_equal(picture.numpy().swapaxes(1, 2), np.moveaxis(colours(), -1, 0))
    assert picture.meta["spatial_shape"].tolist() == [40, 30] == [picture.meta["width"], picture.meta["height"]]


def test_mask_follows_the_same_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(colours()[..., 0]).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(mask(tmp_path / "a.png")[0], colours()[::-1, ::-1, 0])


def test_opaque_alpha_is_dropped_and_transparency_is_black(tmp_path):
    rgba = np.dstack([colours(), np.full((30, 40), 255, np.uint8)])
    Image.fromarray(rgba).save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(photograph(tmp_path / "opaque.png"), np.moveaxis(colours(), -1, 0))
    rgba[:10, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "holes.png")
    read = photograph(tmp_path / "holes.png")
    assert (read[:, :10] == 0).all()
    np.testing.assert_array_equal(read[:, 10:], np.moveaxis(colours()[10:], -1, 0))


def test_palette_and_cmyk_become_rgb(tmp_path):
    flat = np.zeros((30, 40, 3), np.uint8)
    flat[:, :20], flat[:, 20:] = (200, 100, 50), (10, 20, 30)
    Image.fromarray(flat).quantize(2).save(tmp_path / "palette.png")
    np.testing.assert_allclose(photograph(tmp_path / "palette.png"), np.moveaxis(flat, -1, 0), atol=1)
    Image.fromarray(flat).convert("CMYK").save(tmp_path / "cmyk.tif")
    np.testing.assert_allclose(photograph(tmp_path / "cmyk.tif"), np.moveaxis(flat, -1, 0), atol=2)


@pytest.mark.parametrize("three_channels", [False, True])
def test_grey_is_refused_unless_replicated(tmp_path, three_channels):
    grey = colours()[..., 0]
    Image.fromarray(np.dstack([grey] * 3) if three_channels else grey).save(tmp_path / "grey.png")
    with pytest.raises(InputError, match=r"expected colour \(RGB\), got grey in .*grey\.png"):
        photograph(tmp_path / "grey.png")
    np.testing.assert_array_equal(photograph(tmp_path / "grey.png", grey="replicate"), np.stack([grey] * 3))


def test_sixteen_bits_fill_0_to_255(tmp_path):
    values = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    read = photograph(tmp_path / "deep.png", grey="replicate")
    np.testing.assert_allclose(read[0], values / 257, atol=1e-3)
    assert read.max() == 255


def test_large_photographs_are_read_and_bombs_refused(tmp_path, monkeypatch):
    Image.new("RGB", (4000, 4000), (200, 100, 50)).save(tmp_path / "large.png")
    picture, _ = PhotographReader().get_data(PhotographReader().read(tmp_path / "large.png"))
    assert picture.shape == (4000, 4000, 3)
    monkeypatch.setattr(reader, "MOST_PIXELS", 14 * 10**6)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)  # refused before its pixels are unpacked
    with pytest.raises(InputError, match=r"more than 14 megapixels in .*large\.png"):
        photograph(tmp_path / "large.png")


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "not a PNG, JPEG, TIFF or BMP"),
        (b"GIF89a" + bytes(100), "not a PNG, JPEG, TIFF or BMP"),
        ("jpeg", "broken picture"),
        ("png", "broken picture"),
        ("small", "only 1x1 pixels"),
        (None, "no such file"),
    ],
    ids=["empty", "another format", "truncated JPEG", "truncated PNG", "one pixel", "missing"],
)
@pytest.mark.parametrize("read", [photograph, mask])
def test_unusable_files_end_in_one_line_naming_the_file(tmp_path, content, reason, read):
    """There is neither MONAI's list of readers that failed, nor a silent fallback to one of them."""
    path = tmp_path / "case 7.png"
    if content in ("jpeg", "png"):
        Image.fromarray(colours(300, 300)).save(path, content)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content == "small":
        Image.fromarray(colours(1, 1)).save(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as error:
        read(path)
    assert "case 7.png" in str(error.value)
    assert "\n" not in str(error.value)


def test_several_pages_are_refused(tmp_path):
    page = Image.fromarray(colours())
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page])
    with pytest.raises(InputError, match=r"2 pages in .*a\.tif"):
        photograph(tmp_path / "a.tif")


def coded() -> np.ndarray:
    values = np.full((30, 40), 255, np.uint8)
    values[8:22, 10:30], values[12:18, 15:25] = 128, 0
    return values


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "grey palette", "colour palette", "1", "I;16"])
def test_mask_values_are_kept_as_coded(tmp_path, mode):
    values = coded()
    picture = Image.fromarray(values)
    if mode in ("RGB", "RGBA"):
        picture = picture.convert(mode)
    elif mode == "grey palette":  # values are the palette's greys, not the indices
        picture = Image.fromarray(values // 127)
        picture.putpalette([grey for grey in (0, 128, 255) for _ in range(3)])
    elif mode == "colour palette":  # labels are the indices
        values = values // 127
        picture = Image.fromarray(values)
        picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    elif mode == "1":
        values = (values > 0).astype(np.uint8)
        picture = Image.fromarray(values > 0)
    elif mode == "I;16":
        values = values.astype(np.uint16) * 100
        picture = Image.fromarray(values)
    picture.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(mask(tmp_path / "mask.png")[0], values)


def test_masks_in_colours_or_jpeg_are_refused(tmp_path):
    Image.fromarray(colours()).save(tmp_path / "colours.png")
    with pytest.raises(InputError, match=r"drawn in colours in .*colours\.png"):
        mask(tmp_path / "colours.png")
    Image.fromarray(coded()).save(tmp_path / "mask.png", "JPEG")  # whatever it is called
    with pytest.raises(InputError, match=r"lossy format .*mask\.png"):
        mask(tmp_path / "mask.png")
