"""Micro planes as small whole numbers: levels · scale, with one scale per plane and channel."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = {"int3": (-4, 3), "int4": (-8, 7), "int5": (-16, 15), "int6": (-32, 31), "int8": (-128, 127)}
# With few levels, a smaller scale gains more by finer steps than it loses by clipping the largest values: 2 dB for
# bell-shaped values. A negative scale turns the longer side of −8..7 to the sign that needs it: 0.5 dB more.
CLIPPINGS = tuple(sign * part / 10 for part in range(3, 11) for sign in (1, -1))
SEARCHED = ("int3", "int4", "int5", "int6")  # with more levels clipping gains nothing


def best_scale(micro: Tensor, dtype: str) -> Tensor:
    """Scales that round micro planes best. micro [..., P, F_mic, K, K] → [..., P, F_mic, 1, 1].

    For types in SEARCHED, the scale with the least squared error of those in CLIPPINGS and those that put the largest
    value on one of the levels; thanks to the latter, planes that are rounded already stay as they are. For other types,
    the scale that clips nothing.
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
    """The nearest levels of micro / scale, as floats; the same shape."""
    return (micro / scale).round_().clamp_(*LEVELS[dtype])


def rounded(micro: Tensor, scale: Tensor, dtype: str) -> Tensor:
    """Micro planes as they are after storing and reading: levels · scale."""
    return to_levels(micro, scale, dtype).mul_(scale)
