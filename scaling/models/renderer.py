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
    """Volume rendering by the mid-point rule: density and colour of an interval are the means of its two ends.

    depths [..., R, D], raw_densities [..., R, D], colours [..., R, D, C]; lengths [..., R, D − 1]: how much of each
    interval counts, where a part of it is known to be empty; None: all of it
    → colours [..., R, C] in [0, 1], depth [..., R], opacity [..., R], weights [..., R, D − 1].
    density = softplus(mean raw − 1), α = 1 − exp(−density δ), weight = α Π (1 − α before it). The depth is the mean
    depth of the weights, kept between the ray's own ends (an empty ray gets its far end, with no gradient).
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
    """Colours over the background (both in [0, 1]), mapped to [−1, 1]: 2 (Σ w c + (1 − Σ w) b) − 1.

    colours [..., R, C], opacity [..., R], background [C] or [..., R, C].
    """
    return 2 * (colours + (1 - opacity[..., None]) * background) - 1


class Renderer(nn.Module):
    """How planes become colours; it has no parameters. near and far None: where a ray crosses what the box holds."""

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
        """Random numbers in [0, 1) that one ray takes: jitter of the strata, then importance samples."""
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
        """planes [S, P, F, K, K], rays [S, R], background [C] or [S, R, C], and uniforms
        [S, R, uniforms_per_ray], both in [0, 1]; chosen: where the rays are sampled; None: evenly, in all of the box or
        between near and far.

        Without uniforms every sample lies in the middle of its stratum: the same picture each time.
        """
        lengths = None
        if chosen is not None:
            depths, lengths = chosen.depths, chosen.lengths
        else:
            jitter = None if uniforms is None else uniforms[..., : self.samples]
            depths = stratified_depths(*self.span(rays)[:2], self.samples, jitter)
        inside = self.box.into(rays)
        raw, colours = self.query(planes, field, inside, depths)
        if self.importance_samples:
            *_, weights = quadrature(depths, raw, colours)
            fine = importance_depths(depths, weights, self._importance_uniforms(depths, uniforms))
            fine_raw, fine_colours = self.query(planes, field, inside, fine)
            depths, order = torch.cat([depths, fine], -1).sort(-1)
            raw = torch.cat([raw, fine_raw], -1).gather(-1, order)
            colours = torch.cat([colours, fine_colours], -2)
            colours = colours.gather(-2, order[..., None].expand_as(colours))
        out, depth, opacity, _ = quadrature(depths, raw, colours, lengths)
        return RenderOutput(composite(out, opacity, background), depth, opacity)

    def span(self, rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
        """The part of each ray that is sampled: near and far [..., R], world units, and whether there is any [..., R]
        (bool): of what crosses the box, or of all rays between a fixed near and far."""
        if self.near is None or self.far is None:
            return self.box.span(rays)
        like = rays.origins[..., 0]
        return torch.full_like(like, self.near), torch.full_like(like, self.far), torch.ones_like(like).bool()

    def query(self, planes: Tensor, field: Field, inside: Rays, depths: Tensor) -> tuple[Tensor, Tensor]:
        """Field at depths [S, R, D] of rays in the box's coordinates → raw densities [S, R, D], colours [S, R, D, C];
        plane features are combined as `combine` says."""
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
