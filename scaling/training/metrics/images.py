"""Image metrics, per view; images in [0, 1]."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from scaling.training.metrics.flip import flip

VIEW_METRICS = ("psnr", "ssim", "ms_ssim", "flip")  # for flip the lowest is best, for the others the highest
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the five scales, as published (Wang et al., 2003)
SCALE_SIDES = (0, 22, 44, 99, 176)  # least pixels a side for which torchmetrics' window of 11 fits into 1, 2, … scales


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image: 10 log10(1 / MSE), capped at 100 dB. [B, 3, H, W] twice → [B].

    >>> psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.1))  # MSE 0.1² = 10⁻²
    tensor([20.])
    """
    mse = (images - truth).square().flatten(1).mean(1)
    return -10 * torch.log10(mse.clamp(min=1e-10))


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Gaussian window 11, σ 1.5) of each image. [B, 3, H, W] twice → [B]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(images, truth, data_range=1.0, reduction="none")
    return values if isinstance(values, Tensor) else values[0]


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
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    weights = scale_weights(min(images.shape[-2:]))
    if len(weights) == 1:
        return ssim(images, truth).clamp(min=0)
    # Without relu, a power of a negative contrast would be NaN.
    return multiscale_structural_similarity_index_measure(
        images, truth, data_range=1.0, betas=weights, normalize="relu", reduction="none"
    )


def scale_weights(side: int) -> tuple[float, ...]:
    """Weights of MS-SSIM's scales for images of `side` pixels a side; they sum to 1."""
    weights = SCALE_WEIGHTS[: sum(side >= least for least in SCALE_SIDES)]
    return tuple(weight / sum(weights) for weight in weights)


def view_metrics(images: Tensor, truth: Tensor) -> dict[str, float]:
    """VIEW_METRICS, each the mean over a scene's views: PSNR in dB, SSIM, MS-SSIM and FLIP.

    [V, 3, H, W] twice, in [0, 1].
    """
    measures = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim, "flip": flip}
    return {name: measure(images, truth).mean().item() for name, measure in measures.items()}


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
