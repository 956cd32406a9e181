"""Where along a ray to sample: stratified depths, and importance sampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def stratified_depths(near: Tensor, far: Tensor, samples: int, jitter: Tensor | None = None) -> Tensor:
    """One depth in each of `samples` equal strata between near and far. near, far [..., R] → [..., R, samples].

    jitter [..., R, samples] in [0, 1) places the depth in its stratum; None: the middle.
    """
    place = 0.5 if jitter is None else jitter
    steps = torch.arange(samples, dtype=near.dtype, device=near.device)
    return near[..., None] + (far - near)[..., None] * ((steps + place) / samples)


def importance_depths(depths: Tensor, weights: Tensor, uniform: Tensor) -> Tensor:
    """Depths drawn from the smoothed weights of a first pass, by inverting their piecewise-linear CDF.

    depths [..., R, D] sorted, weights [..., R, D − 1] of the intervals, uniform [..., R, N] in [0, 1) → [..., R, N].
    Smoothing: max-pool (2, stride 1, pad 1), mean-pool (2, stride 1), + 0.01. Bins lie between the mid-points of
    the depths; their probabilities are the inner weights + 1e-5. No gradient flows through the drawn depths.
    """
    with torch.no_grad():
        lead = weights.shape[:-1]
        flat = weights.reshape(-1, 1, weights.shape[-1])
        smooth = F.avg_pool1d(F.max_pool1d(flat, 2, stride=1, padding=1), 2, stride=1).reshape(*lead, -1) + 0.01
        edges = 0.5 * (depths[..., 1:] + depths[..., :-1])
        probability = smooth[..., 1:-1] + 1e-5
        probability = probability / probability.sum(-1, keepdim=True)
        cdf = F.pad(probability.cumsum(-1), (1, 0))
        above = torch.searchsorted(cdf, uniform.contiguous(), right=True)
        below = (above - 1).clamp(min=0)
        above = above.clamp(max=cdf.shape[-1] - 1)
        cdf_below, cdf_above = cdf.gather(-1, below), cdf.gather(-1, above)
        width = cdf_above - cdf_below
        width = torch.where(width < 1e-5, torch.ones_like(width), width)
        edge_below, edge_above = edges.gather(-1, below), edges.gather(-1, above)
        return edge_below + (uniform - cdf_below) / width * (edge_above - edge_below)
