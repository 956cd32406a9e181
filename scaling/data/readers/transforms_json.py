"""Read a transforms JSON file of Blender scenes, nerfstudio or the paper's release: frames, poses and cameras."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.data.readers.conventions import Convention, as_read
from scaling.data.readers.zip_paths import MAX_JSON_BYTES, MAX_NAME_LENGTH, MAX_NAME_PARTS, is_file, read_file
from scaling.data.scene_ref import SceneRef
from scaling.data.scene_views import MAX_VIEWS, ROUNDED_POSES, intrinsics_from_pixels, make_row, near_pose, read_pngs
from scaling.storage.json_yaml import parse_json

_PINHOLES = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE")
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".exr", ".tif", ".tiff", ".bmp")  # any other suffix is part of the name
# Keys of instant-ngp that place a scene in its own unit cube; here the cameras say where it is.
_IGNORED = ("scale", "offset", "aabb_scale", "aabb", "n_extra_learnable_dims")
_DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
_CAMERA = (
    "camera_model", "is_fisheye", "w", "h", "fl_x", "fl_y", "cx", "cy", "camera_angle_x", *_DISTORTION, *_IGNORED,
)  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """One view.

    file: the JSON file; name: its place in the file, "frames[3]"; image: the image file; cam2world: [4, 4], OpenCV
    axes; camera: the camera's keys, where the frame's own override those of the file; mask: the image file that says
    what of the view is seen; rounded: whether the pose was printed with few decimals.
    """

    file: Path
    name: str
    image: Path
    cam2world: NDArray[np.float64]
    camera: Mapping[str, Any]
    mask: Path | None = None
    rounded: bool = False


def load_json(path: Path) -> Any:
    """Read a JSON file. NaN is accepted: the check of each number later names the key that holds it.

    Raises ValueError where the file cannot be read or is not JSON.
    """
    return parse_json(read_file(path, MAX_JSON_BYTES), constant=float)


def read_frames(ref: SceneRef, path: Path, convention: Convention) -> tuple[dict[str, Any], list[Frame]]:
    """Read a transforms file → its keys other than "frames", and its frames.

    convention: of its poses, where `ref` names no other. Images are not opened. Raises SceneError naming the
    file and the key that is missing or wrong.
    """
    ref.check_link(path)
    convention = convention.overridden(ref.poses, ref.axes)
    try:
        transforms = load_json(path)
        frames = transforms.pop("frames", None) if isinstance(transforms, dict) else None
        if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
            raise ValueError('key "frames" must be a list of objects, and not empty')
        if len(frames) > MAX_VIEWS:
            raise ValueError(f'key "frames" has {len(frames)} entries; at most {MAX_VIEWS} are read')
        return transforms, [
            _frame(path, transforms, frame, f"frames[{index}]", convention) for index, frame in enumerate(frames)
        ]
    except ValueError as error:
        raise ref.error(str(path), str(error)) from error


def image_path(folder: Path, name: Any, key: str = "file_path") -> Path:
    """The image file that a frame's key names. Without an image suffix, as in Blender scenes, it is a PNG.

    Raises ValueError where the key is not a name or leads out of the scene's folder.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f'key "{key}" must be the name of a file')
    if len(name) > MAX_NAME_LENGTH or name.count("/") > MAX_NAME_PARTS:
        raise ValueError(f'"{key}" {name!r:.80}… is too long or too deep')
    path = Path(os.path.normpath(folder / (name if PurePosixPath(name).suffix.lower() in _IMAGES else f"{name}.png")))
    os.fsencode(path)  # raises UnicodeEncodeError, a ValueError, for a name that no file can have
    if not path.is_relative_to(folder):
        raise ValueError(f'"{key}" {name!r:.200} leads out of the scene\'s folder')
    return path


