"""Silhouettes, and the cells of space that they do not carve away."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.cuboids import cuboid_views
from torch import Tensor

from scaling.data.scene_views import SceneViews
from scaling.training.measure.visual_hull import dilated, pooled, silhouettes, visual_hull

SIDES = torch.tensor([0.5, 0.2, 0.3])  # of the cuboid, half of them
CELLS = 40
CELL = 1.6 / CELLS
SEEN = 0.57  # the ball that every image shows all of


def centres(cells: int = CELLS, half: float = 0.8) -> Tensor:
    axis = ((torch.arange(cells) + 0.5) / cells - 0.5) * 2 * half
    return torch.cartesian_prod(axis, axis, axis)


def hull_of(
    views: SceneViews, shown: Tensor | None = None, cells: int = CELLS, margin: float = 0.0, half: float = 0.8
) -> Tensor:
    """Of the cube from -half to half."""
    corners = torch.tensor([[-half] * 3, [half] * 3])
    return visual_hull(corners, cells, views, silhouettes(views) if shown is None else shown, margin)


@pytest.fixture(scope="module")
def views() -> SceneViews:
    return cuboid_views([(-SIDES, SIDES)])


@pytest.fixture(scope="module")
def inside() -> Tensor:
    """Cells whose middles lie in the cuboid: 4160."""
    return (centres().abs() <= SIDES).all(1)


def test_the_hull_holds_the_cuboid_and_little_more(views, inside):
    hull = hull_of(views)
    assert hull[inside].all()
    beyond = (centres()[hull].abs() - SIDES).clamp(min=0).amax(1)
    assert (beyond < 2 * CELL).float().mean() > 0.98 and hull.sum() < 1.5 * inside.sum()


def test_a_margin_is_in_pixels(views):
    """Four pixels of 96 are 0.05 at the origin's distance, a cell and a quarter on each side."""
    near, wide = hull_of(views), hull_of(views, margin=4.0)
    assert wide[near].all()
    for axis, half in enumerate(SIDES.tolist()):
        line = centres().abs().argsort(dim=1)  # cells on the axis: the other two coordinates are next to 0
        on_axis = (line[:, 2] == axis) & (centres().abs().sort(dim=1).values[:, 1] < CELL)
        on_axis &= centres().norm(dim=1) < SEEN
        ends = [centres()[hull & on_axis, axis].amax() for hull in (near, wide)]
        assert half - CELL / 2 < ends[0] < ends[1] < half + 3 * CELL


def test_a_white_roof_is_not_carved(views, inside):
    """By white alone, all that lies below the roof would be gone."""
    roofed = cuboid_views([(-SIDES, SIDES)], white_roof=0.3)
    by_white_alone = roofed.images[list(roofed.train_views)].amin(1) < 254 / 255
    assert not hull_of(roofed, by_white_alone)[inside].all() and hull_of(roofed)[inside].all()


def test_alpha_decides_where_it_is_given(views):
    """All pixels are black; what is a little opaque belongs to the scene."""
    shown = views.images[:, 0] < 0.5
    of_alpha = replace(views, images=torch.zeros_like(views.images), alpha=shown * 0.01)
    assert torch.equal(silhouettes(of_alpha), silhouettes(views))
    assert torch.equal(hull_of(of_alpha), hull_of(views))


@pytest.mark.parametrize("wrong", ["white", "shifted"])
def test_one_wrong_view_does_not_carve_alone(views, inside, wrong):
    shown = silhouettes(views).clone()
    shown[7] = False if wrong == "white" else shown[7].roll(40, 1)
    hull = hull_of(views, shown)
    assert hull[inside].all() and hull.sum() < 1.5 * inside.sum()


def test_two_views_that_agree_carve(views, inside):
    """A scene of two views: each carves much alone, and is believed."""
    two = replace(
        views, images=views.images[:3], cam2world=views.cam2world[[0, 0, 13]], intrinsics=views.intrinsics[:3]
    )
    shown = silhouettes(views)[[0, 12]]
    hull = hull_of(two, shown)
    assert inside.sum() < hull.sum() < 0.5 * CELLS**3


def test_a_scene_that_shows_nothing_keeps_the_whole_box(views):
    assert hull_of(replace(views, images=torch.ones_like(views.images))).all()


def test_a_scene_without_a_background_keeps_all_that_half_of_its_views_see(views):
    grey = hull_of(replace(views, images=torch.full_like(views.images, 0.5)))
    assert grey[centres().norm(dim=1) < SEEN - 0.02].all(), "a ball of that size fills every image"


def brute_force(views: SceneViews, cells: int, margin: float, half: float) -> Tensor:
    """Cell by cell, view by view: carved where no pixel of the silhouette is within the square that the cell's ball
    takes, at most, and `margin` around it."""
    shown = silhouettes(views).numpy()
    side, kept = 2 * half / cells, []
    for point in centres(cells, half).double().numpy():
        stays, seen = True, 0
        for view, mask in zip(views.train_views, shown):
            size = len(mask)
            world2cam = np.linalg.inv(views.cam2world[view].double().numpy())
            x, y, depth = views.intrinsics[view].double().numpy() @ (world2cam[:3, :3] @ point + world2cam[:3, 3])
            column, row = int(np.floor(x / depth * size)), int(np.floor(y / depth * size))
            reach = side * 3**0.5 / 2
            around = views.intrinsics[view][0, 0].item() * size * reach / max(depth - reach, reach) + margin
            if not (0 <= column < size and 0 <= row < size):  # none of these views cuts the scene off
                x, y = x / depth * size, y / depth * size
                beside = max(-x, x - size, -y, y - size)
                stays = stays and not (depth > reach and beside > around)
                continue
            seen += 1
            rows, columns = np.nonzero(mask)
            nearest = np.maximum(abs(rows - row), abs(columns - column)).min()
            stays = stays and nearest <= around
        kept.append(stays and seen >= len(shown) / 2)
    return torch.tensor(kept)


@pytest.mark.slow
def test_coarse_to_fine_finds_what_brute_force_finds():
    """Two cuboids apart, so that cells stay in several places."""
    pieces = [(torch.tensor([-0.3, -0.2, -0.2]), torch.tensor([-0.1, 0.1, 0.1])), (SIDES * 0.3, SIDES * 0.6)]
    views = cuboid_views(pieces, size=48, num_views=7)
    found, slow = hull_of(views, cells=16, margin=0.5, half=0.32), brute_force(views, 16, 0.5, 0.32)
    assert 100 < slow.sum() < 3000
    assert torch.equal(found, slow)


def test_dilated_and_pooled_masks():
    mask = torch.zeros(1, 5, 7, dtype=torch.bool)
    mask[0, 1, 5] = True
    wide = dilated(mask, 2)
    assert wide[0].nonzero().amin(0).tolist() == [0, 3] and wide[0].nonzero().amax(0).tolist() == [3, 6]
    assert wide.sum() == 4 * 4 and torch.equal(dilated(mask, 0), mask)
    assert pooled(mask, 2)[0].nonzero().tolist() == [[0, 2]] and pooled(mask, 2).shape == (1, 3, 4)
