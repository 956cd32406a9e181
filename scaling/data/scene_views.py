"""A scene: posed views of one object, as a row of the scene store and as tensors, and the checks of its input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from scaling.data.background import WHITE, border_colour
from scaling.data.latents import REMEDY, unpack_latents
from scaling.data.png import decode_layers, on_white, png_size, read_image, with_mask
from scaling.data.resize import pad_intrinsics, pad_to_square, resize_square
from scaling.data.scene_id import check_scene_id
from scaling.data.scene_ref import SceneError, SceneRef

_LARGEST_NUMBER = 1e9  # in a pose or in intrinsics: beyond it float32 has no useful precision, and products overflow
ROUNDED = 0.02  # how far R·Rᵀ of a rotation may be from the identity that is within 1 % of a right one
MAX_VIEWS = 10_000  # of a scene
ROUNDED_POSES = "rotations that are off by up to 1 % were made orthonormal (poses printed with few decimals?)"
MOST_REPEATED = 4  # views of one image, on average: a few bytes must not fill a store
MAX_SCENE_PIXELS = 1 << 31  # 2,000 views of 1024² pixels
MAX_SCENE_BYTES = 1 << 30  # of all views of a scene, as they are stored


@dataclass(frozen=True)
class SceneViews:
    """The views of one scene.

    images: [V, 3, H, W] float32 in [0, 1]; cam2world: [V, 4, 4], OpenCV axes; intrinsics: [V, 3, 3], normalised by the
    image size; test_views: indices of the views that are never trained on; latents: float16 [V, C, h, w] in [−1, 1],
    if they are cached for the shared model in use; alpha: [V, H, W] in [0, 1], if the source has transparent pixels.
    """

    scene_id: str
    category: str
    images: Tensor
    cam2world: Tensor
    intrinsics: Tensor
    test_views: tuple[int, ...]
    latents: Tensor | None = None
    alpha: Tensor | None = None

    @property
    def train_views(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(len(self.images))) - set(self.test_views)))


def default_test_views(num_views: int) -> tuple[int, ...]:
    """Indices of the first tenth of the views, at least one."""
    return tuple(range(max(1, num_views // 10)))


def check_pose(pose: ArrayLike) -> NDArray[np.float64]:
    """Check a camera-to-world matrix → [4, 4].

    Raises ValueError unless it is finite and rigid (to 1e-3) and does not mirror.
    """
    matrix = _numbers(pose, 4, "the pose")
    if np.abs(matrix[3] - [0, 0, 0, 1]).max() > 1e-3:
        raise ValueError(f"the pose's last row must be 0 0 0 1, got {_listed(matrix[3])}")
    rotation = matrix[:3, :3]
    error = np.abs(rotation @ rotation.T - np.eye(3)).max()
    if error > 1e-3:
        raise ValueError(f"the pose's rotation is not orthonormal (R·Rᵀ differs from the identity by {error:.3g})")
    if np.linalg.det(rotation) < 0:
        raise ValueError("the pose mirrors (determinant -1): its axes must be right-handed")
    return matrix


def near_pose(pose: ArrayLike) -> tuple[NDArray[np.float64], bool]:
    """Check a matrix of a source that maps between world and camera → [4, 4], and whether its rotation was made
    orthonormal: one that was printed with few decimals is off by up to ROUNDED. Raises ValueError as `check_pose`
    does."""
    matrix = _numbers(pose, 4, "the pose")
    rotation = matrix[:3, :3]
    error = np.abs(rotation @ rotation.T - np.eye(3)).max()
    rounded = bool(1e-6 < error <= ROUNDED)
    if rounded:
        left, _, right = np.linalg.svd(rotation)  # the nearest orthonormal matrix
        matrix = matrix.copy()
        matrix[:3, :3] = left @ right
    return check_pose(matrix), rounded and bool(error > 1e-3)


def check_intrinsics(intrinsics: ArrayLike) -> NDArray[np.float64]:
    """Check normalised intrinsics → [3, 3].

    Raises ValueError unless they are finite, have positive focal lengths, and are an upper triangular matrix whose last
    row is 0 0 1.
    """
    matrix = _numbers(intrinsics, 3, "the intrinsics")
    if matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
        raise ValueError(f"focal lengths must be positive, got {_listed(np.diag(matrix)[:2])}")
    if np.any(matrix[2] != [0, 0, 1]) or matrix[1, 0] != 0:
        raise ValueError("the intrinsics must be [[fx, skew, cx], [0, fy, cy], [0, 0, 1]]")
    return matrix


def intrinsics_from_pixels(
    focal: tuple[float, float], centre: tuple[float, float], width: float, height: float, image_size: tuple[int, int]
) -> NDArray[np.float64]:
    """Normalise intrinsics in pixels of a width × height image → [3, 3]. focal, centre: (x, y).

    image_size: (width, height) of the images that they are used on. Raises ValueError where the two aspect ratios
    differ by more than 1 %, or where `check_intrinsics` does.
    """
    if not (np.isfinite([width, height]).all() and width > 0 and height > 0):
        raise ValueError(f"image width and height must be positive, got {width:g} and {height:g}")
    if abs(width * image_size[1] - height * image_size[0]) > 0.01 * width * image_size[1]:
        raise ValueError(
            f"the intrinsics are for {width:g}x{height:g} pixels, "
            f"the images have {image_size[0]}x{image_size[1]}: another aspect ratio"
        )
    rows = [[focal[0] / width, 0.0, centre[0] / width], [0.0, focal[1] / height, centre[1] / height], [0.0, 0.0, 1.0]]
    return check_intrinsics(rows)


def read_pngs(
    ref: SceneRef, paths: Sequence[Path], masks: Sequence[Path | None] | None = None
) -> tuple[list[bytes], tuple[int, int]]:
    """Read the PNG bytes of a scene's views, and their common (width, height).

    masks: for each view an image that becomes its alpha, or None. Raises SceneError naming the first bad file, or the
    folder where the views are too few or too many.
    """
    if len(paths) < 2:
        raise ref.error(str(ref.folder), f"found {len(paths)} views, need at least 2: one to train on, one to test")
    if len(paths) > MAX_VIEWS:
        raise ref.error(str(ref.folder), f"found {len(paths)} views; at most {MAX_VIEWS} are read")
    if len(paths) > MOST_REPEATED * len(set(paths)):
        raise ref.error(str(ref.folder), f"its {len(paths)} views name {len(set(paths))} images")
    pngs: list[bytes] = []
    common, total = (0, 0), 0
    read: dict[tuple[Path, Path | None], tuple[bytes, tuple[int, int]]] = {}  # frames may share images and masks
    for path, mask in zip(paths, masks or [None] * len(paths), strict=True):
        ref.check_link(path)
        if mask is not None:
            ref.check_link(mask)
        named = (path, mask)
        try:
            if named not in read:
                data, size = read_image(path)
                if mask is not None:
                    path = mask  # for the error
                    data = with_mask(data, read_image(mask)[0])
                read[named] = data, size
            data, size = read[named]
        except ValueError as error:
            raise ref.error(str(path), str(error)) from error
        common = common if pngs else size
        if size != common:
            reason = f"has {size[0]}x{size[1]} pixels, the scene's first view has {common[0]}x{common[1]}"
            raise ref.error(str(path), reason)
        if size[0] * size[1] * len(paths) > MAX_SCENE_PIXELS:
            found = f"{len(paths)} views of {size[0]}x{size[1]} pixels"
            raise ref.error(str(ref.folder), f"{found}: at most {MAX_SCENE_PIXELS:,} pixels a scene are read")
        pngs.append(data)
        total += len(data)
        if total > MAX_SCENE_BYTES:
            reason = f"its views have more than {MAX_SCENE_BYTES:,} bytes: give them fewer pixels"
            raise ref.error(str(ref.folder), reason)
    return pngs, common


def make_row(
    scene_id: str,
    category: str,
    pngs: Sequence[bytes],
    cam2world: ArrayLike,
    intrinsics: ArrayLike,
    test_views: Sequence[int],
    height: int,
    width: int,
    source: str,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Make a row of the scene store.

    pngs: the bytes of V files; cam2world [V, 4, 4]; intrinsics [V, 3, 3], normalised; height, width: of the images;
    notes: what was taken otherwise than it stands in the source; not stored with the scene. Raises SceneError where
    these do not fit together or a camera is invalid.
    """
    row = {
        "scene_id": scene_id,
        "category": category,
        "views": list(pngs),
        "cam2world": np.asarray(cam2world, dtype=np.float32).ravel(),
        "intrinsics": np.asarray(intrinsics, dtype=np.float32).ravel(),
        "test_views": np.asarray(test_views, dtype=np.int32).ravel(),
        "height": int(height),
        "width": int(width),
        "source": source,
        "notes": list(notes),
    }
    _check_row(row)
    return row


