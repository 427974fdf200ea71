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
"""Bad and odd pictures of the eye, as hospitals' folders hold them beside good photographs."""

from __future__ import annotations

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from bad_volumes import BODY, RNG, Corpus, Make, array, content, folder, loop, stored
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shared_iopfl.data.phantoms.fundus import fundus_case, fundus_style


def eye(size: int = 96, seed: int = 0) -> Image.Image:
    """A crop around the optic disc."""
    picture, _ = fundus_case(fundus_style("A"), size, np.random.RandomState(seed))
    return Image.fromarray(picture)


EYE = eye()


def picture(image: Image.Image = EYE, **options: Any) -> Make:
    return lambda path: image.save(path, **options)


def encoded(form: str, image: Image.Image = EYE, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    EYE.crop((0, 8, 96, 88)).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)


def large(path: Path) -> None:
    """A whole photograph, larger than all others."""
    whole, _ = fundus_case(fundus_style("A"), 300, np.random.RandomState(0), photograph=True)
    square = Image.new("RGB", (400, 400))
    square.paste(Image.fromarray(whole), (0, 50))
    square.resize((1600, 1600)).save(path, quality=90)


def png_of_16_bits(image: Image.Image) -> bytes:
    """RGB of 16 bits a channel, which Pillow cannot write."""
    values = np.asarray(image).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    return png_file(image.width, image.height, 16, zlib.compress(rows))


def png_file(width: int, height: int, bits: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    first = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + first + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def transparent() -> Image.Image:
    clear = EYE.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(96) < 4, 0, 255).astype(np.uint8)[None].repeat(96, 0)))
    return clear


def see_through(image: Image.Image) -> Image.Image:
    clear = image.convert("RGBA")
    clear.putalpha(0)
    return clear


def much_text() -> PngInfo:
    """Small in the file, large in the memory."""
    info = PngInfo()
    info.add_text("comment", "x" * 2**26, zip=True)
    return info


