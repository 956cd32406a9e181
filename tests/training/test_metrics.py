"""Image metrics: numbers that can be checked, and FLIP against NVIDIA's own program."""

from __future__ import annotations

import flip_evaluator
import pytest
import torch
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from scaling.training.metrics.flip import flip
from scaling.training.metrics.images import ms_ssim, scale_weights, ssim, view_metrics
from scaling.training.random_streams import stream


def pictures(size: int, num_views: int = 3) -> torch.Tensor:
    """Smooth noise [V, 3, size, size] in [0, 1]."""
    noise = torch.rand(num_views, 3, size, size, generator=stream("pictures"))
    return torch.nn.functional.avg_pool2d(noise, 3, 1, 1)


@pytest.mark.parametrize("size", [16, 33, 64, 128])
def test_the_best_values_and_no_nan_for_the_worst(size):
    truth = pictures(size)
    same = view_metrics(truth, truth)
    assert same == pytest.approx({"psnr": 100.0, "ssim": 1.0, "ms_ssim": 1.0, "flip": 0.0}, abs=1e-4)
    opposite = view_metrics(1 - truth, truth)
    assert opposite["ms_ssim"] == 0.0, "a power of a negative contrast would be NaN"
    assert opposite["flip"] > 0.3


@pytest.mark.parametrize(
    ("side", "weights"),
    [
        (16, (1.0,)),
        (32, (0.1356, 0.8644)),
        (64, (0.0711, 0.4530, 0.4760)),
        (128, (0.0517, 0.3295, 0.3462, 0.2726)),
        (256, (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)),
    ],
)
def test_scales_of_ms_ssim(side, weights):
    assert scale_weights(side) == pytest.approx(weights, abs=1e-4)


@pytest.mark.parametrize("side", [11, 21, 22, 43, 44, 98, 99, 175, 176])
def test_ssim_and_ms_ssim_are_torchmetrics_own(side):
    truth = pictures(side)
    images = (truth + 0.1 * torch.randn(truth.shape, generator=stream("noise"))).clamp(0, 1)
    given = {"preds": images, "target": truth, "data_range": 1.0, "reduction": "none"}
    expected = structural_similarity_index_measure(**given)
    torch.testing.assert_close(ssim(images, truth), expected, rtol=0, atol=1e-5)
    if side >= 22:  # below, the window fits into one scale
        expected = multiscale_structural_similarity_index_measure(**given, betas=scale_weights(side), normalize="relu")
        torch.testing.assert_close(ms_ssim(images, truth), expected, rtol=0, atol=1e-5)


def test_ms_ssim_forgives_fine_errors_and_not_coarse_ones():
    """Stripes of one pixel are gone at the second scale, stripes of 16 are not. At 16² it is SSIM."""
    truth = pictures(64)
    fine, coarse = ((torch.arange(64) // width % 2 - 0.5) * 0.2 for width in (1, 16))
    assert (ms_ssim(truth + fine, truth) > ms_ssim(truth + coarse, truth)).all()
    assert (ssim(truth + fine, truth) < ssim(truth + coarse, truth)).all()
    small = pictures(16)
    assert torch.equal(ms_ssim(small * 0.9, small), ssim(small * 0.9, small))


def test_flip_with_a_pencil():
    """Plain images have no edges, so what counts is their colours' distance d = |ΔL*|^0.7 = 100^0.7 = 25.1 of the
    largest, 41.3 (green and blue): above 0.4 of it, so 0.95 + 0.05 · (25.1 − 16.5) / (41.3 − 16.5) = 0.967."""
    black, white = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)
    assert flip(black, white).item() == pytest.approx(0.967, abs=1e-3)
    green, blue = (torch.eye(3)[channel].view(1, 3, 1, 1).expand(1, 3, 16, 16) for channel in (1, 2))
    assert flip(green, blue).item() == pytest.approx(1.0, abs=1e-3), "no two colours differ more"


def test_flip_is_nvidias():
    truth = pictures(64, 4)
    images = (truth + 0.1 * torch.randn(truth.shape, generator=stream("noise"))).clamp(0, 1)
    images[2], images[3] = truth[2].flip(-1), truth[3].roll(1, -1)
    truth[3, :, 20:40, 20:40] = torch.tensor([1.0, 0.0, 0.2]).view(3, 1, 1)
    expected = [
        flip_evaluator.evaluate(reference.numpy(), test.numpy(), "LDR", applyMagma=False)[1]
        for reference, test in zip(*(t.movedim(1, -1).contiguous() for t in (truth, images)))
    ]
    assert flip(images, truth).tolist() == pytest.approx(expected, abs=1e-4)
    many = [t.repeat(5, 1, 1, 1) for t in (images, truth)]
    assert flip(*many).tolist() == pytest.approx(5 * expected, abs=1e-4), "in chunks"
