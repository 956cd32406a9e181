"""PNG files: a header check before anything is decoded, and plain errors for files that cannot be read."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scaling.data.source_files import read_file

MAX_IMAGE_SIDE = 4096  # pixels; a larger header is refused before anything is decoded
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPE_RGB = 2
# What Pillow raises where bytes are wrong, found by damaging files at random.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,  # the latter where warnings are errors
)  # fmt: skip


def png_size(data: bytes) -> tuple[int, int]:
    """(width, height) in a PNG's header, nothing decoded. ValueError: not a PNG, empty, or over 4096 a side."""
    if len(data) < 33 or not data.startswith(_SIGNATURE) or data[12:16] != b"IHDR":
        raise ValueError("not a PNG file: convert it, other formats are not read" if data else "the file is empty")
    width, height = struct.unpack(">II", data[16:24])
    if not (0 < width <= MAX_IMAGE_SIDE and 0 < height <= MAX_IMAGE_SIDE):
        raise ValueError(f"the image has {width}x{height} pixels; at most {MAX_IMAGE_SIDE} a side are read")
    return width, height


def decode_png(data: bytes) -> NDArray[np.uint8]:
    """PNG bytes → [H, W, 3] RGB; transparency is composited on white. ValueError where it cannot be read."""
    size = png_size(data)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.size != size:
                raise ValueError("it has a second header, of another size")
            image.load()
            if image.mode in ("RGBA", "P") or (image.mode == "RGB" and "transparency" in image.info):
                layer = image.convert("RGBA")
                return np.asarray(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))
            if image.mode == "RGB":
                return np.asarray(image)
            mode = image.mode
    except _DAMAGED as error:
        raise ValueError(f"the image is damaged or cut short ({error})") from error
    raise ValueError(f"expected a colour image (RGB or RGBA), got one of mode {mode} (greyscale?): convert it")


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """[H, W, 3] RGB → PNG bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", compress_level=6)
    return out.getvalue()


def read_png(path: Path) -> tuple[bytes, tuple[int, int]]:
    """A file's 8-bit RGB PNG bytes and (width, height). One that is such a PNG keeps its bytes; others are re-encoded.

    ValueError: unreadable, damaged, greyscale or over 4096 pixels a side. The path may lead through a zip file.
    """
    data = read_file(path)
    size = png_size(data)
    pixels = decode_png(data)  # also where the bytes are kept: a cut-short file must be found here, not in a fit
    plain = data[24] == 8 and data[25] == _COLOUR_TYPE_RGB and b"tRNS" not in data[: data.find(b"IDAT")]
    return (data if plain else encode_png(pixels)), size