NO_PICTURE = "not a PNG, JPEG, TIFF or BMP"
NOISE = Image.fromarray(RNG.randint(0, 256, (96, 96, 3)).astype(np.uint8))
PICTURES: Corpus = {
    "empty.png": (content(b""), "0 bytes"),
    "text.png": (content(b"no picture\n" * 20), NO_PICTURE),
    "login.jpg": (content(b"<html>login expired</html>"), NO_PICTURE),
    "noise.tif": (content(RNG.bytes(4000)), NO_PICTURE),
    "moving.png": (content(encoded("GIF", save_all=True, append_images=[NOISE])), "2 pictures in"),
    "moving.webp": (picture(save_all=True, append_images=[NOISE]), "2 pictures in"),
    "volume.png": (stored(array(BODY), "v.nii.gz", bytes), NO_PICTURE),
    "cut.png": (content(encoded("PNG")[:4000]), "broken picture"),
    "cut.jpg": (content(encoded("JPEG")[:1500]), "broken picture"),
    "cut.tif": (content(encoded("TIFF")[:4000]), "broken picture|" + NO_PICTURE),
    "cut.bmp": (content(encoded("BMP")[:4000]), "broken picture"),
    "raw_ycbcr.tif": (picture(EYE.convert("YCbCr")), "broken picture"),  # which Pillow writes but cannot read
    "damaged.png": (content(png_file(96, 96, 8, b"not zipped")), "broken picture"),
    "bomb.png": (content(png_file(60000, 60000, 8, zlib.compress(bytes(1000)))), "megapixels"),
    "text_bomb.png": (content(encoded("PNG", pnginfo=much_text())), "broken picture"),
    "wrong_sum.png": (stored(picture(), "g.png", lambda data: data[:90] + b"??" + data[92:]), "broken picture"),
    "cut_at_the_end.jpg": (content(encoded("JPEG")[:-300]), "broken picture"),
    "bits_3.png": (content(png_file(96, 96, 3, zlib.compress(bytes(9999)))), NO_PICTURE),
    "jpeg_2000.png": (content(encoded("JPEG2000")), NO_PICTURE),
    "page.png": (content(encoded("PDF")), NO_PICTURE),
    "drawing.png": (content(b"<svg xmlns='http://www.w3.org/2000/svg'></svg>"), NO_PICTURE),
    "device.png": (lambda path: path.symlink_to("/dev/zero"), "neither a file nor a folder"),
    "all_clear.png": (picture(see_through(EYE)), "got grey"),
    "fifteen.png": (picture(EYE.resize((15, 15))), "only 15x15 pixels"),
    "no_area.png": (content(png_file(0, 0, 8, zlib.compress(b""))), "broken picture|" + NO_PICTURE),
    "pages.tif": (content(encoded("TIFF", save_all=True, append_images=[NOISE])), "2 pages"),
    "pixel.png": (picture(Image.new("RGB", (1, 1), (9, 5, 1))), "only 1x1 pixels"),
    "row.png": (picture(EYE.resize((300, 1))), "only 300x1 pixels"),
    "column.jpg": (picture(EYE.resize((1, 300))), "only 1x300 pixels"),
    "grey.png": (picture(EYE.convert("L")), "got grey"),
    "grey_as_rgb.png": (picture(EYE.convert("L").convert("RGB")), "got grey"),
    "grey_alpha.png": (picture(EYE.convert("LA")), "got grey"),
    "grey_16.png": (picture(Image.fromarray(np.asarray(EYE.convert("L")).astype(np.uint16) * 257)), "got grey"),
    "black_white.png": (picture(EYE.convert("1")), "got grey"),
    "float.tif": (picture(EYE.convert("F")), "floating-point"),
    "black.png": (picture(Image.new("RGB", (96, 96))), "got grey"),
    "red.png": (picture(Image.new("RGB", (96, 96), (200, 60, 20))), "no optic disc"),
    "static.png": (picture(NOISE), None),  # among crops it is taken for one, and flagged
    "folder.png": (folder, "cannot be read|broken picture"),
    "loop.jpg": (loop, "no such file"),
    "pipe.png": (os.mkfifo, "neither a file nor a folder"),
    "gif.png": (content(encoded("GIF")), None),
    "webp.jpg": (content(encoded("WEBP")), None),
    "good.webp": (picture(), None),
    "good.ppm": (picture(), None),
    "good.gif": (picture(), None),
    "good.jfif": (picture(format="JPEG", quality=95), None),
    "good.png": (picture(), None),
    "good.jpg": (picture(quality=95), None),
    "good.tiff": (picture(), None),
    "good.bmp": (picture(), None),
    "LOUD.JPG": (content(encoded("JPEG", quality=95)), None),
    "jpeg.png": (content(encoded("JPEG", quality=95)), None),
    "progressive.jpg": (picture(quality=95, progressive=True), None),
    "worst.jpg": (picture(quality=20), None),
    "packed.tif": (picture(compression="tiff_lzw"), None),
    "deep.png": (content(png_of_16_bits(EYE)), None),
    "rgba.png": (picture(EYE.convert("RGBA")), None),
    "moves.png": (picture(save_all=True, append_images=[NOISE]), None),  # its first picture
    "two_in_one.jpg": (picture(format="MPO", save_all=True, append_images=[NOISE]), None),
    "bad_profile.jpg": (picture(icc_profile=b"nonsense", quality=95), None),
    "bad_exif.jpg": (picture(exif=b"Exif\0\0" + b"\xff" * 200, quality=95), None),
    "jpeg_within.tif": (picture(compression="jpeg"), None),
    "lab.tif": (picture(EYE.convert("LAB")), None),
    "transparent.png": (picture(transparent()), None),
    "palette.png": (picture(EYE.quantize(64)), None),
    "cmyk.jpg": (picture(EYE.convert("CMYK"), quality=95), None),
    "cmyk.tif": (picture(EYE.convert("CMYK")), None),
    "ycbcr.tif": (picture(EYE, compression="jpeg", quality=95), None),
    "turned.jpg": (turned, None),
    "wide.png": (picture(EYE.crop((0, 8, 96, 88))), None),
    "large.jpg": (large, None),
    "small.png": (picture(EYE.resize((24, 24))), None),
    "with space, comma & ümlaut.png": (picture(), None),
    "@device $x %y.png": (picture(), None),
    f"{'long' * 61}.png": (picture(), None),
    os.fsdecode(b"latin_\xfc.png"): (content(encoded("PNG")), None),
}  # fmt: skip
