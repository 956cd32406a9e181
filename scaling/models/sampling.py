"""Where along a ray to sample: stratified depths, importance sampling, and depths near the surfaces in cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scaling.cameras import Rays
from scaling.models import cpu_ops
from scaling.models.box import STEPS, Box, Parts
from scaling.models.cells import CELLS


def stratified_depths(near: Tensor, far: Tensor, samples: int, jitter: Tensor | None = None) -> Tensor:
    """One depth in each of `samples` equal strata between near and far. near, far [..., R] → [..., R, samples].

    jitter [..., R, samples] in [0, 1) places the depth in its stratum; None: the middle.
    """
    place = 0.5 if jitter is None else jitter
    steps = torch.arange(samples, dtype=near.dtype, device=near.device)
    return near[..., None] + (far - near)[..., None] * ((steps + place) / samples)


def importance_depths(depths: Tensor, weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw depths from the smoothed weights of a first pass, by inverting their piecewise-linear CDF.

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
        # Each uniform number falls into a bin of the CDF; inside the bin the depth is interpolated.
        above = torch.searchsorted(cdf, uniform.contiguous(), right=True)
        below = (above - 1).clamp(min=0)
        above = above.clamp(max=cdf.shape[-1] - 1)
        cdf_below, cdf_above = cdf.gather(-1, below), cdf.gather(-1, above)
        width = cdf_above - cdf_below
        width = torch.where(width < 1e-5, torch.ones_like(width), width)
        edge_below, edge_above = edges.gather(-1, below), edges.gather(-1, above)
        return edge_below + (uniform - cdf_below) / width * (edge_above - edge_below)


@dataclass(frozen=True)
class Samples:
    """Where rays [..., R] are sampled.

    depths [..., R, D], ascending; lengths [..., R, D − 1]: how much of the ray between two depths lies in cells above
    0; far [..., R]: where rays leave the box; hit [..., R] (bool): whether they meet a cell above 0. Distances are in
    `Box.unit`s.
    """

    depths: Tensor
    lengths: Tensor
    far: Tensor
    hit: Tensor

    def __getitem__(self, place: Any) -> Samples:
        return Samples(self.depths[place], self.lengths[place], self.far[place], self.hit[place])


def samples_in(box: Box, rays: Rays, cells: Tensor, samples: int, jitter: Tensor | None = None) -> Samples:
    """Samples of rays [S, R] in the cells [S, CELLS³] of their scenes; see `surface_depths`.

    Raises ValueError where cells have another shape.
    """
    if cells.shape[1:] != (CELLS**3,):
        raise ValueError(f"cells of shape {list(cells.shape)}: expected [S, {CELLS**3}]")
    if cpu_ops.takes(rays.origins, rays.directions):
        places = torch.full((*rays.origins.shape[:2], samples), 0.5) if jitter is None else jitter
        given = rays.origins, rays.directions, box.bounds, float(box.unit), cells, places
        return Samples(*cpu_ops.surface_samples(*given, STEPS, BLUR, EVENLY))
    parts = box.parts(rays, cells)
    return Samples(*surface_depths(parts, samples, jitter), parts.far, parts.hit)


BLUR = 1  # parts on each side of a surface that are sampled like the surface: a cell locates it to half a cell only
EVENLY = 0.3  # share of the samples spread evenly over all cells above 0, so that unknown surfaces are found


def surface_depths(parts: Parts, samples: int, jitter: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draw depths where a scene's cells show a surface.

    A part of length δ in a cell of value 1 + σ has the weight T (1 − exp(−σ' δ)) of volume rendering: T is the
    transmittance of the parts before it, σ' = σ + ½, and the ½ stands for density that is not known yet. The depths
    follow the distribution EVENLY · (even over parts above 0) + (1 − EVENLY) · (blurred weights): one in each of
    `samples` equal strata of its piecewise-linear CDF, which is inverted. jitter [..., R, samples] in [0, 1) places a
    depth in its stratum; None: the middle.

    → depths [..., R, samples], and how much of the ray between two of them is above 0, [..., R, samples − 1]. No
    gradient flows through them.
    """
    with torch.no_grad():
        above = (parts.values > 0).to(parts.length.dtype)
        # Weights of volume rendering; parts at 0 let all light through.
        optical = (parts.values.to(above.dtype) - 0.5) * above * parts.length[..., None]
        through = optical.cumsum(-1)
        weights = torch.exp(optical - through) * -torch.expm1(-optical)
        # A cell is coarser than a surface: the parts beside it take its weight too.
        blurred = F.max_pool1d(weights.flatten(0, -2)[:, None], 2 * BLUR + 1, stride=1, padding=BLUR)
        blurred = blurred.view(weights.shape) * above
        even = above / above.sum(-1, keepdim=True).clamp(min=1)
        mass = EVENLY * even + (1 - EVENLY) * blurred / blurred.sum(-1, keepdim=True).clamp(min=1e-9)
        cdf = F.pad(mass.cumsum(-1), (1, 0))
        cdf = cdf / cdf[..., -1:].clamp(min=1e-9)
        # Invert the CDF; then the lengths are differences of the length above 0 that lies before each depth.
        length_before = F.pad(above.cumsum(-1), (1, 0))
        strata = torch.arange(samples, dtype=cdf.dtype, device=cdf.device)
        places = (strata + (0.5 if jitter is None else jitter)) / samples
        at = _invert(cdf, places.expand(*cdf.shape[:-1], samples))
        whole = at.floor().long().clamp(0, mass.shape[-1] - 1)  # a jitter of NaN takes part 0
        filled = length_before.gather(-1, whole) + above.gather(-1, whole) * (at - whole)
        step = parts.length[..., None]
        return parts.near[..., None] + at * step, (filled[..., 1:] - filled[..., :-1]) * step


def _invert(cdf: Tensor, uniform: Tensor) -> Tensor:
    """Places in [0, D] where a piecewise-linear CDF [..., R, D + 1] over D parts has the values [..., R, N]."""
    above = torch.searchsorted(cdf, uniform.contiguous(), right=True).clamp(1, cdf.shape[-1] - 1)
    low, high = cdf.gather(-1, above - 1), cdf.gather(-1, above)
    return (above - 1) + ((uniform - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
