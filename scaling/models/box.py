"""The part of space that planes span: a cuboid, split into cells; and which cells a ray goes through.

A scene says for each cell what rays find there: 0 where there is nothing (its views carve it away, see
training/measure/visual_hull.py), else 1 + its density, as far as that is known (see `SharedModel.cells`). Rays are
sampled in cells above 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scaling.cameras import Rays

# Low and high corners of all that may be measured: what cameras at distance 1.3 see of the world (method: 0.5 to 2.1).
WIDEST = ((-0.8, -0.8, -0.8), (0.8, 0.8, 0.8))
CELLS = 40  # a side, whatever the cuboid's proportions
OLD_CELLS, OLD_STEPS = 48, 64  # of `filled` and of `span`, as in shared models of format 2 and before
RAYS_AT_ONCE = 1 << 14  # looked up together, which bounds the memory that takes
STEPS = 48  # parts of a ray's way through the cuboid, each about as long as a cell


@dataclass(frozen=True)
class Parts:
    """A ray's way through the cuboid in STEPS equal parts: where it enters, near [..., R], the length of a part
    [..., R] (world units; 0 of a ray that misses the cuboid), and what the scene's cells say there, values [..., R,
    STEPS]."""

    near: Tensor
    length: Tensor
    values: Tensor

    @property
    def far(self) -> Tensor:
        """Where rays leave the cuboid, [..., R]."""
        return self.near + STEPS * self.length

    @property
    def hit(self) -> Tensor:
        """Rays [..., R] that have a part to sample."""
        return (self.values > 0).any(-1) & (self.length > 0)


class Box(nn.Module):
    """side: of a cube around the origin, world units; None: a cuboid that is measured (training/measure/box.py) and
    stored with the shared model. Until then it is the WIDEST. filled: cells that `span` looks for; shared models of
    format 2 and before carve those that no object of stage 1 fills."""

    corners: Tensor
    filled: Tensor

    def __init__(self, side: float | None) -> None:
        super().__init__()
        self.side = side
        if side is None:
            self.register_buffer("corners", torch.tensor(WIDEST))
            self.register_buffer("filled", torch.ones(OLD_CELLS, OLD_CELLS, OLD_CELLS, dtype=torch.bool))

    def __str__(self) -> str:
        if self.side is not None:
            return f"the box of side {self.side:g} around the origin"
        low, high = ([round(number, 2) for number in corner] for corner in self.corners.tolist())
        return f"the box from {low} to {high}, where the store's objects are"

    @property
    def bounds(self) -> Tensor:
        """Low and high corner [2, 3], world units; on the CPU."""
        return torch.tensor([[-1.0] * 3, [1.0] * 3]) * (self.side / 2) if self.side is not None else self.corners.cpu()

    def centres(self) -> Tensor:
        """The middles of all cells [CELLS³, 3] in the box's coordinates, the last axis fastest; on the CPU."""
        axis = (2 * torch.arange(CELLS) + 1) / CELLS - 1
        return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)

    def into(self, rays: Rays) -> Rays:
        """The same rays in the box's coordinates, [−1, 1] inside; distances along them stay world units."""
        if self.side is not None:
            return Rays(rays.origins * (2 / self.side), rays.directions * (2 / self.side))
        low, high = self.corners
        half = (high - low) / 2
        return Rays((rays.origins - (low + high) / 2) / half, rays.directions / half)

    def crossed(self, rays: Rays) -> Tensor:
        """Rays [..., R] that go through the box, whatever its cells say. [..., R], bool."""
        return _slabs(self.into(rays))[2]

    def parts(self, rays: Rays, cells: Tensor) -> Parts:
        """Rays [S, R] of S scenes, cells [S, CELLS³] → their parts with the cells' values."""
        inside = self.into(rays)
        near, far, _ = _slabs(inside)
        length = (far - near) / STEPS
        middles = near[..., None] + length[..., None] * (torch.arange(STEPS, device=near.device) + 0.5)
        numbers = cell_numbers(inside, middles, CELLS)
        offset = torch.arange(len(cells), device=near.device)[:, None, None] * CELLS**3
        return Parts(near, length, cells.flatten()[numbers + offset])

    def span(self, rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
        """Distances at which rays enter and leave what is `filled`: near [..., R], far [..., R], hit [..., R] (bool).

        A ray that meets nothing has near = far, so no length to sample.
        """
        inside = self.into(rays)
        near, far, hit = _slabs(inside)
        if self.side is not None:
            return near, far, hit
        flat = Rays(inside.origins.reshape(-1, 3), inside.directions.reshape(-1, 3))
        parts = [
            self._filled_part(flat[part], near.flatten()[part], far.flatten()[part], hit.flatten()[part])
            for part in (slice(start, start + RAYS_AT_ONCE) for start in range(0, near.numel(), RAYS_AT_ONCE))
        ]
        near, far, hit = (torch.cat(values).view(near.shape) for values in zip(*parts))
        return near, far, hit

    def _filled_part(self, inside: Rays, near: Tensor, far: Tensor, hit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of [R] rays that cross the cuboid from near to far: from the first filled cell to the last one."""
        # The middles of OLD_STEPS parts of the way through the cuboid.
        place = (torch.arange(OLD_STEPS, device=near.device) + 0.5) / OLD_STEPS
        depths = near[..., None] + (far - near)[..., None] * place
        full = self.filled.flatten()[cell_numbers(inside, depths, OLD_CELLS)] & hit[..., None]
        hit = full.any(-1)
        order = torch.arange(OLD_STEPS, device=near.device)
        first = torch.where(full, order, OLD_STEPS).amin(-1)
        last = torch.where(full, order, -1).amax(-1)
        length = (far - near) / OLD_STEPS
        start = near + length * first
        return torch.where(hit, start, near), torch.where(hit, near + length * (last + 1), near), hit


def cell_numbers(inside: Rays, depths: Tensor, cells: int) -> Tensor:
    """The cell, of so many a side, the last axis fastest, at each depth [..., R, D] of rays [..., R] in the box's
    coordinates."""
    number = torch.zeros_like(depths, dtype=torch.int64)
    for origin, direction in zip(inside.origins.unbind(-1), inside.directions.unbind(-1)):
        along = (origin[..., None] + depths * direction[..., None] + 1) * (cells / 2)
        number = number * cells + along.long().clamp(0, cells - 1)
    return number


def _slabs(rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
    """Where rays in the box's coordinates cross the cube from −1 to 1: near, far, hit."""
    safe = torch.where(rays.directions.abs() < 1e-9, torch.full_like(rays.directions, 1e-9), rays.directions)
    first = (-1 - rays.origins) / safe
    second = (1 - rays.origins) / safe
    near = torch.minimum(first, second).amax(-1).clamp(min=0.0)
    far = torch.maximum(first, second).amin(-1)
    hit = far > near
    return near, torch.where(hit, far, near), hit