def views_from_row(row: Mapping[str, Any], image_size: int) -> SceneViews:
    """Decode a row of the store → views of image_size × image_size pixels.

    Images are padded to squares, with the colour of their borders or white, and resized; intrinsics follow (see
    resize.py). Transparent images are composited on white; `alpha` keeps their transparency (0 in the padding), and is
    None where no image has any. Raises SceneError where the columns do not fit together, where images are damaged or
    not of the row's height and width, or where cached latents do not fit them.
    """
    _check_row(row)
    height, width = int(row["height"]), int(row["width"])
    images, alphas, padding = [], {}, WHITE
    for index, data in enumerate(row["views"]):  # one at a time: full-size views of a scene may be gigabytes
        try:
            if png_size(data) != (width, height):
                raise ValueError(f"the image is not {width}x{height} as the row says")
            layers = decode_layers(data)
        except ValueError as error:
            raise _row_error(row, f"views[{index}]", str(error)) from error
        opaque = on_white(layers)
        if index == 0 and height != width:
            padding = border_colour(opaque[None]) or WHITE
        images.append(_resized(opaque, padding, image_size))
        if layers.shape[2] == 4:
            alphas[index] = _resized(layers[..., 3:], (0,), image_size)[0]
    # Resizing keeps normalised intrinsics: only the padding changes them.
    intrinsics = torch.tensor(np.asarray(row["intrinsics"], dtype=np.float32)).reshape(-1, 3, 3)
    return SceneViews(
        scene_id=row["scene_id"],
        category=row["category"],
        images=torch.stack(images),
        cam2world=torch.tensor(np.asarray(row["cam2world"], dtype=np.float32)).reshape(-1, 4, 4),
        intrinsics=pad_intrinsics(intrinsics, width, height),
        test_views=tuple(int(view) for view in row["test_views"]),
        latents=_cached_latents(row),
        alpha=_alpha(alphas, len(images), height, width),
    )


