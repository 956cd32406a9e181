"""Image metrics, per view; images in [0, 1]."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from scaling.training.metrics.flip import flip

VIEW_METRICS = ("psnr", "ssim", "ms_ssim", "flip")  # for flip the lowest is best, for the others the highest
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the five scales, as published (Wang et al., 2003)
REACH = 5  # of SSIM's window, on each side of its middle
SCALE_SIDES = (0, 22, 44, 99, 176)  # least pixels a side for which the window of 11 fits into 1, 2, … scales


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image: 10 log10(1 / MSE), capped at 100 dB. [B, 3, H, W] twice → [B].

    >>> psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.1))  # MSE 0.1² = 10⁻²
    tensor([20.])
    """
    mse = (images - truth).square().flatten(1).mean(1)
    return -10 * torch.log10(mse.clamp(min=1e-10))


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Gaussian window 11, σ 1.5) of each image. [B, 3, H, W] twice → [B]."""
    return structure(images, truth)[0]


def ms_ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Multi-scale SSIM of each image, in [0, 1]. [B, 3, H, W] twice → [B].

    The published metric has five scales, each half as large as the one before, so its window of 11 needs 176 pixels a
    side. Smaller images take the first scales that fit, and these scales' weights are divided by their sum:

    | pixels a side | scales | weights, the finest scale first |
    |---|---|---|
    | 176 and more | 5 | 0.0448, 0.2856, 0.3001, 0.2363, 0.1333 |
    | 99 to 175 (128) | 4 | 0.0517, 0.3295, 0.3462, 0.2726 |
    | 44 to 98 (64) | 3 | 0.0711, 0.4530, 0.4760 |
    | 22 to 43 (32) | 2 | 0.1356, 0.8644 |
    | up to 21 | 1 | 1: SSIM |

    So values are comparable between images of one size only. Opposite images (negative contrast) give 0.
    """
    return structure(images, truth)[1]


def structure(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM and MS-SSIM of each image, [B] each; one is the other's finest scale. [B, 3, H, W] twice."""
    weights = scale_weights(min(images.shape[-2:]))
    first, multi = None, torch.ones(len(images), device=images.device)
    for scale, weight in enumerate(weights):
        if scale:
            images, truth = avg_pool2d(images, 2), avg_pool2d(truth, 2)
        similar, contrast = _similarities(images, truth)
        first = similar if first is None else first
        # The luminance counts at the coarsest scale alone. A power of a negative contrast would be NaN.
        multi = multi * (similar if scale == len(weights) - 1 else contrast).clamp(min=0) ** weight
    assert first is not None
    return first, multi


def _similarities(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Mean SSIM, and mean of its contrast and structure alone, of each image, [B] each. [B, 3, H, W] twice.

    With means μ, variances σ² and the covariance under a Gaussian window (Wang et al., 2004): (2 μ₁ μ₂ + C₁) / (μ₁² +
    μ₂² + C₁) · (2 σ₁₂ + C₂) / (σ₁² + σ₂² + C₂), C₁ = 0.01², C₂ = 0.03². As in torchmetrics, SSIM counts at all pixels,
    the image being mirrored at its border, and its second factor where the window lies inside the image.
    """
    down, across = (_window(size, images.device) for size in images.shape[-2:])
    both = torch.stack([images, truth])
    means = down @ both @ across.T
    variances = (down @ both.square() @ across.T - means.square()).clamp(min=0)
    covariance = down @ (images * truth) @ across.T - means.prod(0)
    contrast = (2 * covariance + 0.03**2) / (variances.sum(0) + 0.03**2)
    luminance = (2 * means.prod(0) + 0.01**2) / (means.square().sum(0) + 0.01**2)
    inside = contrast[..., REACH:-REACH, REACH:-REACH]
    return (luminance * contrast).flatten(1).mean(1), inside.flatten(1).mean(1)


@functools.lru_cache(maxsize=64)
def _window(size: int, device: torch.device) -> Tensor:
    """The Gaussian window around each of `size` values, mirrored at their ends, as a matrix [size, size].

    Two products with it take a quarter of a convolution's time on a CPU, and are exact on every device.
    """
    offsets = torch.arange(-REACH, REACH + 1)
    taps = torch.exp(-offsets.double().square() / (2 * 1.5**2))
    matrix, last = torch.zeros(size, size, dtype=torch.float64), size - 1
    for offset, tap in zip(offsets.tolist(), (taps / taps.sum()).tolist()):
        places = torch.arange(size)
        seen = last - (last - (places + offset).abs()).abs()
        matrix[places, seen] += tap
    return matrix.float().to(device)


def scale_weights(side: int) -> tuple[float, ...]:
    """Weights of MS-SSIM's scales for images of `side` pixels a side; they sum to 1."""
    weights = SCALE_WEIGHTS[: sum(side >= least for least in SCALE_SIDES)]
    return tuple(weight / sum(weights) for weight in weights)


def view_metrics(images: Tensor, truth: Tensor) -> dict[str, float]:
    """VIEW_METRICS, each the mean over a scene's views: PSNR in dB, SSIM, MS-SSIM and FLIP.

    [V, 3, H, W] twice, in [0, 1].
    """
    similar, multi = structure(images, truth)
    measured = {"psnr": psnr(images, truth), "ssim": similar, "ms_ssim": multi, "flip": flip(images, truth)}
    return {name: values.mean().item() for name, values in measured.items()}


def why_no_lpips() -> str:
    """The reason why torchmetrics cannot compute LPIPS here; "" where it can be tried."""
    missing = [name for name in ("torchvision",) if importlib.util.find_spec(name) is None]
    return f"{missing[0]} is not installed (pip install 'scaling[lpips]')" if missing else ""


@functools.cache
def lpips_network(device: str) -> torch.nn.Module | None:
    """LPIPS (VGG) on images in [0, 1]; None where torchvision is missing or the weights cannot be fetched."""
    if why_no_lpips():
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return LearnedPerceptualImagePatchSimilarity(net_type="vgg", normalize=True).to(device)
    except (OSError, RuntimeError) as error:  # the weights are fetched at first use
        warnings.warn(f"LPIPS is left out: its weights cannot be fetched: {error}", stacklevel=2)
        return None


def lpips(images: Tensor, truth: Tensor) -> float | None:
    """Mean LPIPS over a scene's views; None where it cannot be computed. [V, 3, H, W] twice, in [0, 1]."""
    network = lpips_network(str(images.device))
    return None if network is None else float(network(images, truth))
