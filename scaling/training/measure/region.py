"""The part of space that the cameras of a scene look at, where its visual hull is searched."""

from __future__ import annotations

import torch
from torch import Tensor

WIDER = 1.25  # than what a view shows at the middle's distance: behind the middle a view shows more
TOO_NEAR = 1e-5  # of the cameras' distance from the origin
LEAST_ANGLE = 0.01  # radians, about: cameras whose axes differ by less do not tell where they meet


def looked_at(cam2world: Tensor, intrinsics: Tensor) -> Tensor | None:
    """Low and high corner [2, 3], world units, of a cube around what cameras look at together. None where they look at
    nothing together: their axes are parallel, or meet behind them.

    cam2world [V, 4, 4], intrinsics [V, 3, 3]. The middle c is the point next to all axes, o + t d: the least squares of
    its distances, Σ (I − d dᵀ) (c − o) = 0. The cube holds what the views show at the middle's distance, and WIDER.
    """
    origins, axes = cam2world[:, :3, 3].double(), cam2world[:, :3, 2].double()
    across = torch.eye(3, dtype=torch.float64) - axes[:, :, None] * axes[:, None, :]
    normal, right = across.mean(0), (across @ origins[:, :, None]).mean(0)[:, 0]
    if torch.linalg.eigvalsh(normal)[0] < LEAST_ANGLE**2:
        return None
    middle = torch.linalg.solve(normal, right)
    depths = ((middle - origins) * axes).sum(1)
    # Poses that map the wrong way put all cameras where their axes meet.
    if (depths > TOO_NEAR * origins.norm(dim=1).max()).double().mean() < 0.5:
        return None
    # The farther edge of an image counts, where its middle is not the principal point.
    focal = intrinsics[:, [0, 1], [0, 1]].double()
    centre = intrinsics[:, [0, 1], [2, 2]].double()
    half = WIDER * (torch.maximum(centre, 1 - centre) / focal).amax(1) * depths
    half_side = half[depths > 0].median()
    return torch.stack([middle - half_side, middle + half_side]).float()
