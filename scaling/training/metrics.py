"""Image metrics: per view, images in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """10 log10(1 / MSE) of each image, capped at 100 dB. [B, 3, H, W] twice → [B]."""
    mse = (images - truth).square().flatten(1).mean(1)
    return -10 * torch.log10(mse.clamp(min=1e-10))


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Gaussian window 11, σ 1.5) of each image. [B, 3, H, W] twice → [B]."""
    values = structural_similarity_index_measure(images, truth, data_range=1.0, reduction="none")
    return values if isinstance(values, Tensor) else values[0]


def view_metrics(images: Tensor, truth: Tensor) -> dict[str, float]:
    """Mean PSNR and SSIM over a scene's views."""
    return {"psnr": psnr(images, truth).mean().item(), "ssim": ssim(images, truth).mean().item()}
