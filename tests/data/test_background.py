"""The background's colour, as the borders of images show it."""

from __future__ import annotations

import numpy as np
import pytest

from scaling.data.background import border_colour

VIEWS = 3


def images(colour: int, size: int = 8) -> np.ndarray:
    return np.full((VIEWS, size, size, 3), colour, np.uint8)


@pytest.mark.parametrize("colour", [0, 231, 255])
def test_a_border_of_one_colour_is_the_background(colour):
    views = images(colour)
    views[:, 2:6, 2:6] = 90
    views[:, 0, 0] += 1 if colour < 255 else 0  # noise of a compressed file
    assert border_colour(views) == (colour,) * 3


def test_white_counts_where_the_object_reaches_nearly_all_of_the_border():
    views = images(90)
    views[:, 0, :2] = 255
    views[:, :, 7] = np.arange(8)[:, None] * 20  # so that no colour of the object has a quarter of the border
    views[:, 7] = np.arange(8)[:, None] * 17 + 3
    views[:, :, 0] = np.arange(8)[:, None] * 11 + 5
    views[:, 0, 2:] = np.arange(6)[:, None] * 7 + 1
    views[:, 0, :2] = 255
    assert border_colour(views) == (255, 255, 255)


def test_a_border_of_many_colours_is_none():
    views = np.random.default_rng(0).integers(0, 250, (VIEWS, 8, 8, 3)).astype(np.uint8)
    assert border_colour(views) is None
