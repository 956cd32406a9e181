"""The renderer: rays → samples → field → quadrature, for S scenes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from scaling.cameras import Rays
from scaling.models.box import Box
from scaling.models.field import Field
from scaling.models.sampling import Samples, importance_depths, stratified_depths
from scaling.models.triplanes import Combine, point_features


@dataclass(frozen=True)
class RenderOutput:
    """colours [S, R, C] in [−1, 1], depth [S, R] (world units), opacity [S, R] in [0, 1]."""

    colours: Tensor
    depth: Tensor
    opacity: Tensor


def quadrature(
    depths: Tensor, raw_densities: Tensor, colours: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Volume rendering of intervals between samples. On a CPU, a frozen fit runs the same formulas as compiled loops
    (`cpu_kernels.composite_error`).

    depths [..., R, D], raw_densities [..., R, D], colours [..., R, D, C]; lengths [..., R, D − 1]: how much of each
    interval counts, where a part of it is known to be empty; None: all of it
    → colours [..., R, C] in [0, 1], depth [..., R], opacity [..., R], weights [..., R, D − 1].
    An interval's colour is the mean of its ends, its density softplus(mean raw − 1); α = 1 − exp(−density · length),
    weight = α Π (1 − α before it). The depth is the weighted mean of the intervals' middles, kept between the first and
    the last sample; an empty ray has the last sample's depth, and no gradient.

    >>> depths, raw, colours = torch.tensor([0.0, 1, 2]), torch.ones(3), torch.ones(3, 1)
    >>> quadrature(depths, raw, colours)[3]  # density = softplus(0) = ln 2: each unit of length stops half of the light
    tensor([0.5000, 0.2500])
    """
    lengths = depths[..., 1:] - depths[..., :-1] if lengths is None else lengths
    middle = (depths[..., 1:] + depths[..., :-1]) / 2
    density = softplus((raw_densities[..., 1:] + raw_densities[..., :-1]) / 2 - 1)
    colour = (colours[..., 1:, :] + colours[..., :-1, :]) / 2
    optical_depth = density * lengths
    before = torch.cumsum(optical_depth, -1) - optical_depth
    weights = torch.exp(-before) * (-torch.expm1(-optical_depth))
    opacity = weights.sum(-1)
    out = (weights[..., None] * colour).sum(-2)
    empty = opacity < 1e-8
    mean_depth = (weights * middle).sum(-1) / torch.where(empty, torch.ones_like(opacity), opacity)
    depth = torch.where(empty, depths[..., -1], mean_depth)
    return out, depth.clamp(depths[..., 0], depths[..., -1]), opacity, weights


def composite(colours: Tensor, opacity: Tensor, background: Tensor) -> Tensor:
    """Composite colours over the background (both in [0, 1]), and map to [−1, 1]: 2 (Σ w c + (1 − Σ w) b) − 1.

    colours [..., R, C] (Σ w c), opacity [..., R] (Σ w), background [C] or [..., R, C] (b).
    """
    return 2 * (colours + (1 - opacity[..., None]) * background) - 1


class Renderer(nn.Module):
    """Renders planes to colours; it has no parameters.

    near, far: fixed distances, world units, while all distances inside the renderer are in `Box.unit`s; None: where a
    ray enters and leaves the box (unused where samples are `chosen`). samples: strata a ray; importance_samples: drawn
    from a first pass, 0: one pass only.
    """

    def __init__(
        self,
        plane_axes: Sequence[str],
        box: Box,
        near: float | None,
        far: float | None,
        samples: int,
        importance_samples: int = 0,
        combine: Combine = "sum",
    ) -> None:
        super().__init__()
        self.combine: Combine = combine
        self.plane_axes = tuple(plane_axes)
        self.box = box
        self.near, self.far = near, far
        self.samples, self.importance_samples = samples, importance_samples

    @property
    def uniforms_per_ray(self) -> int:
        """How many random numbers in [0, 1) one ray takes: jitter of the strata, then importance samples."""
        return self.samples + self.importance_samples

    def forward(
        self,
        planes: Tensor,
        field: Field,
        rays: Rays,
        background: Tensor,
        uniforms: Tensor | None = None,
        chosen: Samples | None = None,
    ) -> RenderOutput:
        """Render rays [S, R] through planes [S, P, F, K, K], over a background [C] or [S, R, C] in [0, 1].

        uniforms [S, R, uniforms_per_ray] in [0, 1) place the samples in their strata; None: in the middles, so the
        picture is the same each time. chosen: the samples of the rays, whose places are fixed already; None: strata of
        equal length between the ends that `span` returns.
        """
        lengths = None
        if chosen is not None:
            depths, lengths = chosen.depths, chosen.lengths
        else:
            jitter = None if uniforms is None else uniforms[..., : self.samples]
            depths = stratified_depths(*self.span(rays)[:2], self.samples, jitter)
        inside = self.box.into(rays)
        raw, colours = self.query(planes, field, inside, depths)
        # The second pass adds samples where the first found density; both are composited together.
        if self.importance_samples:
            *_, weights = quadrature(depths, raw, colours)
            fine = importance_depths(depths, weights, self._importance_uniforms(depths, uniforms))
            fine_raw, fine_colours = self.query(planes, field, inside, fine)
            depths, order = torch.cat([depths, fine], -1).sort(-1)
            raw = torch.cat([raw, fine_raw], -1).gather(-1, order)
            colours = torch.cat([colours, fine_colours], -2)
            colours = colours.gather(-2, order[..., None].expand_as(colours))
        out, depth, opacity, _ = quadrature(depths, raw, colours, lengths)
        return RenderOutput(composite(out, opacity, background), depth * self.box.unit, opacity)

    def span(self, rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
        """The part of each ray [..., R] that is sampled → near, far (in `Box.unit`s), and whether there is any (bool),
        all [..., R]: those of `Box.span`, or for every ray the fixed near and far."""
        if self.near is None or self.far is None:
            return self.box.span(rays)
        like = rays.origins[..., 0]
        every = torch.ones_like(like) / self.box.unit
        return every * self.near, every * self.far, every.bool()

    def query(self, planes: Tensor, field: Field, inside: Rays, depths: Tensor) -> tuple[Tensor, Tensor]:
        """Query the field at depths [S, R, D] of rays in the box's coordinates → raw densities [S, R, D], colours
        [S, R, D, C]."""
        points = inside.origins[..., None, :] + depths[..., None] * inside.directions[..., None, :]
        features = point_features(planes, points.flatten(1, 2), self.plane_axes, self.combine)
        raw, colours = field(features)
        return raw.unflatten(1, depths.shape[1:]), colours.unflatten(1, depths.shape[1:])

    def densities(self, planes: Tensor, field: Field, points: Tensor) -> Tensor:
        """Densities [N] of one scene's tri-planes [1, P, F, K, K] at points [N, 3] in the box's coordinates."""
        features = point_features(planes, points[None], self.plane_axes, self.combine)
        return softplus(field(features)[0][0] - 1)

    def _importance_uniforms(self, depths: Tensor, uniforms: Tensor | None) -> Tensor:
        if uniforms is not None:
            return uniforms[..., self.samples :]
        steps = torch.arange(self.importance_samples, dtype=depths.dtype, device=depths.device)
        middle = (steps + 0.5) / self.importance_samples
        return middle.expand(*depths.shape[:-1], self.importance_samples)