def _alpha(known: Mapping[int, Tensor], num_views: int, height: int, width: int) -> Tensor | None:
    """Stack alpha → [V, image_size, image_size]. Views that are not in `known` are opaque, except in their padding."""
    if not known:
        return None
    opaque = _resized(np.full((height, width, 1), 255, np.uint8), (0,), len(next(iter(known.values()))))[0]
    return torch.stack([known.get(view, opaque) for view in range(num_views)])


def _resized(pixels: NDArray[np.uint8], padding: tuple[int, ...], image_size: int) -> Tensor:
    """Pad pixels [H, W, C] with a colour, and resize them → [C, image_size, image_size] in [0, 1]."""
    # NumPy divides: torch would wake all its threads for each view, which takes ten times longer where cores are busy.
    image = np.divide(pad_to_square(pixels.transpose(2, 0, 1), padding), 255, dtype=np.float32, order="C")
    return resize_square(torch.from_numpy(image), image_size)


def _cached_latents(row: Mapping[str, Any]) -> Tensor | None:
    if row.get("latents") is None:
        return None
    try:
        return unpack_latents(row["latents"], row["latent_shape"], len(row["views"]))
    except ValueError as error:
        raise _row_error(row, "cached latents", f"{error}; {REMEDY}") from error


def _check_row(row: Mapping[str, Any]) -> None:
    """Raise SceneError unless the columns of a row fit together, and its id, test views and cameras are valid."""
    num_views, num_poses, num_intrinsics = len(row["views"]), len(row["cam2world"]) / 16, len(row["intrinsics"]) / 9
    if not num_views == num_poses == num_intrinsics or num_views == 0:
        reason = f"{num_views} views, {num_poses:g} poses and {num_intrinsics:g} intrinsics: need equally many"
        raise _row_error(row, "", reason)
    if num_views > MAX_VIEWS:
        raise _row_error(row, "views", f"{num_views} of them; at most {MAX_VIEWS} are read")
    tests = [int(view) for view in row["test_views"]]
    if not tests or len(set(tests)) < len(tests) or min(tests) < 0 or max(tests) >= num_views:
        raise _row_error(row, "test_views", f"{tests!s:.200} must be different view numbers from 0 to {num_views - 1}")
    if len(tests) == num_views:
        raise _row_error(row, "test_views", f"all {num_views} views are test views: none is left to train on")
    try:
        check_scene_id(row["scene_id"])
    except ValueError as error:
        raise _row_error(row, "scene_id", str(error)) from error
    poses = np.asarray(row["cam2world"], dtype=np.float64).reshape(-1, 4, 4)
    intrinsics = np.asarray(row["intrinsics"], dtype=np.float64).reshape(-1, 3, 3)
    for view in range(num_views):
        try:
            check_pose(poses[view])
            check_intrinsics(intrinsics[view])
        except ValueError as error:
            raise _row_error(row, f"view {view}", str(error)) from error


def _row_error(row: Mapping[str, Any], file: str, reason: str) -> SceneError:
    return SceneError(str(row["scene_id"]), file, reason, str(row["source"]))


def _numbers(values: ArrayLike, side: int, what: str) -> NDArray[np.float64]:
    """Convert nested lists or a flat list → finite numbers [side, side]. Raises ValueError naming `what`."""
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{what} must be {side}x{side} numbers ({error})") from error
    if numbers.size != side * side:
        raise ValueError(f"{what} must be {side}x{side} numbers, got {numbers.size}")
    if not (np.abs(numbers) < _LARGEST_NUMBER).all():
        raise ValueError(f"{what} must be finite numbers below {_LARGEST_NUMBER:g}")
    return numbers.reshape(side, side)


def _listed(values: NDArray[np.float64]) -> str:
    return " ".join(f"{value:g}" for value in values)
