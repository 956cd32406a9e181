"""Scenes that a pencil can check: dark cuboids on white, seen from all around."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scaling.cameras import Rays, look_at_origin, normalised_intrinsics, pixel_rays
from scaling.data.png import encode_png
from scaling.data.scene_views import SceneViews, make_row

RADIUS, FOCAL = 1.3, 1.02


def cameras(num_views: int = 36) -> tuple[Tensor, Tensor]:
    """All around, and every elevation with every azimuth: [V, 4, 4], [V, 3, 3]."""
    azimuth = torch.arange(num_views) * 2.4  # the golden angle
    elevation = torch.linspace(-0.95, 0.95, num_views).asin()
    cam2world = look_at_origin(azimuth, elevation, torch.full((num_views,), RADIUS))
    return cam2world, normalised_intrinsics(FOCAL).expand(num_views, 3, 3)


def hits(rays: Rays, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Which rays [..., R] meet the cuboid, and where they enter it, [..., R, 3]."""
    first, second = ((corner - rays.origins) / rays.directions for corner in (low, high))
    near, far = torch.minimum(first, second).amax(-1), torch.maximum(first, second).amin(-1)
    return near < far, rays.origins + near[..., None] * rays.directions


def cuboid_views(
    cuboids: Sequence[tuple[Tensor, Tensor]],
    size: int = 96,
    num_views: int = 36,
    scene_id: str = "cuboid",
    white_roof: float = 0.0,
) -> SceneViews:
    """Black cuboids (low, high) on white. white_roof: part of the last one's top, around its middle, that is white."""
    cam2world, intrinsics = cameras(num_views)
    rays = pixel_rays(cam2world, intrinsics, size, size)
    shade = torch.ones(num_views, size * size)
    for low, high in cuboids:
        hit, at = hits(rays, low, high)
        shade[hit] = 0.0
    if white_roof:
        middle, half = (low + high) / 2, (high - low) / 2
        on_roof = ((at - middle).abs() < white_roof * half)[..., :2].all(-1) & ((at - high)[..., 2].abs() < 1e-4)
        shade[hit & on_roof] = 1.0
    images = shade.view(num_views, 1, size, size).expand(-1, 3, -1, -1)
    return SceneViews(scene_id, "", images, cam2world, intrinsics, test_views=(0,))


def row_of(views: SceneViews) -> dict:
    """A row of the scene store."""
    pngs = [encode_png((255 * image).byte().permute(1, 2, 0).numpy()) for image in views.images]
    size = views.images.shape[-1]
    return make_row(views.scene_id, "", pngs, views.cam2world, views.intrinsics, views.test_views, size, size, "made")