def row_from_frames(
    ref: SceneRef, frames: Sequence[Frame], test_views: Sequence[int], convention: Convention
) -> dict[str, Any]:
    """Read the images → a row of the scene store, with its views in the order of the frames.

    convention: of the frames' poses, where `ref` names no other.

    Raises SceneError naming the bad image or frame.
    """
    masks = [frame.mask for frame in frames]
    no_masks = any(masks) and not any(is_file(mask) for mask in masks if mask)
    pngs, size = read_pngs(ref, [frame.image for frame in frames], None if no_masks else masks)
    intrinsics = []
    for frame in frames:
        try:
            intrinsics.append(camera_intrinsics(frame.camera, size))
        except ValueError as error:
            raise ref.error(str(frame.file), f"{frame.name}: {error}") from error
    poses = [frame.cam2world for frame in frames]
    notes = [ROUNDED_POSES] * any(frame.rounded for frame in frames)
    notes += ['key "mask_path" is ignored, as none of its files is there'] * no_masks
    notes += [f'key "{key}" is ignored' for key in _IGNORED if any(key in frame.camera for frame in frames)]
    row = make_row(ref.scene_id, ref.category, pngs, poses, intrinsics, test_views, size[1], size[0], ref.source, notes)
    return {**row, "split": ref.split, "convention": convention.overridden(ref.poses, ref.axes)}


def camera_intrinsics(camera: Mapping[str, Any], image_size: tuple[int, int]) -> NDArray[np.float64]:
    """Normalised intrinsics [3, 3] of a pinhole camera. image_size: (width, height) of its image.

    Needs fl_x (pixels) or camera_angle_x (horizontal field of view in radians). Defaults: square pixels for fl_y, the
    middle for cx and cy, the image's size for w and h. Raises ValueError where a value is missing or not a number, the
    lens distorts, the camera is not a pinhole, or w and h have another aspect ratio than the image.
    """
    model = camera.get("camera_model", "PINHOLE")
    if model not in _PINHOLES or camera.get("is_fisheye"):
        name = "is_fisheye" if camera.get("is_fisheye") else f"{model!r:.60}"
        raise ValueError(f"the camera is no pinhole ({name}): undistort the images first")
    for key in _DISTORTION:
        if _number(camera, key, 0.0) != 0:
            raise ValueError(f"the lens distorts ({key} = {camera[key]:g}): undistort the images first")
    width, height = _number(camera, "w", image_size[0]), _number(camera, "h", image_size[1])
    focal_x = _number(camera, "fl_x", None) if "fl_x" in camera else _focal_of_angle(camera, width)
    focal = focal_x, _number(camera, "fl_y", focal_x)
    centre = _number(camera, "cx", width / 2), _number(camera, "cy", height / 2)
    return intrinsics_from_pixels(focal, centre, width, height, image_size)


def _frame(path: Path, shared: Mapping[str, Any], frame: Mapping[str, Any], name: str, convention: Convention) -> Frame:
    """Check a frame. Its own keys override those of the file; its own angle overrides the file's focal lengths, too.

    Raises ValueError naming the frame and the key.
    """
    try:
        image = image_path(path.parent, frame.get("file_path"))
        mask = image_path(path.parent, frame["mask_path"], "mask_path") if "mask_path" in frame else None
        if "transform_matrix" not in frame:
            raise ValueError('key "transform_matrix" is missing')
        try:
            pose, rounded = near_pose(frame["transform_matrix"])
        except ValueError as error:
            raise ValueError(f'"transform_matrix": {error}') from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    hidden = ("fl_x", "fl_y") if "camera_angle_x" in frame else ()
    # Only what says something of a camera: other keys of the file would be there once for each frame.
    every = {key: shared[key] for key in _CAMERA if key in shared and key not in hidden}
    camera = {**every, **{key: frame[key] for key in _CAMERA if key in frame}}
    return Frame(path, name, image, as_read(pose, convention), camera, mask, rounded)


def _focal_of_angle(camera: Mapping[str, Any], width: float) -> float:
    if "camera_angle_x" not in camera:
        raise ValueError('key "fl_x" (pixels) or "camera_angle_x" (radians) is missing')
    angle = _number(camera, "camera_angle_x", None)
    half_width = math.tan(angle / 2) if 0 < angle < math.pi else 0.0  # at distance 1
    if half_width <= 0:
        raise ValueError(f'"camera_angle_x" must be between 0 and π (radians), got {angle:g}')
    return width / 2 / half_width


def _number(values: Mapping[str, Any], key: str, default: float | None) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f'key "{key}" must be a number')
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f'key "{key}": {error}') from error
