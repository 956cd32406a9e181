"""A scene's surface, by marching cubes at the density whose outlines match what the renderer shows as half opaque.

Fitted densities have no sharp step: they are a fog that thickens inwards, so no single density is the surface of every
scene. For each scene the density is taken whose silhouettes, seen from all around, overlap most with the pixels that
are at least half opaque. Marching cubes interpolate raw densities, as the renderer does between samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from scaling.cameras import Rays, pixel_rays
from scaling.models.box import OLD_CELLS, Box, cell_numbers
from scaling.models.cells import CELLS
from scaling.models.shared_model import SharedModel

AT_ONCE = 1 << 16  # points, or rays, looked up together
OUTLINE_SIZE = 48  # pixels a side of the views in which outlines are compared
STEPS = 64  # points along a ray that crosses the box: finer than the texels of any plane need
SPECK = 0.01  # of the largest part's number of points: smaller parts are scraps of fog
NEEDS = "meshes need scikit-image and trimesh: pip install 'scaling[mesh]'"


class NoSurface(ValueError):
    """A scene shows nothing that has a surface; the message says why."""


@dataclass(frozen=True)
class DensityGrid:
    """raw [X, Y, Z]: raw densities at points from the low to the high corner of the box, both included; bounds [2, 3]:
    these corners; unit: length, in world units, that densities are per. Where no object can be, no ray was ever
    sampled: such points have the lowest value."""

    raw: Tensor
    bounds: Tensor
    unit: float = 1.0

    @property
    def spacing(self) -> Tensor:
        """Distances [3] between neighbouring points along x, y and z, world units."""
        return (self.bounds[1] - self.bounds[0]) / (torch.tensor(self.raw.shape) - 1)

    def at(self, points: Tensor) -> Tensor:
        """Interpolated raw densities at points [..., 3] in the box, world coordinates → [...]."""
        low, high = self.bounds
        inside = ((points - low) / (high - low) * 2 - 1).view(1, 1, 1, -1, 3)
        volume = self.raw.permute(2, 1, 0)[None, None]  # grid_sample takes x along the last axis
        found = F.grid_sample(volume, inside, align_corners=True, padding_mode="border")
        return found.view(points.shape[:-1])


@dataclass(frozen=True)
class Surface:
    """vertices [N, 3] (world coordinates, z up), faces [M, 3] (counter-clockwise from outside), normals [N, 3] (unit,
    outwards)."""

    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]
    normals: NDArray[np.float32]


@torch.no_grad()
def density_grid(shared: SharedModel, planes: Tensor, num_points: int, hull: Tensor | None = None) -> DensityGrid:
    """Raw densities of a tri-plane [P, F, K, K] on a grid with num_points along the box's longest side; outside of its
    hull [CELLS³] the lowest of them."""
    box = shared.renderer.box
    bounds = box.bounds
    sides = bounds[1] - bounds[0]
    counts = [max(2, round((num_points - 1) * (side / sides.max()).item()) + 1) for side in sides]
    axes = [torch.linspace(low, high, count) for low, high, count in zip(*bounds.tolist(), counts)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)
    raw = torch.cat([_query(shared, planes, part) for part in points.split(AT_ONCE)])
    # Older models have no hulls, but know which cells of the box stage 1's objects fill.
    if hull is not None or box.side is None:
        filled = torch.cat([_is_filled(box, part.to(shared.device), hull).cpu() for part in points.split(AT_ONCE)])
        raw = torch.where(filled, raw, raw.min())
    return DensityGrid(raw.view(*counts), bounds, float(box.unit))


def _query(shared: SharedModel, planes: Tensor, points: Tensor) -> Tensor:
    """Raw densities [N] of a tri-plane at points [N, 3], world coordinates."""
    # The renderer takes points on rays: each point is the origin of a ray of length 0.
    still = Rays(points.to(shared.device)[None], torch.zeros_like(points, device=shared.device)[None])
    depths = torch.zeros_like(still.origins[..., :1])
    return shared.renderer.query(planes[None], shared.field, shared.renderer.box.into(still), depths)[0][0, :, 0].cpu()


def _is_filled(box: Box, points: Tensor, hull: Tensor | None) -> Tensor:
    """Which of the points [N, 3], world coordinates, lie in cells of the hull, or of `box.filled` without one: [N]."""
    inside = box.into(Rays(points, torch.zeros_like(points)))
    cells, filled = (OLD_CELLS, box.filled.flatten()) if hull is None else (CELLS, hull)
    return filled[cell_numbers(inside, torch.zeros_like(points[:, :1]), cells)[:, 0]]


@torch.no_grad()
def outline_level(
    shared: SharedModel,
    planes: Tensor,
    grid: DensityGrid,
    cam2world: Tensor,
    intrinsics: Tensor,
    hull: Tensor | None = None,
) -> float:
    """The raw density (level) at which the surface has the outlines that the renderer shows.

    A ray meets the surface where the highest density on its way is above the level; it should meet the surface where
    its opacity is ½ or more. cam2world [V, 4, 4], intrinsics [V, 3, 3]: the views that are compared. Raises NoSurface
    where none of them shows anything.
    """
    rays = pixel_rays(cam2world, intrinsics, OUTLINE_SIZE, OUTLINE_SIZE)
    flat = Rays(rays.origins.reshape(-1, 3), rays.directions.reshape(-1, 3))
    cells = shared.cells(planes[None], None if hull is None else hull[None])
    found = [_opacity_and_highest(shared, planes, grid, flat[start : start + AT_ONCE], cells)
             for start in range(0, len(flat.origins), AT_ONCE)]  # fmt: skip
    opacity, highest = (torch.cat(values) for values in zip(*found))
    shown = opacity >= 0.5
    if not shown.any():
        raise NoSurface(f"it shows nothing: no ray around it is more than {opacity.max().item():.0%} opaque")
    # Try every ray's highest density as the level. In descending order, the rays that meet the surface are the first
    # ones, so cumulative sums give the intersection over union with the half-opaque rays at all levels.
    highest, order = highest.sort(descending=True)
    inside, outside = shown[order].cumsum(0), (~shown[order]).cumsum(0)
    best = int((inside / (shown.sum() + outside)).argmax())
    return (highest[best] + highest[min(best + 1, len(highest) - 1)]).item() / 2


def _opacity_and_highest(
    shared: SharedModel, planes: Tensor, grid: DensityGrid, rays: Rays, cells: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Opacity of rays [R], and the highest raw density that each meets: the grid's lowest where it misses the box."""
    near, far, hit = shared.renderer.box.span(rays.to(shared.device))
    near, far, hit = near.cpu(), far.cpu(), hit.cpu()
    highest = torch.full_like(near, grid.raw.min().item())
    opacity = torch.zeros_like(near)
    if hit.any():
        met = rays[hit]
        place = (torch.arange(STEPS) + 0.5) / STEPS
        depths = (near[hit, None] + (far - near)[hit, None] * place) * float(shared.renderer.box.unit)
        points = met.origins[:, None] + depths[..., None] * met.directions[:, None]
        highest[hit] = grid.at(points).amax(1)
        batch = Rays(met.origins[None], met.directions[None]).to(shared.device)
        nowhere = torch.zeros(1, len(met.origins), dtype=torch.int64, device=shared.device)  # colours are not asked for
        opacity[hit] = shared.render_planes(planes[None], batch, pixels=nowhere, cells=cells).opacity[0].cpu()
    return opacity, highest


