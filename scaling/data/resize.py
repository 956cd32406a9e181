"""Pad images to squares, resize them, and adapt their intrinsics.

Normalised coordinates run from 0 at the outer edge of the first pixel to 1 at the outer edge of the last pixel. So a
point keeps its coordinates when a square image is resized: only padding changes normalised intrinsics.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def pad_to_square(image: NDArray[np.uint8], colour: tuple[int, ...]) -> NDArray[np.uint8]:
    """Pad [C, H, W] → [C, S, S], S = max(H, W), with a colour [C] at both ends of the shorter axis."""
    height, width = image.shape[-2:]
    left, top = _margins(width, height)
    right, bottom = max(height - width, 0) - left, max(width - height, 0) - top
    around = (top, bottom), (left, right)
    return np.stack([np.pad(channel, around, constant_values=value) for channel, value in zip(image, colour)])


def pad_intrinsics(intrinsics: Tensor, width: int, height: int) -> Tensor:
    """Convert intrinsics [..., 3, 3] normalised by width and height → normalised by the side of the padded square."""
    left, top = _margins(width, height)
    side = max(width, height)
    pad = [[width / side, 0.0, left / side], [0.0, height / side, top / side], [0.0, 0.0, 1.0]]
    return intrinsics.new_tensor(pad) @ intrinsics


def resize_square(image: Tensor, size: int) -> Tensor:
    """Resize [C, S, S] floats → [C, size, size]: shrink by averaging areas, enlarge bilinearly."""
    side = image.shape[-1]
    if size > side:
        return torch.nn.functional.interpolate(image[None], size=(size, size), mode="bilinear", align_corners=False)[0]
    if size < side:
        weights = _area_weights(side, size).to(image)
        return weights @ image @ weights.T
    return image


def _margins(width: int, height: int) -> tuple[int, int]:
    """Padding to the left of the image and above it, in pixels; the rest of the padding is right of it and below it."""
    side = max(width, height)
    return (side - width) // 2, (side - height) // 2


def _area_weights(side: int, size: int) -> Tensor:
    """Weights [size, side]: the share of each output pixel that each input pixel covers. Rows sum to 1.

    PyTorch's "area" mode averages whole input pixels; where side is not a multiple of size, it shifts the picture by up
    to half an input pixel.
    """
    edges = torch.arange(size + 1, dtype=torch.float64) * (side / size)
    first, last = edges[:-1, None], edges[1:, None]
    pixels = torch.arange(side, dtype=torch.float64)
    return (torch.minimum(last, pixels + 1) - torch.maximum(first, pixels)).clamp(min=0) * (size / side)
