"""Images of any size → square ones of the size asked for, and intrinsics that follow.

Coordinates run from 0 at the outer edge of the first pixel to 1 at that of the last, so a pixel's centre stays where it
is when a square image is resized: only padding changes normalised intrinsics.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def pad_to_square(image: NDArray[np.uint8], value: int = 255) -> NDArray[np.uint8]:
    """[C, H, W] → [C, S, S], S = max(H, W): `value` on both sides of the shorter one; by default white, the
    background's colour."""
    height, width = image.shape[-2:]
    left, top = _margins(width, height)
    right, bottom = max(height - width, 0) - left, max(width - height, 0) - top
    return np.pad(image, ((0, 0), (top, bottom), (left, right)), constant_values=value)


def pad_intrinsics(intrinsics: Tensor, width: int, height: int) -> Tensor:
    """Intrinsics [..., 3, 3] normalised by width and height → normalised by the padded square's side."""
    left, top = _margins(width, height)
    side = max(width, height)
    pad = [[width / side, 0.0, left / side], [0.0, height / side, top / side], [0.0, 0.0, 1.0]]
    return intrinsics.new_tensor(pad) @ intrinsics


def resize_square(image: Tensor, size: int) -> Tensor:
    """[C, S, S] floats → [C, size, size]: made smaller by averaging areas, made larger bilinearly."""
    side = image.shape[-1]
    if size > side:
        return torch.nn.functional.interpolate(image[None], size=(size, size), mode="bilinear", align_corners=False)[0]
    if size < side:
        weights = _area_weights(side, size).to(image)
        return weights @ image @ weights.T
    return image


def _margins(width: int, height: int) -> tuple[int, int]:
    """White pixels left of and above the image in its square; right of and below it is the rest."""
    side = max(width, height)
    return (side - width) // 2, (side - height) // 2


def _area_weights(side: int, size: int) -> Tensor:
    """[size, side]: which share of each output pixel every input pixel covers. Rows sum to 1.

    PyTorch's "area" mode takes whole input pixels; where side is no multiple of size, that moves the picture by up to
    half of one.
    """
    edges = torch.arange(size + 1, dtype=torch.float64) * (side / size)
    first, last = edges[:-1, None], edges[1:, None]
    pixels = torch.arange(side, dtype=torch.float64)
    return (torch.minimum(last, pixels + 1) - torch.maximum(first, pixels)).clamp(min=0) * (size / side)
