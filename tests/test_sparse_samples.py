"""Samples of planes: the sparse product of a CPU against grid_sample, and how planes' features become a point's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scaling.models.sparse_samples import sample_sparse
from scaling.models.triplanes import AXES, combine_planes, point_features, sample_planes

pytestmark = pytest.mark.usefixtures("one_thread")

PLANE_AXES = ("xy", "xz", "zy")
COLUMNS = [(AXES[axes[0]], AXES[axes[1]]) for axes in PLANE_AXES]


def planes_and_points(size: int) -> tuple[Tensor, Tensor]:
    """Two scenes; points inside, outside, on corners, edges and texel centres of the box."""
    generator = torch.Generator().manual_seed(size)
    planes = torch.randn(2, 3, 4, size, size, generator=generator)
    inside = torch.rand(2, 40, 3, generator=generator) * 2 - 1
    around = torch.randn(2, 40, 3, generator=generator) * 1.5
    edges = torch.tensor([[-1.0, 1.0, 0.0], [1 - 1 / size, -1 + 1 / size, 1.0], [1.0 + 1 / size, 0, 9], [-99, 0.1, 0]])
    return planes, torch.cat([inside, around, edges.expand(2, 4, 3)], 1)


@pytest.mark.parametrize("size", [2, 5, 16])
def test_the_sparse_product_is_grid_sample(size):
    planes, points = planes_and_points(size)
    ours = sample_sparse(planes, points, COLUMNS)
    torch.testing.assert_close(ours, sample_planes(planes, points, PLANE_AXES).transpose(2, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combine", ["sum", "product"])
def test_so_are_its_gradients(combine):
    planes, points = planes_and_points(7)
    weights = torch.randn(2, points.shape[1], 4, generator=torch.Generator().manual_seed(0))
    first, second = planes.clone().requires_grad_(), planes.clone().requires_grad_()
    (point_features(first, points, PLANE_AXES, combine) * weights).sum().backward()
    reference = combine_planes(sample_planes(second, points, PLANE_AXES), combine).transpose(1, 2)
    (reference * weights).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-4)


def test_double_precision_and_points_with_gradients_take_the_reference():
    planes, points = planes_and_points(5)
    expected = point_features(planes, points, PLANE_AXES, "product")
    exact = point_features(planes.double(), points.double(), PLANE_AXES, "product")
    torch.testing.assert_close(expected, exact.float(), rtol=1e-4, atol=1e-4)
    moved = points.clone().requires_grad_()
    point_features(planes, moved, PLANE_AXES, "product").sum().backward()
    assert moved.grad.abs().sum() > 0


def test_features_of_three_planes_combine():
    """½, −½ and 3: their sum is 3, their product 1.5 · 0.5 · 4 − 1 = 2."""
    features = torch.tensor([0.5, -0.5, 3.0]).view(1, 3, 1, 1)
    assert combine_planes(features, "sum").item() == 3.0
    assert combine_planes(features, "product").item() == 2.0


def test_zero_planes_are_neutral():
    planes, points = planes_and_points(5)
    zero = torch.zeros_like(planes)
    assert point_features(zero, points, PLANE_AXES, "product").abs().max() == 0
    one = zero.clone()
    one[:, 1] = planes[:, 1]
    alone = point_features(one, points, PLANE_AXES, "product")
    torch.testing.assert_close(alone, point_features(one, points, PLANE_AXES, "sum"), rtol=1e-5, atol=1e-5)
