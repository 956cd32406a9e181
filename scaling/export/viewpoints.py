"""Cameras that look at exported scenes from where the scenes' own views do."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from scaling.cameras import normalised_intrinsics, orbit, zone
from scaling.data.scene_views import SceneViews

STEEPEST = math.radians(89.0)  # for a camera that looks straight down, the image's up direction is undefined


@dataclass(frozen=True)
class Viewpoints:
    """radius: distance from the origin, world units; focal: fraction of the image size; lowest, middle, highest:
    elevations, radians."""

    radius: float
    focal: float
    lowest: float
    middle: float
    highest: float

    @classmethod
    def of(cls, views: SceneViews) -> Viewpoints:
        """Medians of a scene's own views, and the range of their elevations: beyond this range a model has seen
        nothing."""
        position = views.cam2world[:, :3, 3]
        distance = position.norm(dim=1)
        elevation = (position[:, 2] / distance).clamp(-1, 1).asin().clamp(-STEEPEST, STEEPEST)
        return cls(
            distance.median().item(), views.intrinsics[:, 0, 0].median().item(),
            elevation.min().item(), elevation.median().item(), elevation.max().item(),
        )  # fmt: skip

    def cameras(self, path: str, num_views: int) -> tuple[Tensor, Tensor]:
        """cam2world [V, 4, 4], intrinsics [V, 3, 3]. path "ring": one turn at the middle elevation; "sphere": spread
        evenly between the lowest and the highest."""
        if path == "ring":
            cam2world = orbit(num_views, self.radius, self.middle)
        else:
            cam2world = zone(num_views, self.radius, self.lowest, self.highest)
        return cam2world, normalised_intrinsics(self.focal).repeat(num_views, 1, 1)
