"""Cameras and rays: OpenCV axes (x right, y down, z forward), camera-to-world, world z up.

Intrinsics are normalised by the image size: focal lengths and principal point are fractions of the image's width and
height, so they stay the same when an image is resized.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rays:
    """Straight lines p(t) = origin + t · direction.

    origins, directions: [..., R, 3], in world coordinates, where directions have length 1 and t is a distance in world
    units, or in a box's coordinates (`Box.into`).
    """

    origins: Tensor
    directions: Tensor

    def __getitem__(self, index: object) -> Rays:
        return Rays(self.origins[index], self.directions[index])  # type: ignore[index]

    def to(self, device: torch.device | str) -> Rays:
        """The same rays on another device."""
        return Rays(self.origins.to(device), self.directions.to(device))


def pixel_rays(cam2world: Tensor, intrinsics: Tensor, height: int, width: int) -> Rays:
    """Rays through the centres of all pixels of an image, row by row.

    cam2world [..., 4, 4], intrinsics [..., 3, 3] (normalised) → Rays [..., height · width, 3].
    Pixel (row i, column j) has its centre at ((j + ½) / width, (i + ½) / height). Raises ValueError for other shapes.

    >>> rays = pixel_rays(torch.eye(4), normalised_intrinsics(focal=1 / 3), height=1, width=2)
    >>> rays.directions[1]  # through (¾, ½): x = (¾ − ½) / focal = ¾, y = 0, z = 1; divided by its length 1.25
    tensor([0.6000, 0.0000, 0.8000])
    """
    if cam2world.shape[-2:] != (4, 4) or intrinsics.shape[-2:] != (3, 3):
        raise ValueError(f"expected [..., 4, 4] and [..., 3, 3], got {cam2world.shape} and {intrinsics.shape}")
    pixels = torch.arange(height * width, device=cam2world.device)
    return rays_through(cam2world[..., None, :, :], intrinsics[..., None, :, :], pixels, height, width)


def rays_through(cam2world: Tensor, intrinsics: Tensor, pixels: Tensor, height: int, width: int) -> Rays:
    """One ray through the centre of each pixel; each pixel can have its own camera.

    cam2world [..., 4, 4], intrinsics [..., 3, 3] (normalised), pixels [...]: row · width + column; the leading axes of
    the three broadcast → Rays [..., 3].
    """
    u = (pixels % width + 0.5) / width
    v = (pixels // width + 0.5) / height
    y = (v - intrinsics[..., 1, 2]) / intrinsics[..., 1, 1]
    x = (u - intrinsics[..., 0, 2] - intrinsics[..., 0, 1] * y) / intrinsics[..., 0, 0]
    rotation = cam2world[..., :3, :3]
    directions = rotation[..., 0] * x[..., None] + rotation[..., 1] * y[..., None] + rotation[..., 2]
    directions = directions / directions.norm(dim=-1, keepdim=True)
    return Rays(cam2world[..., :3, 3].expand_as(directions), directions)


Centre = tuple[float, float, float]
ORIGIN: Centre = (0.0, 0.0, 0.0)


def look_at(azimuth: Tensor, elevation: Tensor, radius: Tensor, centre: Centre) -> Tensor:
    """As `look_at_origin`, around and at another centre (world coordinates)."""
    cam2world = look_at_origin(azimuth, elevation, radius)
    cam2world[:, :3, 3] += torch.tensor(centre, dtype=cam2world.dtype)
    return cam2world


def look_at_origin(azimuth: Tensor, elevation: Tensor, radius: Tensor) -> Tensor:
    """Cameras on a sphere that look at the origin, with the world's z up.

    azimuth, elevation (radians, not straight up or down), radius (world units): [V] → cam2world [V, 4, 4].
    """
    position = radius[:, None] * torch.stack(
        [elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], dim=-1
    )
    forward = -position / position.norm(dim=-1, keepdim=True)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=position.dtype).expand_as(forward)
    right = torch.linalg.cross(forward, up)
    right = right / right.norm(dim=-1, keepdim=True)
    down = torch.linalg.cross(forward, right)
    cam2world = torch.eye(4, dtype=position.dtype).repeat(len(position), 1, 1)
    cam2world[:, :3, :3] = torch.stack([right, down, forward], dim=-1)
    cam2world[:, :3, 3] = position
    return cam2world


def orbit(num_views: int, radius: float, elevation: float = math.radians(25.0), centre: Centre = ORIGIN) -> Tensor:
    """Cameras [V, 4, 4] at num_views equal steps around a centre, for turntables. radius: world units; elevation:
    radians.

    >>> orbit(4, radius=2.0, elevation=0.0)[0, :3, 3]  # the first camera is on the x axis, the second on the y axis
    tensor([2., 0., 0.])
    """
    azimuth = torch.arange(num_views) * (2 * math.pi / num_views)
    return look_at(azimuth, torch.full_like(azimuth, elevation), torch.full_like(azimuth, radius), centre)


def zone(num_views: int, radius: float, lowest: float, highest: float, centre: Centre = ORIGIN) -> Tensor:
    """Cameras [V, 4, 4] at num_views places spread evenly, by the golden angle, over a sphere around a centre, between
    two elevations.

    radius: world units; lowest, highest: elevations in radians.
    """
    steps = torch.arange(num_views)
    azimuth = steps * (math.pi * (3 - math.sqrt(5)))
    low, high = math.sin(lowest), math.sin(highest)
    elevation = (low + (high - low) * (steps + 0.5) / num_views).asin()
    return look_at(azimuth, elevation, torch.full_like(elevation, radius), centre)


def normalised_intrinsics(focal: float) -> Tensor:
    """Intrinsics [3, 3] with one focal length (fraction of the image size) and a centred principal point.

    >>> normalised_intrinsics(96 / 128)  # 96 pixels, in an image of 128 × 128
    tensor([[0.7500, 0.0000, 0.5000],
            [0.0000, 0.7500, 0.5000],
            [0.0000, 0.0000, 1.0000]])
    """
    return torch.tensor([[focal, 0.0, 0.5], [0.0, focal, 0.5], [0.0, 0.0, 1.0]])
