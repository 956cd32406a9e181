"""The box that planes span: its cells and coordinates, and which parts of a ray can meet something."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scaling.cameras import Rays
from scaling.models.box import OLD_CELLS, STEPS, Box, cell_numbers
from scaling.models.cells import CELLS

close = torch.testing.assert_close


def box_between(low: list[float], high: list[float]) -> Box:
    box = Box(None)
    box.corners.copy_(torch.tensor([low, high]))
    return box


def full(value: int = 1) -> Tensor:
    return torch.full((1, CELLS**3), value, dtype=torch.uint8)


ALONG_X = Rays(torch.tensor([[[-2.0, 0.01, 0.01], [-2.0, 0.01, 2.0]]]), torch.tensor([[[1.0, 0.0, 0.0]] * 2]))


def test_parts_of_a_ray_that_enters_and_of_one_that_misses():
    parts = box_between([-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]).parts(ALONG_X, full())
    assert parts.hit.tolist() == [[True, False]]
    close(parts.near[0, 0], torch.tensor(1.0))
    close(parts.far[0, 0], torch.tensor(3.0))
    close(parts.length[0], torch.tensor([2 / STEPS, 0.0]))
    assert (parts.values[0, 0] == 1).all()


def test_a_ray_that_starts_inside_has_the_rest_of_its_way():
    inside = Rays(torch.tensor([[[0.5, 0.0, 0.0]]]), torch.tensor([[[1.0, 0.0, 0.0]]]))
    parts = box_between([-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]).parts(inside, full())
    assert parts.near.item() == 0 and parts.far.item() == pytest.approx(0.5)


def test_parts_say_what_the_cells_of_each_scene_say():
    """Scene 0 has nothing in the half where x is above 0; scene 1 is 7 everywhere."""
    cells = full().view(CELLS, CELLS, CELLS).clone()
    cells[CELLS // 2 :] = 0
    both = torch.cat([cells.view(1, -1), full(7)])
    rays = Rays(*(tensor.expand(2, -1, -1) for tensor in (ALONG_X.origins, ALONG_X.directions)))
    parts = box_between([-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]).parts(rays, both)
    assert parts.values[0, 0].tolist() == [1] * (STEPS // 2) + [0] * (STEPS // 2)
    assert (parts.values[1, 0] == 7).all()
    empty = Box(1.0).parts(ALONG_X, full(0))
    assert not empty.hit.any(), "a box with a side has cells, too"


def test_centres_lie_in_their_own_cells():
    centres = Box(None).centres()
    still = Rays(centres, torch.zeros_like(centres))
    assert torch.equal(cell_numbers(still, torch.zeros(CELLS**3, 1), CELLS)[:, 0], torch.arange(CELLS**3))


def test_empty_cells_of_old_models_shorten_a_ray():
    """The far half of the box is empty: x above 0."""
    box = box_between([-1.0, -1.0, -1.0], [1.0, 1.0, 1.0])
    box.filled[OLD_CELLS // 2 :] = False
    rays = Rays(torch.tensor([[-2.0, 0.1, 0.2], [0.5, 0.1, -3.0]]), torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))
    near, far, hit = box.span(rays)
    close(near, torch.tensor([1.0, 2.0]))
    close(far[0], torch.tensor(2.0))
    assert hit.tolist() == [True, False] and far[1] == near[1]


def test_cells_and_coordinates_of_the_box():
    box = box_between([-1.0, 0.0, 0.0], [1.0, 1.0, 4.0])
    inside = box.into(Rays(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[1.0, 1.0, 1.0]])))
    close(inside.origins, torch.tensor([[0.0, 1.0, -0.5]]))
    close(inside.directions, torch.tensor([[1.0, 2.0, 0.5]]))
    diagonal = Rays(torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[0.0, 0.0, 1.0]]))
    assert cell_numbers(diagonal, torch.tensor([[0.0, 1.99]]), CELLS).tolist() == [[0, CELLS - 1]]
    diagonal = Rays(torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[1.0, 1.0, 1.0]]))
    assert cell_numbers(diagonal, torch.tensor([[1.99, 2.5]]), CELLS).tolist() == [[CELLS**3 - 1] * 2]


def test_distances_may_be_counted_in_longest_sides():
    """The box is 4 long; along z a ray that starts 6 from its middle enters after 4 and leaves after 8."""
    box = Box(None, "box")
    box.corners.copy_(torch.tensor([[-1.0, -1.0, -2.0], [1.0, 1.0, 2.0]]))
    near, far, hit = box.span(Rays(torch.tensor([[0.0, 0.0, -6.0]]), torch.tensor([[0.0, 0.0, 1.0]])))
    assert (near.item(), far.item(), hit.item(), float(box.unit)) == (1.0, 2.0, True, 4.0)
    assert float(Box(3.0, "box").unit) == 3.0 and float(Box(3.0).unit) == 1.0


def test_a_box_says_where_it_is():
    assert not Box(1.5).state_dict() and str(Box(1.5)) == "the box of side 1.5 around the origin"
    close(Box(1.5).bounds, torch.tensor([[-0.75] * 3, [0.75] * 3]))
    assert str(box_between([-1.0, 0.0, 0.0], [1.0, 0.5, 4.0])) == (
        "the box from [-1, 0, 0] to [1, 0.5, 4], where the store's objects are"
    )
