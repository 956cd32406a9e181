"""The viewer's camera: a pose that turns around the origin and zooms, and the truth view that is nearest to it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scaling.cameras import look_at_origin, normalised_intrinsics
from scaling.data.scene_views import SceneViews
from scaling.pictures.draw import ELEVATION

STEEPEST = math.radians(85)  # of a camera that is turned; above it left and right would change places
START = math.radians(40)  # azimuth: a scene is first seen from the front and the side at once


@dataclass(frozen=True)
class Camera:
    """cam2world [4, 4], OpenCV axes, and intrinsics [3, 3], normalised by the image size: float64, as many small turns
    add up."""

    cam2world: Tensor
    intrinsics: Tensor

    @classmethod
    def of(cls, cam2world: Tensor, intrinsics: Tensor) -> Camera:
        return cls(cam2world.double(), intrinsics.double())

    def turned(self, azimuth: float, elevation: float) -> Camera:
        """The camera moved on its sphere around the origin, by radians; what it sees keeps its place in the image.

        It climbs and falls up to STEEPEST, or to where it is where that is steeper already.
        """
        x, y, z = self.cam2world[:3, 3].tolist()
        level = math.hypot(x, y)
        now = math.atan2(z, level)
        most = max(STEEPEST, abs(now))
        climb = min(max(now + elevation, -most), most) - now
        # The level axis about which a positive angle raises the camera: its position × the world's z.
        axis = (y / level, -x / level, 0.0) if level > 1e-9 else (0.0, -1.0, 0.0)
        motion = torch.eye(4, dtype=torch.float64)
        motion[:3, :3] = _rotation((0.0, 0.0, 1.0), azimuth) @ _rotation(axis, climb)
        return replace(self, cam2world=motion @ self.cam2world)

    def zoomed(self, factor: float) -> Camera:
        """The camera with a focal length `factor` times as long. It does not move: so rays keep their distances, which
        a fixed near and far need."""
        intrinsics = self.intrinsics.clone()
        intrinsics[:2, :2] *= factor
        return replace(self, intrinsics=intrinsics)

    def nearest(self, cam2world: Tensor) -> tuple[int, float]:
        """Which of the poses [V, 4, 4] sees the origin from the most similar side, and the angle to it in degrees."""
        there = torch.nn.functional.normalize(cam2world[:, :3, 3].double(), dim=1)
        here = torch.nn.functional.normalize(self.cam2world[:3, 3], dim=0)
        cosines = (there @ here).clamp(-1, 1)
        best = int(cosines.argmax())
        return best, math.degrees(math.acos(float(cosines[best])))


def start_camera(views: SceneViews | None = None, azimuth: float = START) -> Camera:
    """Half from the front, at the distance and with the focal length of a scene's views (None: those of
    `turntable`)."""
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
