"""Whole numbers and hulls as bytes.

Levels of micro planes are bell-shaped: their entropy is a quarter below the bits that they would take. So they are
written one a byte and coded by Huffman's method (zlib's, without its search for repetitions: there are none).
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaling.models.box import CELLS

SCALED = ("coded", "int8", "int4")  # what is multiplied by scales


def encode_levels(levels: Tensor) -> bytes:
    """Whole numbers in −128..127, any shape."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(levels.to(torch.int8).numpy().tobytes()) + coder.flush()


def decode_levels(data: bytes, count: int) -> NDArray[np.int8]:
    """The `count` numbers of `encode_levels`. ValueError where the bytes hold more or less, or are damaged."""
    return np.frombuffer(_decompressed(data, count), np.int8)


def pack_hull(hull: Tensor) -> bytes:
    """A visual hull [CELLS³] (bool): eight cells a byte, deflated."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return coder.compress(np.packbits(hull.cpu().numpy()).tobytes()) + coder.flush()


def unpack_hull(data: bytes) -> Tensor:
    """The hull [CELLS³] of `pack_hull`. ValueError where the bytes hold more or less, or are damaged."""
    bits = np.frombuffer(_decompressed(data, (CELLS**3 + 7) // 8), np.uint8)
    return torch.from_numpy(np.unpackbits(bits, count=CELLS**3).astype(bool))


def _decompressed(data: bytes, length: int) -> bytes:
    """Never more than `length` + 1 bytes are unpacked, whatever the data claims."""
    try:
        decoder = zlib.decompressobj(-zlib.MAX_WBITS)
        found = decoder.decompress(data, length + 1)
    except (zlib.error, OverflowError) as error:
        raise ValueError(f"its bytes are damaged ({error})") from None
    if len(found) != length or not decoder.eof:
        raise ValueError(f"its bytes do not unpack to {length}")
    return found


def unpack_int4(data: bytes, count: int) -> NDArray[np.int8]:
    """The first `count` numbers of rows of format 3: in −8..7, two's complement in 4 bits, the first of a pair in a
    byte's lower half."""
    pairs = np.frombuffer(data, np.uint8)
    halves = np.stack([pairs & 15, pairs >> 4], axis=1).ravel()[:count]
    return (halves ^ 8).astype(np.int8) - np.int8(8)
