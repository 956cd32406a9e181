"""Micro planes as few whole numbers: levels · scale, one scale a plane and channel."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = {"int3": (-4, 3), "int4": (-8, 7), "int5": (-16, 15), "int6": (-32, 31), "int8": (-128, 127)}
# With few levels, finer steps gain more than clipping the largest values costs: 2 dB on bell-shaped ones. A scale below
# 0 turns the longer side of -8..7 to where the values need it: 0.5 dB more.
CLIPPINGS = tuple(sign * part / 10 for part in range(3, 11) for sign in (1, -1))
SEARCHED = ("int3", "int4", "int5", "int6")  # with more levels clipping gains nothing


def best_scale(micro: Tensor, dtype: str) -> Tensor:
    """micro [..., P, F_mic, K, K] → scales [..., P, F_mic, 1, 1]: that of CLIPPINGS that loses least (squared error),
    or the one that clips nothing.

    Planes that are rounded already come out as they are: the scales that give the largest value one of the levels are
    tried, too.
    """
    low, _ = LEVELS[dtype]
    flat = micro.flatten(-2)
    peak = flat.abs().amax(-1) if micro.numel() else micro.new_zeros(micro.shape[:-2])
    widest = (peak / -low).clamp(min=1e-12)[..., None, None]
    if dtype not in SEARCHED:
        return widest * (low / (low + 1))  # symmetric: 127 levels each way
    tried = (*CLIPPINGS, *(sign * low / level for level in range(low + 1, 0) for sign in (1, -1)))
    best, least = widest, torch.full_like(widest, torch.inf)
    for clipping in tried:
        scale = widest * clipping
        error = (to_levels(micro, scale, dtype) * scale - micro).square().sum((-2, -1), keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def to_levels(micro: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """The nearest levels, as floats; the same shape."""
    return (micro / scale).round_().clamp_(*LEVELS[dtype])


def rounded(micro: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """micro as it is stored and read again."""
    return to_levels(micro, scale, dtype).mul_(scale)
