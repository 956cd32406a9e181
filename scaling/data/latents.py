"""Latents of a scene as bytes. float16 rounds numbers in [−1, 1] by at most 2.5e-4, and halves the bytes of float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

REMEDY = (
    "remove this shared model's folder in STORE/latents; stage 2 then encodes, or experiments/prepare.py --latents "
    "makes it again"
)


def pack_latents(latents: Tensor) -> bytes:
    """[V, C, h, w] in [−1, 1] → bytes, little-endian. ValueError where numbers are not finite."""
    if not torch.isfinite(latents).all():
        raise ValueError("the encoder gives numbers that are not finite")
    return latents.cpu().numpy().astype("<f2").tobytes()


def unpack_latents(data: bytes, shape: Sequence[int] | None, num_views: int) -> Tensor:
    """Bytes of unknown origin → float16 [V, C, h, w] in [−1, 1].

    ValueError where the shape is not that of num_views views, the bytes are not as many as it needs, or a number is out
    of range.
    """
    sizes = tuple(shape or ())
    if len(sizes) != 4 or min(sizes) < 1 or sizes[0] != num_views:
        raise ValueError(f"they have the shape {list(sizes)!s:.80}, the scene has {num_views} views")
    needed = 2 * math.prod(sizes)  # of Python's whole numbers: exact
    if len(data) != needed:
        raise ValueError(f"they have {len(data)} bytes, the shape {list(sizes)} needs {needed}")
    numbers = np.frombuffer(data, dtype="<f2")
    if not (np.abs(numbers) <= 1).all():
        raise ValueError("they hold numbers that are not in [-1, 1]")
    return torch.from_numpy(numbers.astype(np.float16)).reshape(sizes)
