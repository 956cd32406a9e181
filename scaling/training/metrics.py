"""Image metrics: per view, images in [0, 1]."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """10 log10(1 / MSE) of each image, capped at 100 dB. [B, 3, H, W] twice → [B]."""
    mse = (images - truth).square().flatten(1).mean(1)
    return -10 * torch.log10(mse.clamp(min=1e-10))


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Gaussian window 11, σ 1.5) of each image. [B, 3, H, W] twice → [B]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(images, truth, data_range=1.0, reduction="none")
    return values if isinstance(values, Tensor) else values[0]


def view_metrics(images: Tensor, truth: Tensor) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM over a scene's views. [V, 3, H, W] twice, in [0, 1]."""
    return {"psnr": psnr(images, truth).mean().item(), "ssim": ssim(images, truth).mean().item()}


def why_no_lpips() -> str:
    """Why LPIPS cannot be computed here; empty where it can be tried."""
    missing = [name for name in ("torchvision",) if importlib.util.find_spec(name) is None]
    return f"{missing[0]} is not installed (pip install 'scaling[lpips]')" if missing else ""


@functools.cache
def lpips_network(device: str) -> torch.nn.Module | None:
    """LPIPS (VGG) on images in [0, 1], or None where torchvision or its weights cannot be had."""
    if why_no_lpips():
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return LearnedPerceptualImagePatchSimilarity(net_type="vgg", normalize=True).to(device)
    except (OSError, RuntimeError) as error:  # its weights are fetched at first use
        warnings.warn(f"LPIPS is left out: its weights cannot be had: {error}", stacklevel=2)
        return None


def lpips(images: Tensor, truth: Tensor) -> float | None:
    """Mean LPIPS over a scene's views, or None where it cannot be computed. [B, 3, H, W] twice."""
    network = lpips_network(str(images.device))
    return None if network is None else float(network(images, truth))
