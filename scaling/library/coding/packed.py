"""Whole numbers and hulls as bytes: arithmetic coding with neighbours as context, and a checksum.

Neighbouring levels of a micro plane are alike, and neighbouring cells of a hull are nearly always the same. With the
numbers above and left of them as context, levels take 20 % less than with Huffman codes, and a hull takes half of what
deflate leaves. Rows of format 4 hold Huffman codes and deflated hulls: their bytes do not match the checksum, so they
are decompressed instead.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.library.coding.arithmetic import HULL, PLANES, decode, encode
from scaling.models.cells import CELLS

SCALED = ("coded", "int8", "int4")  # types whose numbers are multiplied by scales
MOST_LEVELS = 1 << 24  # a scene: a small file must not keep its reader busy for hours
CHECKSUM = 4  # bytes


def encode_levels(levels: NDArray[Any], bits: int) -> bytes:
    """Signed whole numbers [P, F_mic, K, K] of `bits` bits as bytes; the first byte is `bits`. b"" without numbers.

    Raises ValueError where there are more than MOST_LEVELS.
    """
    if not levels.size:
        return b""
    if levels.size > MOST_LEVELS:
        raise ValueError(f"micro planes of {levels.size:,} numbers a scene; at most {MOST_LEVELS:,} are stored coded")
    grids = levels.reshape(-1, *levels.shape[2:])
    numbers = (grids.astype(np.int16) + (1 << bits >> 1)).astype(np.uint8)
    return bytes([bits]) + _encoded(numbers, bits, PLANES)


def decode_levels(data: bytes, shape: Sequence[int]) -> NDArray[np.int8]:
    """The numbers [P, F_mic, K, K] that `encode_levels` coded, or that a row of format 4 holds. Raises ValueError where
    the bytes are damaged or hold more or fewer numbers."""
    planes, features, height, width = shape
    count = planes * features * height * width
    if not (count or data):
        return np.zeros(tuple(shape), np.int8)
    if count > MOST_LEVELS:
        raise ValueError(f"micro planes of {count:,} numbers a scene; at most {MOST_LEVELS:,} are decoded")
    bits = data[0] if data else 0
    if 1 <= bits <= 8:
        found = _decoded(data[1:], (planes * features, height, width), bits, PLANES)
        if found is not None:
            return (found.astype(np.int16) - (1 << bits >> 1)).astype(np.int8).reshape(tuple(shape))
    return np.frombuffer(_decompressed(data, count), np.int8).reshape(tuple(shape))


def pack_hull(hull: NDArray[np.bool_]) -> bytes:
    """A visual hull [CELLS³] (bool) as bytes."""
    return _encoded(hull.astype(np.uint8).reshape(CELLS, CELLS, CELLS), 1, HULL)


def unpack_hull(data: bytes) -> NDArray[np.bool_]:
    """The hull [CELLS³] (bool) that `pack_hull` coded, or that a row of format 4 holds. Raises ValueError where the
    bytes are damaged or hold more or fewer cells."""
    found = _decoded(data, (CELLS, CELLS, CELLS), 1, HULL)
    if found is not None:
        return found.ravel() > 0
    cells = np.frombuffer(_decompressed(data, (CELLS**3 + 7) // 8), np.uint8)
    return np.unpackbits(cells, count=CELLS**3).astype(bool)


def _encoded(numbers: NDArray[np.uint8], bits: int, kind: int) -> bytes:
    room = np.empty(2 * bits * numbers.size + 64, np.uint8)
    length = int(encode(numbers, bits, kind, room))
    return room[:length].tobytes() + _checksum(numbers)


def _decoded(data: bytes, shape: tuple[int, int, int], bits: int, kind: int) -> NDArray[np.uint8] | None:
    """The coded numbers, or None where the bytes do not decode to exactly this many numbers."""
    stream = np.frombuffer(data, np.uint8)[:-CHECKSUM]
    if len(stream) < 5 or stream[0]:
        return None
    numbers = np.empty(shape, np.uint8)
    read = decode(stream, bits, kind, numbers)
    return numbers if read == len(stream) and _checksum(numbers) == data[-CHECKSUM:] else None


def _checksum(numbers: NDArray[np.uint8]) -> bytes:
    return zlib.crc32(numbers.tobytes()).to_bytes(CHECKSUM, "little")


def _decompressed(data: bytes, length: int) -> bytes:
    """The `length` bytes that a row of format 4 holds deflated. No more than `length` + 1 are ever unpacked."""
    try:
        decoder = zlib.decompressobj(-zlib.MAX_WBITS)
        found = decoder.decompress(data, length + 1)
    except (zlib.error, OverflowError) as error:
        raise ValueError(f"its bytes are damaged ({error})") from None
    if len(found) != length or not decoder.eof:
        raise ValueError(f"its bytes do not unpack to {length}")
    return found


def unpack_int4(data: bytes, count: int) -> NDArray[np.int8]:
    """The first `count` numbers of a row of format 3, in −8..7: two's complement in 4 bits, the first of a pair in the
    lower half of its byte."""
    pairs = np.frombuffer(data, np.uint8)
    halves = np.stack([pairs & 15, pairs >> 4], axis=1).ravel()[:count]
    return (halves ^ 8).astype(np.int8) - np.int8(8)
