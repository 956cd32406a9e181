"""Read PNG and JPEG files, write PNG: headers are checked before decoding; errors of decoding become ValueErrors."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scaling.data.readers.zip_paths import read_file

MAX_IMAGE_SIDE = 4096  # pixels; larger images are refused before they are decoded
MAX_SCANS = 64  # of a JPEG; usual progressive ones have 10
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KEPT = {2: 3, 6: 4}  # colour type of a PNG (RGB, RGBA) → number of channels
# What Pillow raises for damaged files; found by damaging files at random.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error,
    Image.DecompressionBombError, Image.DecompressionBombWarning,  # the latter where warnings are errors
)  # fmt: skip


def png_size(data: bytes) -> tuple[int, int]:
    """Read (width, height) from a PNG's header, without decoding.

    Raises ValueError where the bytes are not a PNG, or where a side has no pixels or more than 4096.
    """
    if len(data) < 33 or not data.startswith(_SIGNATURE) or data[12:16] != b"IHDR":
        what = "not a PNG or JPEG file: convert it, other formats are not read"
        raise ValueError(what if data else "the file is empty")
    return _checked(*struct.unpack(">II", data[16:24]))


def _checked(width: int, height: int) -> tuple[int, int]:
    if not (0 < width <= MAX_IMAGE_SIDE and 0 < height <= MAX_IMAGE_SIDE):
        raise ValueError(f"the image has {width}x{height} pixels; at most {MAX_IMAGE_SIDE} a side are read")
    return width, height


def decode_png(data: bytes) -> NDArray[np.uint8]:
    """Decode PNG bytes → [H, W, 3] RGB, composited on white. Raises ValueError as `decode_layers` does."""
    return on_white(decode_layers(data))


def on_white(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Composite [H, W, 4] RGBA on white → [H, W, 3] RGB; return [H, W, 3] RGB as it is."""
    if pixels.shape[2] == 3:
        return pixels
    layer = Image.fromarray(pixels)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))


def decode_layers(data: bytes) -> NDArray[np.uint8]:
    """Decode PNG bytes → [H, W, 3] RGB, or [H, W, 4] RGBA where some pixel is transparent.

    Greyscale becomes colour. Raises ValueError where `png_size` does, and where the image is damaged.
    """
    size = png_size(data)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.size != size:
                raise ValueError("it has a second header, of another size")
            image.load()
            if image.mode.startswith("I"):  # 16 bits a pixel
                return np.repeat((np.asarray(image.convert("I"))[..., None] >> 8).astype(np.uint8), 3, axis=2)
            if image.mode in ("RGBA", "P", "LA", "PA") or (image.mode == "RGB" and "transparency" in image.info):
                pixels = np.asarray(image.convert("RGBA"))
                return pixels if pixels[..., 3].min() < 255 else np.ascontiguousarray(pixels[..., :3])
            if image.mode in ("L", "1") and "transparency" in image.info:
                return np.asarray(image.convert("RGBA"))
            return np.asarray(image.convert("RGB"))
    except _DAMAGED as error:
        raise ValueError(f"the image is damaged or cut short ({error})") from error


def decode_jpeg(data: bytes) -> NDArray[np.uint8]:
    """Decode JPEG bytes → [H, W, 3] RGB. Raises ValueError where it has over 4096 pixels a side, or is damaged."""
    # Each scan of a progressive file goes over all pixels, and takes 33 bytes. Coded pixels never hold these two bytes.
    if (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise ValueError(f"the image has {scans} scans; at most {MAX_SCANS} are read")
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            _checked(*image.size)  # Pillow has read the header alone
            return np.asarray(image.convert("RGB"))
    except _DAMAGED as error:
        raise ValueError(f"the image is damaged or cut short ({error})") from error


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode [H, W, 3] RGB or [H, W, 4] RGBA → PNG bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", compress_level=6)
    return out.getvalue()


def read_image(path: Path) -> tuple[bytes, tuple[int, int]]:
    """Read a PNG or JPEG file → bytes of an 8-bit PNG, RGB or (where some pixel is transparent) RGBA, and (width,
    height).

    Of a file that is such a PNG already, the chunks that make its picture are kept; others are re-encoded. So nothing
    else that a file may carry comes into a store. The path may lead through a zip file. Raises ValueError where the
    file is unreadable, damaged or over 4096 pixels a side.
    """
    data = read_file(path)
    if data.startswith(b"\xff\xd8"):
        pixels = decode_jpeg(data)
        return encode_png(pixels), (pixels.shape[1], pixels.shape[0])
    size = png_size(data)
    pixels = decode_layers(data)  # even where the bytes are kept: a cut-short file must be found here, not in a fit
    plain = data[24] == 8 and _KEPT.get(data[25]) == pixels.shape[2] and b"tRNS" not in data[: data.find(b"IDAT")]
    kept = picture_of(data) if plain else b""
    # An encoder may waste a little, but what is far longer than the pixels themselves carries something else.
    fits = 0 < len(kept) <= pixels.nbytes + pixels.nbytes // 64 + 4096
    return (kept if fits else encode_png(pixels)), size


def with_mask(image: bytes, mask: bytes) -> bytes:
    """A PNG whose alpha is a mask, another PNG of the same size: white is kept, black is transparent. Raises ValueError
    where their sizes differ."""
    pixels, kept = decode_layers(image), on_white(decode_layers(mask))
    if kept.shape[:2] != pixels.shape[:2]:
        raise ValueError(
            f"the mask has {kept.shape[1]}x{kept.shape[0]} pixels, its image {pixels.shape[1]}x{pixels.shape[0]}"
        )
    return encode_png(np.dstack([pixels[..., :3], kept[..., 0]]))


def picture_of(data: bytes) -> bytes:
    """The header, pixels and end of a PNG without palette, without all its other chunks and what stands behind its end.

    b"" where the chunks are cut short.
    """
    parts, place = [_SIGNATURE], len(_SIGNATURE)
    while place + 12 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 12 + length  # of the chunk: length, kind, content, checksum
        if kind in (b"IHDR", b"IDAT", b"IEND"):
            parts.append(data[place:end])
        if kind == b"IEND":
            return b"".join(parts)
        place = end
    return b""
