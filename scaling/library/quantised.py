"""Micro planes as whole numbers: int8, or int4 with two numbers in a byte; one scale per plane and channel."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RANGE = {"int8": (-127, 127), "int4": (-8, 7)}
# With 16 levels, finer steps gain more than clipping the largest values costs: 2 dB on bell-shaped ones. A scale below
# 0 turns the longer side of -8..7 to where the values need it: 0.5 dB more.
CLIPPINGS = tuple(sign * part / 10 for part in range(3, 11) for sign in (1, -1))


def quantise(micro: Tensor, dtype: str) -> tuple[NDArray[np.int8], list[float]]:
    """micro [P, F_mic, K, K] → whole numbers of the same shape, scales [P · F_mic]: micro ≈ numbers · scale.

    int8: the largest value of a channel becomes 127; int4: that of CLIPPINGS with the least squared error.
    """
    peak = micro.flatten(2).abs().amax(2) if micro.numel() else micro.new_zeros(micro.shape[:2])
    scale = (peak / -RANGE[dtype][0]).clamp(min=1e-12)[..., None, None]
    if dtype == "int4":
        scale = scale * _best_clipping(micro, scale)
    return _rounded(micro, scale, dtype).to(torch.int8).numpy(), scale.flatten().tolist()


def _best_clipping(micro: Tensor, widest: Tensor) -> Tensor:
    """Of each channel the one of CLIPPINGS that loses least; [P, F_mic, 1, 1]. widest: the scale that clips nothing."""
    errors = []
    for clipping in CLIPPINGS:
        scale = widest * clipping
        errors.append((_rounded(micro, scale, "int4") * scale - micro).square().sum((2, 3), keepdim=True))
    return micro.new_tensor(CLIPPINGS)[torch.stack(errors).argmin(0)]


def _rounded(micro: Tensor, scale: Tensor, dtype: str) -> Tensor:
    return (micro / scale).round().clamp(*RANGE[dtype])


def pack_int4(numbers: NDArray[np.int8]) -> bytes:
    """Numbers in -8..7, two's complement in 4 bits: the first of a pair in a byte's lower half. The last half of an odd
    count is 0."""
    halves = np.append(numbers.ravel(), np.zeros(numbers.size % 2, np.int8)).view(np.uint8) & 15
    return (halves[0::2] | halves[1::2] << 4).tobytes()


def unpack_int4(data: bytes, count: int) -> NDArray[np.int8]:
    """The first `count` numbers of packed bytes."""
    pairs = np.frombuffer(data, np.uint8)
    halves = np.stack([pairs & 15, pairs >> 4], axis=1).ravel()[:count]
    return (halves ^ 8).astype(np.int8) - np.int8(8)
