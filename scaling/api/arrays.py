"""A scene given as arrays: checks their shapes and ranges, then makes views of them by the scene store's own code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from scaling.data.png import encode_png
from scaling.data.scene_views import SceneViews, check_intrinsics, check_pose, make_row, views_from_row

FARTHEST_CENTRE = 4.0  # image sizes; a principal point beyond it must have been given in pixels


def views_from_arrays(
    images: ArrayLike | Tensor,
    cam2world: ArrayLike | Tensor,
    intrinsics: ArrayLike | Tensor,
    scene_id: str,
    test_views: Sequence[int],
    image_size: int,
) -> SceneViews:
    """Views of image_size × image_size pixels, as if the arrays had come through a scene store.

    images: uint8 [V, H, W, 3] (or 4: transparency is composited on white), or float [V, 3, H, W] in [0, 1], which are
    rounded to 8 bits; cam2world, intrinsics: as `cameras_from_arrays` takes them; test_views: may be empty.
    Raises ValueError naming the wrong argument, SceneError (a ValueError) where the arrays do not fit together.
    """
    pixels = _pixels(images)
    poses, normalised = cameras_from_arrays(cam2world, intrinsics)
    tests = tuple(int(view) for view in test_views)
    # A row of the store always has a test view. A fit without metrics has none and trains on all views.
    pngs = [encode_png(view) for view in pixels]
    height, width = pixels.shape[1:3]
    row = make_row(scene_id, "", pngs, poses, normalised, tests or (0,), height, width, source="")
    views = views_from_row(row, image_size)
    return views if tests else replace(views, test_views=())


def cameras_from_arrays(
    cam2world: ArrayLike | Tensor, intrinsics: ArrayLike | Tensor
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Checked cameras: cam2world [V, 4, 4] (OpenCV axes), intrinsics [3, 3] or [V, 3, 3], normalised by the image size.

    → [V, 4, 4], [V, 3, 3]. Raises ValueError naming the wrong argument, and the view.
    """
    poses, normalised = _array(cam2world, "cam2world"), _array(intrinsics, "intrinsics")
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or not len(poses):
        raise ValueError(f"cam2world must be [V, 4, 4], one camera-to-world matrix a view, got {list(poses.shape)}")
    if normalised.shape not in ((3, 3), (len(poses), 3, 3)):
        expected = f"[3, 3], or [{len(poses)}, 3, 3] for the {len(poses)} views of cam2world"
        raise ValueError(f"intrinsics must be {expected}, got {list(normalised.shape)}")
    normalised = np.broadcast_to(normalised, (len(poses), 3, 3))
    for view in range(len(poses)):
        try:
            check_pose(poses[view])
            centre = check_intrinsics(normalised[view])[:2, 2]
        except ValueError as error:
            raise ValueError(f"cam2world and intrinsics, view {view}: {error}") from error
        if np.abs(centre).max() > FARTHEST_CENTRE:
            raise ValueError(
                f"intrinsics, view {view}: the principal point {centre[0]:g}, {centre[1]:g} looks like pixels: "
                "divide the first row by the image's width and the second by its height"
            )
    return poses.astype(np.float32), normalised.astype(np.float32)


def _pixels(images: ArrayLike | Tensor) -> NDArray[np.uint8]:
    """Images of at least two views as [V, H, W, 3 or 4]. Raises ValueError for other shapes, types or ranges."""
    array = _array(images, "images")
    of_numbers = array.dtype.kind == "f" and array.ndim == 4 and array.shape[1] == 3
    of_pixels = array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] in (3, 4)
    if not (of_numbers or of_pixels) or not array.size:
        raise ValueError(
            "images must be uint8 [V, H, W, 3] (or 4, with transparency), or float [V, 3, H, W] in [0, 1], "
            f"got {array.dtype} {list(array.shape)}"
        )
    if len(array) < 2:
        raise ValueError("images has 1 view: a scene needs at least 2, seen from different sides")
    if of_pixels:
        return array
    if not ((array >= 0) & (array <= 1)).all():  # NaN fails this, too
        raise ValueError(f"images of floats must lie in [0, 1], these go from {array.min():g} to {array.max():g}")
    return (array.astype(np.float64) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)


def _array(values: ArrayLike | Tensor, name: str) -> NDArray:
    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from error
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be an array of numbers, got {array.dtype}")
    return array