def find_surface(grid: DensityGrid, level: float) -> Surface:
    """The surface where raw densities are `level`, without specks. It is closed: beyond the box all counts as empty.

    Raises NoSurface where there is none, RuntimeError with the pip command where scikit-image is not installed.
    """
    try:
        from skimage.measure import label, marching_cubes
    except ImportError as error:
        raise RuntimeError(NEEDS) from error
    lowest, highest = grid.raw.min().item(), grid.raw.max().item()
    if highest <= level:
        raise NoSurface(f"its raw density is at most {highest:.3g}, the surface would be at {level:.3g}")
    # A margin of empty points closes the surface where the object reaches the box's faces.
    empty = min(lowest, level - 1)
    volume = np.pad(grid.raw.numpy(), 1, constant_values=empty)
    # Connected parts that are far smaller than the largest one are emptied.
    parts = label(volume > level)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0  # label 0 is the empty space
    volume[(sizes < SPECK * sizes.max())[parts] & (parts > 0)] = empty
    vertices, faces, normals, _ = marching_cubes(volume, level, spacing=tuple(grid.spacing.tolist()))
    vertices += (grid.bounds[0] - grid.spacing).numpy()
    return Surface(vertices.astype(np.float32), faces[:, ::-1].astype(np.int32), normals.astype(np.float32))
