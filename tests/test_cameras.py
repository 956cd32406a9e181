"""Rays through chosen pixels and through all of an image are the same."""

from __future__ import annotations

import torch

from scaling.cameras import normalised_intrinsics, orbit, pixel_rays, rays_through


def test_rays_through_pixels_are_those_of_the_image():
    cam2world, intrinsics = orbit(3, 1.3), normalised_intrinsics(1.1).repeat(3, 1, 1)
    intrinsics[:, 0, 1], intrinsics[1, :2, 2] = 0.02, torch.tensor([0.4, 0.7])  # skew, and a centre beside the middle
    every = pixel_rays(cam2world, intrinsics, 5, 7)
    view, pixel = torch.tensor([[2, 0], [1, 1]]), torch.tensor([[34, 0], [8, 17]])
    found = rays_through(cam2world[view], intrinsics[view], pixel, 5, 7)
    torch.testing.assert_close(found.origins, every.origins[view, pixel])
    torch.testing.assert_close(found.directions, every.directions[view, pixel])
    torch.testing.assert_close(found.directions.norm(dim=-1), torch.ones(2, 2))


def test_the_ray_through_the_middle_is_the_cameras_axis():
    cam2world = orbit(2, 1.3)
    middle = rays_through(cam2world, normalised_intrinsics(1.0), torch.tensor([4, 4]), 3, 3)
    torch.testing.assert_close(middle.directions, cam2world[:, :3, 2])
    torch.testing.assert_close(middle.origins + 1.3 * middle.directions, torch.zeros(2, 3), atol=1e-6, rtol=0)
