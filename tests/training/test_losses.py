"""Losses and metrics, by hand."""

from __future__ import annotations

import pytest
import torch

from scaling.config import LossWeights
from scaling.training.losses import pixel_error, weighted
from scaling.training.metrics.images import psnr, ssim
from scaling.training.random_streams import stream


def test_pixel_error_is_taken_in_minus_one_to_one():
    images = torch.stack([torch.full((3, 2, 2), 0.5), torch.ones(3, 2, 2)])
    truth = torch.stack([torch.full((3, 2, 2), 0.25), torch.zeros(3, 2, 2)])
    assert pixel_error(images, truth).tolist() == [0.25, 4.0]


def test_losses_are_weighed_item_by_item():
    losses = {"latent": torch.tensor([1.0, 2.0]), "rgb": torch.tensor([10.0, 0.0]), "kl": torch.tensor([5.0, 5.0])}
    weights = LossWeights(latent=2.0, rgb=0.5)
    assert weighted(losses, weights).tolist() == [7.0, 4.0]
    assert weighted(losses, weights, kl_weight=0.2).tolist() == [8.0, 5.0]


def test_psnr_and_ssim():
    truth = torch.rand(2, 3, 16, 16, generator=stream("truth")) * 0.5
    assert psnr(truth + 0.1, truth).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    assert psnr(truth, truth).tolist() == [100.0, 100.0], "capped"
    assert ssim(truth, truth).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert (ssim(1 - truth, truth) < 0.5).all()
