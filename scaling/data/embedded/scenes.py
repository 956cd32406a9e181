"""The embedded cars: any number of different cars, ray-traced on demand, for tests, the quickstart and benchmarks.

The scene's id alone seeds every random choice for a car, its cameras included.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaling.cameras import look_at_origin, normalised_intrinsics, pixel_rays
from scaling.data.embedded.cars import random_car
from scaling.data.embedded.solids import Floats, Solid, bounds, trace
from scaling.data.png import encode_png
from scaling.data.scene_id import check_scene_id
from scaling.data.scene_views import SceneViews, default_test_views, make_row, views_from_row

CAMERA_RADIUS = 1.3
FOCAL = 1.02
ELEVATIONS = (math.radians(5), math.radians(75))
_SAMPLES = 2  # rays per pixel, along each axis


def embedded_ids(count: int) -> list[str]:
    """The first `count` ids: car-00000, car-00001, …"""
    return [f"car-{number:05d}" for number in range(count)]


def embedded_car(scene_id: str, image_size: int = 128, num_views: int = 24) -> dict[str, Any]:
    """Render a row of the scene store: num_views views of a car on white, image_size × image_size pixels.

    World axes: x is forward, z is up. The car's bounding box is centred on the origin; its longest side is 1. Raises
    ValueError where the id is bad, or where fewer than 2 views or images without pixels are asked for.
    """
    check_scene_id(scene_id)
    if num_views < 2 or image_size < 1:
        raise ValueError(f"need at least 2 views of at least 1 pixel, got {num_views} of {image_size}")
    solids = embedded_solids(scene_id)
    cam2world = embedded_cameras(scene_id, num_views)
    intrinsics = normalised_intrinsics(FOCAL)
    pngs = [encode_png(_render(solids, pose, intrinsics, image_size)) for pose in cam2world]
    return make_row(
        scene_id=scene_id,
        category="car",
        pngs=pngs,
        cam2world=cam2world.numpy(),
        intrinsics=intrinsics.repeat(num_views, 1, 1).numpy(),
        test_views=default_test_views(num_views),
        height=image_size,
        width=image_size,
        source="embedded",
    )


def embedded_scene(scene_id: str, image_size: int = 128, num_views: int = 24) -> SceneViews:
    """Render the car of `embedded_car` and decode it to tensors."""
    return views_from_row(embedded_car(scene_id, image_size, num_views), image_size)


def embedded_solids(scene_id: str) -> list[Solid]:
    """The painted solids of a scene's car, in design units (see `cars.py`)."""
    return random_car(_random(scene_id, "car"))


def embedded_cameras(scene_id: str, num_views: int) -> Tensor:
    """cam2world [V, 4, 4], spread evenly over the sphere between 5° and 75° of elevation, in random order.

    Azimuths advance by the golden angle and heights by equal steps; both are jittered. The order is random so that
    the test views, the first tenth, cover the sphere like all others.
    """
    random = _random(scene_id, "cameras")
    steps = np.arange(num_views)
    golden = math.pi * (3 - math.sqrt(5))
    azimuth = (steps + random.uniform(-0.1, 0.1, num_views)) * golden + random.uniform(0, 2 * math.pi)
    low, high = (math.sin(elevation) for elevation in ELEVATIONS)
    elevation = np.arcsin(low + (high - low) * (steps + random.uniform(0, 1, num_views)) / num_views)
    order = random.permutation(num_views)
    angles = torch.from_numpy(np.stack([azimuth[order] % (2 * math.pi), elevation[order]])).float()
    return look_at_origin(angles[0], angles[1], torch.full_like(angles[0], CAMERA_RADIUS))


def trace_car(solids: list[Solid], origin: Floats, directions: Floats) -> tuple[Floats, Floats]:
    """`trace` in world coordinates: the solids are centred, and the longest side of their bounding box is 1."""
    low, high = bounds(solids)
    length = float((high - low).max())
    from_design = (origin * length + (low + high) / 2).astype(np.float32)
    colours, distances = trace(solids, from_design, directions)
    return colours, distances / np.float32(length)


def _render(solids: list[Solid], cam2world: Tensor, intrinsics: Tensor, image_size: int) -> NDArray[np.uint8]:
    """Render a view [H, W, 3]; a pixel is the mean of 2 × 2 rays."""
    rays = pixel_rays(cam2world, intrinsics, image_size * _SAMPLES, image_size * _SAMPLES)
    colours, _ = trace_car(solids, cam2world[:3, 3].numpy(), rays.directions.numpy())
    samples = colours.reshape(image_size, _SAMPLES, image_size, _SAMPLES, 3)
    mean = sum(samples[:, i, :, j] for i in range(_SAMPLES) for j in range(_SAMPLES)) / _SAMPLES**2
    return np.rint(mean * 255).astype(np.uint8)


def _random(scene_id: str, purpose: str) -> np.random.Generator:
    """A generator that depends on the id and the purpose only, not on the machine or on earlier draws."""
    digest = hashlib.sha256(f"{scene_id}/{purpose}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
