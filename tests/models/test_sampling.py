"""Samples where a scene's cells say that something is, and what they are composed to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scaling.models.box import STEPS, Parts
from scaling.models.renderer import quadrature
from scaling.models.sampling import BLUR, EVENLY, surface_depths

NEAR, LENGTH = 1.0, 0.5  # of a ray's way through the box, and of each of its STEPS parts


def parts_of(values: list[int]) -> Parts:
    assert len(values) == STEPS
    return Parts(torch.tensor([NEAR]), torch.tensor([LENGTH]), torch.tensor([values], dtype=torch.uint8))


def close(ours: Tensor, by_hand) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(by_hand, dtype=ours.dtype), rtol=1e-4, atol=1e-4)


def places(depths: Tensor) -> Tensor:
    """Depths in parts."""
    return (depths[0] - NEAR) / LENGTH


def test_without_any_way_through_parts_of_a_ray_samples_are_spread_evenly(monkeypatch):
    """Cells that are all alike let so little through that the first would attract all: here the share that does is
    0."""
    monkeypatch.setattr("scaling.models.sampling.EVENLY", 1.0)
    depths, lengths = surface_depths(parts_of([1] * STEPS), 4)
    close(places(depths), [STEPS / 8, 3 * STEPS / 8, 5 * STEPS / 8, 7 * STEPS / 8])
    close(lengths, [[STEPS * LENGTH / 4] * 3])


def test_a_gap_gets_no_sample(monkeypatch):
    """Filled: the first 8 and the last 8 parts. Two samples fall into each, 4 parts apart; of what lies between the
    second and the third the gap does not count."""
    monkeypatch.setattr("scaling.models.sampling.EVENLY", 1.0)
    gap = [1] * 8 + [0] * (STEPS - 16) + [1] * 8
    depths, lengths = surface_depths(parts_of(gap), 4)
    close(places(depths), [2, 6, STEPS - 6, STEPS - 2])
    close(lengths, [[4 * LENGTH] * 3])


@pytest.mark.parametrize("seed", range(5))
def test_samples_lie_in_what_is_filled_and_count_no_more_than_that(seed):
    """Whatever the cells say, wherever the jitter falls."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (3, STEPS), generator=generator) * (torch.rand(3, STEPS, generator=generator) < 0.4)
    parts = Parts(torch.zeros(3), torch.full((3,), LENGTH), values.to(torch.uint8))
    depths, lengths = surface_depths(parts, 24, torch.rand(3, 24, generator=generator))
    first, last = (depths[:, [place]] / LENGTH for place in (0, -1))
    part_of = torch.arange(STEPS)
    between = (torch.minimum(part_of + 1, last) - torch.maximum(part_of, first)).clamp(0, 1) * (values > 0)
    close(lengths.sum(-1), between.sum(-1) * LENGTH)
    assert (lengths >= 0).all() and (depths.diff(dim=-1) >= -1e-5).all()
    part = (depths / LENGTH).clamp(max=STEPS - 1e-3)
    on_an_edge = (part - part.round()).abs() < 1e-3
    assert ((values.gather(1, part.long()) > 0) | on_an_edge).all()


def test_a_dense_part_attracts_most_samples():
    """Part 40 says 254: all light ends there. What is before it lets exp(−½ · ½) of a part through, 40 times."""
    through = math.exp(-0.5 * LENGTH * 40)
    assert through < 1e-4, "one that is not known at all is a little dense itself"
    free = [0] * 40 + [255] + [1] * (STEPS - 41)
    near_it = (places(surface_depths(parts_of(free), 200)[0]) - 40.5).abs() < 0.5 + BLUR
    assert near_it.float().mean() >= (1 - EVENLY) * 0.98
    assert near_it.float().mean() < 1, "some look elsewhere, for what is not known yet"


def test_jitter_stays_in_its_stratum():
    values = [1] * 8 + [0] * 20 + [30] * 4 + [1] * (STEPS - 32)
    first, middle, last = (
        surface_depths(parts_of(values), 12, torch.full((1, 12), jitter))[0] for jitter in (0.0, 0.5, 1 - 1e-6)
    )
    assert (first < middle).all() and (middle < last).all()
    close(last[:, :-1], first[:, 1:])
    close(middle, surface_depths(parts_of(values), 12)[0])


def test_a_ray_that_meets_nothing_stands_for_nothing():
    depths, lengths = surface_depths(parts_of([0] * STEPS), 6)
    assert depths.isfinite().all() and lengths.sum() == 0


def fog(depths: Tensor) -> tuple[Tensor, Tensor]:
    """A hill of density around depth 2, in colours that change along the ray."""
    raw = 4 - 12 * (depths - 2).square()
    return raw, torch.stack([depths.sin(), depths.cos()], -1)


@pytest.mark.parametrize("samples", [512])
def test_composed_samples_agree_with_dense_quadrature(samples):
    """Pieces of a cut-up ray, against the reference over a fine even ladder."""
    values = torch.zeros(1, STEPS, dtype=torch.uint8)
    values[0, 8:56] = 1
    values[0, 28:36] = 4
    parts = Parts(torch.tensor([0.0]), torch.tensor([4 / STEPS]), values)
    depths, lengths = surface_depths(parts, samples)
    ours = quadrature(depths, *fog(depths), lengths)
    even = torch.linspace(8 * 4 / STEPS, 56 * 4 / STEPS, 4097)[None]
    theirs = quadrature(even, *fog(even))
    for mine, reference in zip(ours[:3], theirs[:3]):
        torch.testing.assert_close(mine, reference, rtol=0, atol=2e-3)


def test_lengths_with_a_pencil():
    """Densities of 2 and 1 at the middles of two intervals, of which half a unit and one unit count: optical depths of
    1 and 1, at depths 1.5 and 3."""
    raw = 1 + torch.tensor([[2.0, 2.0, 1.0]]).expm1().log()  # softplus(raw − 1) is the number
    raw[0, 2] = 2 * (1 + math.log(math.expm1(1))) - raw[0, 1]
    colours = torch.tensor([[[1.0], [1.0], [0.0]]])
    depths, lengths = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 1.0]])
    out, depth, opacity, weights = quadrature(depths, raw, colours, lengths)
    alpha = 1 - math.exp(-1)
    by_hand = [alpha, (1 - alpha) * alpha]
    close(weights, [by_hand])
    close(opacity, [sum(by_hand)])
    close(out, [[by_hand[0] + 0.5 * by_hand[1]]])
    close(depth, [(1.5 * by_hand[0] + 3 * by_hand[1]) / sum(by_hand)])
