"""The part of space that planes span: a cuboid, and which of its cells objects ever fill."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scaling.cameras import Rays

# Low and high corners of all that may be measured: what cameras at distance 1.3 see of the world (method: 0.5 to 2.1).
WIDEST = ((-0.8, -0.8, -0.8), (0.8, 0.8, 0.8))
CELLS = 48  # a side, whatever the cuboid's proportions
RAYS_AT_ONCE = 1 << 14  # looked up together, which bounds the memory that takes
STEPS = 64  # cells that a ray's way through the box is looked up in; its part of a cell is then about as long as one


class Box(nn.Module):
    """side: of a cube around the origin, world units; None: a cuboid and its cells, measured in training/space.py and
    stored with the shared model. Until they are measured, it is the WIDEST, and full."""

    corners: Tensor
    filled: Tensor

    def __init__(self, side: float | None) -> None:
        super().__init__()
        self.side = side
        if side is None:
            self.register_buffer("corners", torch.tensor(WIDEST))
            self.register_buffer("filled", torch.ones(CELLS, CELLS, CELLS, dtype=torch.bool))

    def __str__(self) -> str:
        if self.side is not None:
            return f"the box of side {self.side:g} around the origin"
        low, high = ([round(number, 2) for number in corner] for corner in self.corners.tolist())
        return f"the box from {low} to {high}, where stage 1's objects are"

    @property
    def bounds(self) -> Tensor:
        """Low and high corner [2, 3], world units; on the CPU."""
        return torch.tensor([[-1.0] * 3, [1.0] * 3]) * (self.side / 2) if self.side is not None else self.corners.cpu()

    def into(self, rays: Rays) -> Rays:
        """The same rays in the box's coordinates, [−1, 1] inside; distances along them stay world units."""
        if self.side is not None:
            return Rays(rays.origins * (2 / self.side), rays.directions * (2 / self.side))
        low, high = self.corners
        half = (high - low) / 2
        return Rays((rays.origins - (low + high) / 2) / half, rays.directions / half)

    def span(self, rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
        """Distances at which rays enter and leave what is filled: near [..., R], far [..., R], hit [..., R] (bool).

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
        # The middles of STEPS parts of the way through the cuboid.
        place = (torch.arange(STEPS, device=near.device) + 0.5) / STEPS
        depths = near[..., None] + (far - near)[..., None] * place
        full = self.filled.flatten()[cell_numbers(inside, depths)] & hit[..., None]
        hit = full.any(-1)
        order = torch.arange(STEPS, device=near.device)
        first = torch.where(full, order, STEPS).amin(-1)
        last = torch.where(full, order, -1).amax(-1)
        length = (far - near) / STEPS
        start = near + length * first
        return torch.where(hit, start, near), torch.where(hit, near + length * (last + 1), near), hit


def cell_numbers(inside: Rays, depths: Tensor) -> Tensor:
    """The cell of `filled`, flattened, at each depth [R, D] of rays [R] in the box's coordinates. → [R, D]."""
    number = torch.zeros_like(depths, dtype=torch.int64)
    for origin, direction in zip(inside.origins.unbind(-1), inside.directions.unbind(-1)):
        along = (origin[:, None] + depths * direction[:, None] + 1) * (CELLS / 2)
        number = number * CELLS + along.long().clamp(0, CELLS - 1)
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
