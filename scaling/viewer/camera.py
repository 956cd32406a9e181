"""The viewer's camera: a pose that turns around the origin and zooms, and the true view that is nearest to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scaling.cameras import look_at_origin, normalised_intrinsics
from scaling.data.scene_views import SceneViews
from scaling.pictures.draw import ELEVATION

STEEPEST = math.radians(85)  # elevation of a turned camera; beyond the pole left and right would swap
START = math.radians(40)  # first azimuth: it shows the front and the side at once


@dataclass(frozen=True)
class Camera:
    """cam2world [4, 4], OpenCV axes, and intrinsics [3, 3], normalised by the image size. Both are float64, because
    many small turns add up."""

    cam2world: Tensor
    intrinsics: Tensor

    @classmethod
    def of(cls, cam2world: Tensor, intrinsics: Tensor) -> Camera:
        return cls(cam2world.double(), intrinsics.double())

    def turned(self, azimuth: float, elevation: float) -> Camera:
        """The camera moved on its sphere around the origin, by radians. The origin keeps its place in the image.

        The elevation stays within ±STEEPEST, or within the present elevation where that is steeper already.
        """
        x, y, z = self.cam2world[:3, 3].tolist()
        level = math.hypot(x, y)
        now = math.atan2(z, level)
        most = max(STEEPEST, abs(now))
        climb = min(max(now + elevation, -most), most) - now
        # A positive angle about this level axis raises the camera: the axis is its position × the world's z.
        axis = (y / level, -x / level, 0.0) if level > 1e-9 else (0.0, -1.0, 0.0)
        motion = torch.eye(4, dtype=torch.float64)
        motion[:3, :3] = _rotation((0.0, 0.0, 1.0), azimuth) @ _rotation(axis, climb)
        return replace(self, cam2world=motion @ self.cam2world)

    def zoomed(self, factor: float) -> Camera:
        """The camera with a focal length `factor` times as long. It does not move, because a fixed near and far need
        rays to keep their distances."""
        intrinsics = self.intrinsics.clone()
        intrinsics[:2, :2] *= factor
        return replace(self, intrinsics=intrinsics)

    def nearest(self, cam2world: Tensor) -> tuple[int, float]:
        """The index of the pose, of [V, 4, 4], that sees the origin from the most similar side, and the angle between
        the two sides in degrees."""
        there = torch.nn.functional.normalize(cam2world[:, :3, 3].double(), dim=1)
        here = torch.nn.functional.normalize(self.cam2world[:3, 3], dim=0)
        cosines = (there @ here).clamp(-1, 1)
        best = int(cosines.argmax())
        return best, math.degrees(math.acos(float(cosines[best])))


def start_camera(views: SceneViews | None = None, azimuth: float = START) -> Camera:
    """The camera that first sees a scene, at the median distance and focal length of its views.

    views None: distance and focal length of `turntable`; azimuth: radians.
    """
    radius = 1.3 if views is None else views.cam2world[:, :3, 3].norm(dim=1).median().item()
    focal = 1.02 if views is None else views.intrinsics[:, 0, 0].median().item()
    place = (torch.tensor([value], dtype=torch.float64) for value in (azimuth, ELEVATION, radius))
    return Camera.of(look_at_origin(*place)[0], normalised_intrinsics(focal))


def view_camera(views: SceneViews, index: int) -> Camera:
    """The camera of one of a scene's views."""
    return Camera.of(views.cam2world[index], views.intrinsics[index])


def _rotation(axis: tuple[float, float, float], angle: float) -> Tensor:
    """Rodrigues' formula: the rotation [3, 3] by `angle` radians about a unit axis."""
    x, y, z = axis
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
