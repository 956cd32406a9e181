"""The measured box: where objects are, by their silhouettes, and which part of a ray that leaves to sample."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scaling.training.space import measure_box

from scaling.cameras import Rays, look_at_origin, normalised_intrinsics, pixel_rays
from scaling.data.scenes import SceneViews
from scaling.models.box import CELLS, Box, cell_numbers
from scaling.training.workers import Workers

LATENT_SIZE = 32
PIXEL = 1.3 / 1.02 / LATENT_SIZE  # world units that a latent pixel is wide at the origin: 0.04
SIDES = torch.tensor([0.5, 0.2, 0.3])  # of the object, half of them


def box_views(low: torch.Tensor, high: torch.Tensor, size: int = 96) -> SceneViews:
    """A black cuboid on white, seen from all around."""
    azimuth = torch.arange(36) * 2.4  # the golden angle: all around, and every elevation with every azimuth
    elevation = torch.linspace(-0.95, 0.95, 36).asin()
    cam2world = look_at_origin(azimuth, elevation, torch.full((36,), 1.3))
    intrinsics = normalised_intrinsics(1.02).expand(36, 3, 3)
    rays = pixel_rays(cam2world, intrinsics, size, size)
    first, second = ((corner - rays.origins) / rays.directions for corner in (low, high))
    hit = torch.minimum(first, second).amax(-1) < torch.maximum(first, second).amin(-1)
    images = 1 - hit.float().view(36, 1, size, size).expand(-1, 3, -1, -1)
    return SceneViews("cuboid", "", images, cam2world, intrinsics, test_views=(0,))


@pytest.fixture(scope="module")
def box() -> Box:
    measured = Box(None)
    moved = torch.tensor([0.0, 0.0, 0.1])
    scenes = [box_views(-SIDES, SIDES), box_views(-SIDES + moved, SIDES + moved)]
    measure_box(measured, scenes, LATENT_SIZE, Workers())
    return measured


def test_the_box_holds_every_object_and_little_more(box):
    low, high = box.corners
    assert (low <= -SIDES - 0.5 * PIXEL).all() and (low >= -SIDES - 0.1).all()
    top = SIDES + torch.tensor([0.0, 0.0, 0.1])
    assert (high >= top + 0.5 * PIXEL).all() and (high <= top + 0.1).all()


def test_rays_are_sampled_where_something_can_be(box):
    origins = torch.tensor([[-2.0, 0.0, 0.0], [-2.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    directions = torch.tensor([[1.0, 0.0, 0.0]] * 3)
    near, far, hit = box.span(Rays(origins, directions))
    assert hit.tolist() == [True, False, True]
    assert 1.4 < near[0] < 1.5 and 2.5 < far[0] < 2.6
    assert near[1] == far[1]
    assert near[2] == 0 and 0.5 < far[2] < 0.6


def test_empty_cells_shorten_a_ray():
    """The far half of the box is empty: x above 0."""
    box = Box(None)
    box.corners.copy_(torch.tensor([[-1.0] * 3, [1.0] * 3]))
    box.filled[CELLS // 2 :] = False
    rays = Rays(torch.tensor([[-2.0, 0.1, 0.2], [0.5, 0.1, -3.0]]), torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))
    near, far, hit = box.span(rays)
    torch.testing.assert_close(near, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(far[0], torch.tensor(2.0))
    assert hit.tolist() == [True, False] and far[1] == near[1]


def test_cells_and_coordinates_of_the_box():
    box = Box(None)
    box.corners.copy_(torch.tensor([[-1.0, 0.0, 0.0], [1.0, 1.0, 4.0]]))
    inside = box.into(Rays(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[1.0, 1.0, 1.0]])))
    torch.testing.assert_close(inside.origins, torch.tensor([[0.0, 1.0, -0.5]]))
    torch.testing.assert_close(inside.directions, torch.tensor([[1.0, 2.0, 0.5]]))
    diagonal = Rays(torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[0.0, 0.0, 1.0]]))
    assert cell_numbers(diagonal, torch.tensor([[0.0, 1.99]])).tolist() == [[0, CELLS - 1]]
    diagonal = Rays(torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[1.0, 1.0, 1.0]]))
    assert cell_numbers(diagonal, torch.tensor([[1.99, 2.5]])).tolist() == [[CELLS**3 - 1] * 2]


def test_without_a_white_background_nothing_is_carved(tiny_scenes):
    grey = dataclasses.replace(tiny_scenes[0], images=torch.full_like(tiny_scenes[0].images, 0.5))
    box = Box(None)
    measure_box(box, [grey], LATENT_SIZE, Workers())
    assert box.filled.float().mean() > 0.5 and ((box.corners[1] - box.corners[0]) > 1.2).all()


def test_a_box_with_a_side_is_not_measured(tiny_scenes):
    box = Box(1.5)
    measure_box(box, tiny_scenes, LATENT_SIZE, Workers())
    assert not box.state_dict() and str(box) == "the box of side 1.5 around the origin"
