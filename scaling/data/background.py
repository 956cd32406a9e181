"""The background's colour: what most pixels at the images' borders show."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 1  # of 255, in each channel: how far background may be from its colour in files that were compressed
LEAST_SHARE = 0.25  # of the border's pixels, that have the background's colour
WHITE = (255, 255, 255)


def border_colour(images: NDArray[np.uint8]) -> tuple[int, int, int] | None:
    """The one colour of a scene's background, of views [V, H, W, 3]: see `most_frequent`, of their borders.

    >>> border_colour(np.full((1, 4, 4, 3), 231, np.uint8))
    (231, 231, 231)
    """
    sides = images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]
    return most_frequent(np.concatenate([side.reshape(-1, 3) for side in sides]))


def most_frequent(pixels: NDArray[np.uint8]) -> tuple[int, int, int] | None:
    """The colour that most pixels [N, 3] of the views' borders have, if LEAST_SHARE of them have it; else None.

    White counts in any case: an object may reach the border nearly everywhere.
    """
    border = pixels.astype(np.int32)
    numbers, counts = np.unique(border @ np.array([1 << 16, 1 << 8, 1]), return_counts=True)
    most = int(numbers[counts.argmax()])
    colour = most >> 16, most >> 8 & 255, most & 255
    white = _share(border, WHITE)
    if white >= _share(border, colour):
        return WHITE
    if _share(border, colour) >= LEAST_SHARE:
        return colour
    return WHITE if white else None


def _share(border: NDArray[np.int32], colour: tuple[int, int, int]) -> float:
    return float((np.abs(border - colour).max(1) <= TOLERANCE).mean())
