"""Pack the latents of a scene into float16 bytes, and unpack them.

For numbers in [−1, 1], float16 rounds by at most 2.5e-4 and takes half the bytes of float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

REMEDY = (
    "remove this shared model's folder in STORE/latents; stage 2 then encodes, or experiments/prepare.py --latents "
    "makes it again"
)


def pack_latents(latents: Tensor) -> bytes:
    """Pack [V, C, h, w] in [−1, 1] → little-endian float16 bytes. Raises ValueError where a number is not finite."""
    numbers = latents.cpu().numpy()
    if not np.isfinite(numbers).all():
        raise ValueError("the encoder gives numbers that are not finite")
    return numbers.astype("<f2").tobytes()


def unpack_latents(data: bytes, shape: Sequence[int] | None, num_views: int) -> Tensor:
    """Unpack bytes of unknown origin → float16 [V, C, h, w] in [−1, 1].

    Raises ValueError where the shape is missing or is not that of num_views views, where the number of bytes does not
    fit the shape, or where a number is NaN or out of range.
    """
    sizes = tuple(shape or ())
    if len(sizes) != 4 or min(sizes) < 1 or sizes[0] != num_views:
        raise ValueError(f"they have the shape {list(sizes)!s:.80}, the scene has {num_views} views")
    needed = 2 * math.prod(sizes)  # Python's integers cannot overflow, however large the shape
    if len(data) != needed:
        raise ValueError(f"they have {len(data)} bytes, the shape {list(sizes)} needs {needed}")
    numbers = np.frombuffer(data, dtype="<f2")
    if not (np.abs(numbers) <= 1).all():
        raise ValueError("they hold numbers that are not in [-1, 1]")
    import torch  # here, as processes that only read rows do without it

    return torch.from_numpy(numbers.astype(np.float16)).reshape(sizes)
