"""Rays, quadrature and the field, on numbers that a pencil can check."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scaling.cameras import Rays
from scaling.models.box import Box
from scaling.models.field import Field
from scaling.models.renderer import Renderer, composite, quadrature
from scaling.models.sampling import stratified_depths

AXES = ("xy", "xz", "yz")


def close(ours: Tensor, by_hand) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(by_hand, dtype=ours.dtype), rtol=1e-5, atol=1e-5)


def ray(origin, direction) -> Rays:
    direction = torch.tensor([direction], dtype=torch.float32)
    return Rays(torch.tensor([origin], dtype=torch.float32), direction / direction.norm())


@pytest.mark.parametrize(
    ("origin", "direction", "near", "far"),
    [
        ([-2, 0, 0], [1, 0, 0], 1.5, 2.5),
        ([-2, 0.2, -0.4], [1, 0, 0], 1.5, 2.5),
        ([-1, -1, 0], [1, 1, 0], 0.5 * math.sqrt(2), 1.5 * math.sqrt(2)),
        ([0.1, 0, 0], [0, 0, -1], 0.0, 0.5),  # from inside
    ],
)
def test_box_near_and_far(origin, direction, near, far):
    ours = Box(1.0).span(ray(origin, direction))
    close(torch.cat(ours[:2]), [near, far])
    assert ours[2].all()


@pytest.mark.parametrize(
    ("origin", "direction"), [([-2, 1, 0], [1, 0, 0]), ([2, 0, 0], [1, 0, 0]), ([-2, 0, 0], [1, 1, 0])]
)
def test_a_ray_that_misses_the_box_has_no_length(origin, direction):
    near, far, hit = Box(1.0).span(ray(origin, direction))
    assert not hit.any() and near == far


def test_stratified_depths():
    near, far = torch.tensor([1.0]), torch.tensor([3.0])
    close(stratified_depths(near, far, 4), [[1.25, 1.75, 2.25, 2.75]])
    close(stratified_depths(near, far, 4, torch.tensor([[0.0, 0.5, 0.9, 0.2]])), [[1.0, 1.75, 2.45, 2.6]])


def test_quadrature_of_a_constant_density():
    density = 2.0
    raw = torch.full((1, 4), 1 + math.log(math.expm1(density)))  # softplus(raw − 1) = 2
    depths = torch.tensor([[1.0, 1.1, 1.5, 1.6]])
    out, depth, opacity, weights = quadrature(depths, raw, torch.full((1, 4, 2), 0.3))
    through = [math.exp(-density * length) for length in (0.0, 0.1, 0.5, 0.6)]
    by_hand = [through[0] - through[1], through[1] - through[2], through[2] - through[3]]
    close(weights, [by_hand])
    close(opacity, [1 - math.exp(-density * 0.6)])
    close(out, [[0.3 * (1 - through[3])] * 2])
    close(depth, [sum(w * d for w, d in zip(by_hand, (1.05, 1.3, 1.55))) / sum(by_hand)])


def test_quadrature_takes_the_mean_of_an_intervals_ends():
    raw, colours = torch.tensor([[0.0, 4.0]]), torch.tensor([[[0.2], [0.6]]])
    out, depth, opacity, _ = quadrature(torch.tensor([[1.0, 2.0]]), raw, colours)
    alpha = 1 - math.exp(-math.log1p(math.exp(2.0 - 1)))
    close(torch.cat([out[0], depth, opacity]), [0.4 * alpha, 1.5, alpha])


def test_composite_over_the_background():
    close(composite(torch.tensor([[0.1, 0.2]]), torch.tensor([0.25]), torch.tensor([1.0, 0.4])), [[0.7, 0.0]])


@pytest.mark.parametrize("depths", [[1.0, 1.5, 2.0], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("raw", [-1e4, -120.0])
def test_an_empty_ray_has_finite_depth_and_gradients(depths, raw):
    depths = torch.tensor([depths], requires_grad=True)
    raw = torch.full((1, 3), raw, requires_grad=True)
    colours = torch.full((1, 3, 2), 0.5, requires_grad=True)
    out, depth, opacity, _ = quadrature(depths, raw, colours)
    close(depth.detach(), depths[:, -1].detach())
    close(opacity.detach(), [0.0])
    (out.sum() + depth.sum() + opacity.sum()).backward()
    assert all(tensor.grad.isfinite().all() for tensor in (depths, raw, colours))


def test_a_ray_beside_the_box_shows_the_background():
    torch.manual_seed(0)
    planes = torch.randn(1, 3, 2, 4, 4, requires_grad=True)
    rays = ray([-2, 1, 0], [1, 0, 0])
    background = torch.tensor([0.1, 0.5, 0.9])
    renderer = Renderer(AXES, Box(1.0), None, None, samples=4, importance_samples=4)
    out = renderer(planes, Field(2, 8, 3), Rays(rays.origins[None], rays.directions[None]), background)
    close(out.colours.detach()[0, 0], 2 * background - 1)
    (out.colours.sum() + out.depth.sum()).backward()
    assert planes.grad.isfinite().all()


def test_the_field_reaches_black_and_white():
    field = Field(2, 8, 3)
    with torch.no_grad():
        field.head.weight.zero_()
        field.head.bias.copy_(torch.tensor([5.0, -50.0, 0.0, 50.0]))
    raw, colours = field(torch.randn(4, 7, 2))
    assert raw.shape == (4, 7) and colours.shape == (4, 7, 3)
    close(raw.detach()[0, 0], 5.0)
    close(colours.detach()[0, 0], [-0.001, 0.5, 1.001])
