"""Planes and their fusion, on numbers that a pencil can check."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scaling.models.triplanes import fuse_planes, mix_base_planes, sample_planes, total_variation

AXES = ("xy", "xz", "yz")


def close(ours: Tensor, by_hand) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(by_hand, dtype=ours.dtype), rtol=1e-5, atol=1e-5)


def coordinate_planes(num_planes: int, resolution: int) -> Tensor:
    """Planes whose two features are a texel centre's own coordinates along width and height. [1, P, 2, K, K]"""
    centres = ((torch.arange(resolution) + 0.5) / resolution - 0.5) * 2
    along_height, along_width = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([along_width, along_height]).expand(1, num_planes, 2, resolution, resolution)


def test_each_plane_sees_its_own_axes():
    points = torch.tensor([[[0.1, 0.2, -0.3], [-0.35, 0.0, 0.25]]])
    sampled = sample_planes(coordinate_planes(3, 4), points, AXES)
    by_hand = [[[0.1, 0.2], [-0.35, 0.0]], [[0.1, -0.3], [-0.35, 0.25]], [[0.2, -0.3], [0.0, 0.25]]]
    close(sampled[0].transpose(1, 2), by_hand)


def test_a_repeated_plane_reads_the_axes_the_other_way_round():
    sampled = sample_planes(coordinate_planes(2, 4), torch.tensor([[[0.1, 0.2, 0.3]]]), ("xz", "zx"))
    close(sampled[0, :, :, 0], [[0.1, 0.3], [0.3, 0.1]])


def test_planes_are_zero_outside_the_box():
    sampled = sample_planes(torch.ones(1, 3, 1, 4, 4), torch.tensor([[[4.0, 0.0, 0.0]]]), AXES)
    close(sampled[0, :, 0, 0], [0.0, 0.0, 1.0])


def test_planes_without_axes_are_refused():
    with pytest.raises(ValueError, match="2 planes, but axes for 3"):
        sample_planes(torch.ones(1, 2, 1, 4, 4), torch.zeros(1, 1, 3), AXES)


def test_fusion_of_two_base_planes():
    base_planes = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 0.0, -10.0, 0.0]]).view(2, 1, 1, 2, 2)
    coefs = torch.tensor([[2.0, -1.0], [0.5, 0.0]])
    macro = mix_base_planes(coefs, base_planes)
    close(macro.flatten(1), [[-8.0, 4.0, 16.0, 8.0], [0.5, 1.0, 1.5, 2.0]])
    micro = torch.full((2, 1, 1, 2, 2), 7.0)
    fused = fuse_planes(micro, coefs, base_planes)
    assert fused.shape == (2, 1, 2, 2, 2)
    close(fused[:, :, 0], micro[:, :, 0])
    close(fused[:, :, 1], macro[:, :, 0])


def test_fusion_leaves_out_what_is_missing():
    base_planes, micro = torch.ones(2, 3, 4, 2, 2), torch.ones(1, 3, 5, 2, 2)
    assert fuse_planes(micro[:, :, :0], torch.ones(1, 2), base_planes).shape == (1, 3, 4, 2, 2), "macro only"
    assert fuse_planes(micro, torch.ones(1, 0), torch.ones(0, 3, 0, 2, 2)) is micro, "micro only"
    with pytest.raises(ValueError, match="3 coefs a scene, but 2 base planes"):
        mix_base_planes(torch.ones(1, 3), base_planes)


def test_total_variation():
    plane = torch.tensor([[0.0, 1.0], [3.0, 1.0]]).view(1, 1, 1, 2, 2)
    close(total_variation(plane), (9 + 0 + 1 + 4) / 4)
    close(total_variation(plane.repeat(5, 1, 1, 1, 1)), 3.5)  # the mean over scenes, not their sum
