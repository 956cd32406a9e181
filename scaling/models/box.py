"""The box: the cuboid that planes span, split into cells, and the cells that a ray goes through.

Each scene has one value per cell: 0 where its views carve the cell away (see training/measure/visual_hull.py), else
1 + the density that is known there so far (see `SharedModel.cells`). Rays are sampled in cells above 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scaling.cameras import Rays
from scaling.models.cells import CELLS

UNMEASURED = ((-0.8, -0.8, -0.8), (0.8, 0.8, 0.8))  # low and high corner of a box before it is measured
OLD_CELLS, OLD_STEPS = 48, 64  # cells a side of `filled`, parts of `span`; only shared models of formats 1 and 2 have
# cells that are not filled
RAYS_AT_ONCE = 1 << 14  # rays that `span` looks up together: they bound its memory
STEPS = 48  # equal parts of a ray's path through the cuboid, each about as long as a cell


@dataclass(frozen=True)
class Parts:
    """The paths of rays through the cuboid, each in STEPS equal parts.

    near [..., R]: distance at which a ray enters; length [..., R]: of one part, 0 where the ray misses the cuboid (both
    in the box's `unit`s); values [..., R, STEPS]: of the scene's cells, at the middles of the parts.
    """

    near: Tensor
    length: Tensor
    values: Tensor

    @property
    def far(self) -> Tensor:
        """Distances [..., R] at which rays leave the cuboid."""
        return self.near + STEPS * self.length

    @property
    def hit(self) -> Tensor:
        """Which rays have a part to sample, [..., R] (bool)."""
        return (self.values > 0).any(-1) & (self.length > 0)


class Box(nn.Module):
    """The cuboid that planes span.

    side: of a cube around the origin, world units; None: the cuboid is measured (training/measure/box.py) and stored
    with the shared model; until then it is UNMEASURED. length_unit: "box" or "world", see `unit`. filled: the cells
    that `span` keeps, all of them in new shared models; in those of format 2 and before, the cells that objects of
    stage 1 fill.
    """

    corners: Tensor
    filled: Tensor

    def __init__(self, side: float | None, length_unit: str = "world") -> None:
        super().__init__()
        self.side = side
        self.length_unit = length_unit
        if side is None:
            self.register_buffer("corners", torch.tensor(UNMEASURED))
            self.register_buffer("filled", torch.ones(OLD_CELLS, OLD_CELLS, OLD_CELLS, dtype=torch.bool))

    def __str__(self) -> str:
        if self.side is not None:
            return f"the box of side {self.side:g} around the origin"
        low, high = (", ".join(f"{number:.3g}" for number in corner) for corner in self.corners.tolist())
        return f"the box from [{low}] to [{high}], where the store's objects are"

    @property
    def bounds(self) -> Tensor:
        """Low and high corner [2, 3], world units; on the CPU."""
        return torch.tensor([[-1.0] * 3, [1.0] * 3]) * (self.side / 2) if self.side is not None else self.corners.cpu()

    @property
    def unit(self) -> Tensor | float:
        """Length, in world units, that distances along rays are counted in, and that densities are per: the box's
        longest side, or 1."""
        if self.length_unit == "world":
            return 1.0
        if self.side is not None:
            return self.side
        return (self.corners[1] - self.corners[0]).max()  # a tensor: a number would make a GPU wait

    @property
    def centre(self) -> Tensor:
        """Middle of the box [3], world coordinates; on the CPU."""
        return self.bounds.mean(0)

    def centres(self) -> Tensor:
        """Centres of all cells [CELLS³, 3] in the box's coordinates, the last axis fastest; on the CPU."""
        axis = (2 * torch.arange(CELLS) + 1) / CELLS - 1
        return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)

    def into(self, rays: Rays) -> Rays:
        """The same rays in the box's coordinates, [−1, 1] inside; distances along them are in `unit`s."""
        unit = self.unit
        if self.side is not None:
            return Rays(rays.origins * (2 / self.side), rays.directions * (2 * unit / self.side))
        low, high = self.corners
        half = (high - low) / 2
        return Rays((rays.origins - (low + high) / 2) / half, rays.directions * (unit / half))

    def crossed(self, rays: Rays) -> Tensor:
        """Which rays [..., R] go through the box, whatever its cells say → [..., R] (bool)."""
        return _slabs(self.into(rays))[2]

    def parts(self, rays: Rays, cells: Tensor) -> Parts:
        """Divide rays [S, R] of S scenes into parts, and look up their cells [S, CELLS³]."""
        inside = self.into(rays)
        near, far, _ = _slabs(inside)
        length = (far - near) / STEPS
        middles = near[..., None] + length[..., None] * (torch.arange(STEPS, device=near.device) + 0.5)
        numbers = cell_numbers(inside, middles, CELLS)
        offset = torch.arange(len(cells), device=near.device)[:, None, None] * CELLS**3
        return Parts(near, length, cells.flatten()[numbers + offset])

    def span(self, rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
        """Distances, in `unit`s, at which rays [..., R] enter and leave the filled cells → near, far, hit (bool), each
        [..., R].

        A box with a side is filled everywhere. A ray that meets no filled cell has near = far: no length to sample.
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
        """Shorten near to far [R] to the path from the first filled cell to the last → near, far, hit (bool)."""
        # Cells are looked up at the middles of OLD_STEPS equal parts of the path through the cuboid.
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
    """Index of the cell at each depth [..., R, D] of rays [..., R] in the box's coordinates; points outside take the
    nearest cell. cells: number of cells a side; the index counts the last axis fastest."""
    number = torch.zeros_like(depths, dtype=torch.int64)
    for origin, direction in zip(inside.origins.unbind(-1), inside.directions.unbind(-1)):
        along = (origin[..., None] + depths * direction[..., None] + 1) * (cells / 2)
        number = number * cells + along.long().clamp(0, cells - 1)
    return number


def _slabs(rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
    """Distances at which rays [..., R] in the box's coordinates enter and leave the cube from −1 to 1 (slab method).

    → near (at least 0), far, hit (bool), each [..., R]; a ray that misses has near = far.
    """
    # A ray parallel to a face would divide by zero.
    safe = torch.where(rays.directions.abs() < 1e-9, torch.full_like(rays.directions, 1e-9), rays.directions)
    first = (-1 - rays.origins) / safe
    second = (1 - rays.origins) / safe
    near = torch.minimum(first, second).amax(-1).clamp(min=0.0)
    far = torch.maximum(first, second).amin(-1)
    hit = far > near
    return near, torch.where(hit, far, near), hit
