"""A scene's surface: where its density lets no more light through, by marching cubes.

A point is inside where a texel's width of its density would let less than half of the light through: σ ≥ ln 2 / texel,
the finest that planes can tell. The cubes interpolate raw densities, as the renderer does between samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaling.cameras import Rays
from scaling.models.box import Box, cell_numbers
from scaling.models.shared import SharedModel

AT_ONCE = 1 << 16  # points looked up together
NEEDS = "meshes need scikit-image and trimesh: pip install 'scaling[mesh]'"


class NoSurface(ValueError):
    """A scene is nowhere dense enough to have a surface."""


@dataclass(frozen=True)
class DensityGrid:
    """raw [X, Y, Z]: raw densities at points from the low to the high corner of the box [2, 3], both included; level:
    the raw density of the surface. Where no object ever is, and no ray was ever sampled, raw is below the level."""

    raw: Tensor
    bounds: Tensor
    level: float

    @property
    def spacing(self) -> Tensor:
        """Distance [3] of neighbouring points along x, y and z, world units."""
        return (self.bounds[1] - self.bounds[0]) / (torch.tensor(self.raw.shape) - 1)


@dataclass(frozen=True)
class Surface:
    """vertices [N, 3] (world coordinates, z up), faces [M, 3] (counter-clockwise from outside), normals [N, 3] (unit,
    outwards)."""

    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]
    normals: NDArray[np.float32]


def texel(shared: SharedModel) -> float:
    """A plane's texel, world units: the mean over the box's sides."""
    low, high = shared.renderer.box.bounds
    return (high - low).mean().item() / shared.settings.representation.resolution


def surface_density(shared: SharedModel) -> float:
    """σ, per world unit, at which a texel's width lets half of the light through."""
    return math.log(2) / texel(shared)


@torch.no_grad()
def density_grid(shared: SharedModel, planes: Tensor, num_points: int) -> DensityGrid:
    """Raw densities of a tri-plane [P, F, K, K], at num_points along the box's longest side."""
    box = shared.renderer.box
    bounds = box.bounds
    sides = bounds[1] - bounds[0]
    counts = [max(2, round((num_points - 1) * (side / sides.max()).item()) + 1) for side in sides]
    axes = [torch.linspace(low, high, count) for low, high, count in zip(*bounds.tolist(), counts)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
    raw = torch.cat([query(shared, planes, part)[0].cpu() for part in points.split(AT_ONCE)])
    level = math.log(math.expm1(surface_density(shared))) + 1  # the inverse of softplus(raw − 1)
    if box.side is None:
        filled = torch.cat([_is_filled(box, part.to(shared.device)).cpu() for part in points.split(AT_ONCE)])
        raw = torch.where(filled, raw, min(raw.min().item(), level - 1))
    return DensityGrid(raw.view(*counts), bounds, level)


def query(shared: SharedModel, planes: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The field of a tri-plane at points [N, 3] (world coordinates) → raw densities [N], colours [N, C]."""
    still = Rays(points.to(shared.device)[None], torch.zeros_like(points, device=shared.device)[None])
    depths = still.origins[..., :1] * 0
    raw, colours = shared.renderer.query(planes[None], shared.field, shared.renderer.box.into(still), depths)
    return raw[0, :, 0], colours[0, :, 0]


def _is_filled(box: Box, points: Tensor) -> Tensor:
    inside = box.into(Rays(points, torch.zeros_like(points)))
    return box.filled.flatten()[cell_numbers(inside, points[:, :1] * 0)[:, 0]]


def find_surface(grid: DensityGrid) -> Surface:
    """Closed, as what is beyond the box counts as empty. NoSurface where nothing is dense enough; RuntimeError with the
    pip command where scikit-image is not installed."""
    try:
        from skimage.measure import marching_cubes
    except ImportError as error:
        raise RuntimeError(NEEDS) from error
    highest = grid.raw.max().item()
    if highest <= grid.level:
        raise NoSurface(f"its raw density is at most {highest:.3g}, a surface needs {grid.level:.3g}: it shows nothing")
    empty = min(grid.raw.min().item(), grid.level - 1)
    volume = np.pad(grid.raw.numpy(), 1, constant_values=empty)
    vertices, faces, normals, _ = marching_cubes(volume, grid.level, spacing=tuple(grid.spacing.tolist()))
    vertices += (grid.bounds[0] - grid.spacing).numpy()
    return Surface(vertices.astype(np.float32), faces[:, ::-1].astype(np.int32), normals.astype(np.float32))
