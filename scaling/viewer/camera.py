"""The viewer's camera: a pose that turns around the scene's centre and zooms, and the true view that is nearest to
it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scaling.cameras import ORIGIN, Centre
from scaling.data.scene_views import SceneViews
from scaling.library.viewpoints import Viewpoints
from scaling.pictures.draw import ELEVATION

STEEPEST = math.radians(85)  # elevation of a turned camera; beyond the pole left and right would swap
START = math.radians(40)  # first azimuth: it shows the front and the side at once


@dataclass(frozen=True)
class Camera:
    """cam2world [4, 4], OpenCV axes, and intrinsics [3, 3], normalised by the image size; centre [3]: what it turns
    around, world coordinates. All are float64, because many small turns add up."""

    cam2world: Tensor
    intrinsics: Tensor
    centre: Tensor

    @classmethod
    def of(cls, cam2world: Tensor, intrinsics: Tensor, centre: Centre = ORIGIN) -> Camera:
        return cls(cam2world.double(), intrinsics.double(), torch.tensor(centre, dtype=torch.float64))

    def turned(self, azimuth: float, elevation: float) -> Camera:
        """The camera moved on its sphere around the centre, by radians. The centre keeps its place in the image.

        The elevation stays within ±STEEPEST, or within the present elevation where that is steeper already.
        """
        x, y, z = (self.cam2world[:3, 3] - self.centre).tolist()
        level = math.hypot(x, y)
        now = math.atan2(z, level)
        most = max(STEEPEST, abs(now))
        climb = min(max(now + elevation, -most), most) - now
        # A positive angle about this level axis raises the camera: the axis is its position × the world's z.
        axis = (y / level, -x / level, 0.0) if level > 1e-9 else (0.0, -1.0, 0.0)
        motion = torch.eye(4, dtype=torch.float64)
        motion[:3, :3] = _rotation((0.0, 0.0, 1.0), azimuth) @ _rotation(axis, climb)
        cam2world = self.cam2world.clone()
        cam2world[:3, 3] -= self.centre
        cam2world = motion @ cam2world
        cam2world[:3, 3] += self.centre
        return replace(self, cam2world=cam2world)

    def zoomed(self, factor: float) -> Camera:
        """The camera with a focal length `factor` times as long. It does not move, because a fixed near and far need
        rays to keep their distances."""
        intrinsics = self.intrinsics.clone()
        intrinsics[:2, :2] *= factor
        return replace(self, intrinsics=intrinsics)

    def nearest(self, cam2world: Tensor) -> tuple[int, float]:
        """The index of the pose, of [V, 4, 4], that sees the centre from the most similar side, and the angle between
        the two sides in degrees."""
        there = torch.nn.functional.normalize(cam2world[:, :3, 3].double() - self.centre, dim=1)
        here = torch.nn.functional.normalize(self.cam2world[:3, 3] - self.centre, dim=0)
        cosines = (there @ here).clamp(-1, 1)
        best = int(cosines.argmax())
        return best, math.degrees(math.acos(float(cosines[best])))


def start_camera(seen: Viewpoints, azimuth: float = START) -> Camera:
    """The camera that first sees a scene, from viewpoints like those of its views. azimuth: radians."""
    return Camera.of(*seen.camera(azimuth, ELEVATION), seen.centre)


def view_camera(views: SceneViews, index: int) -> Camera:
    """The camera of one of a scene's views."""
    return Camera.of(views.cam2world[index], views.intrinsics[index], Viewpoints.of(views).centre)


def _rotation(axis: tuple[float, float, float], angle: float) -> Tensor:
    """Rodrigues' formula: the rotation [3, 3] by `angle` radians about a unit axis."""
    x, y, z = axis
    cross = torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
