"""The paper's released layout: dataset_map.json (category → ordered ids), square128_above/ID/transforms_opencv.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.data.scenes import (
    SceneRef,
    check_pose,
    check_scene_id,
    default_test_views,
    intrinsics_from_pixels,
    make_row,
    read_pngs,
)

LAYOUT = "transforms"
MAP_FILE = "dataset_map.json"
SCENES_FOLDER = "square128_above"
TRANSFORMS_FILE = "transforms_opencv.json"


def fits(source: Path) -> bool:
    """Whether source holds scenes of this layout."""
    return (source / MAP_FILE).is_file() and (source / SCENES_FOLDER).is_dir()


def list_scenes(source: Path) -> list[SceneRef]:
    """The scenes of dataset_map.json in its order. ValueError where it is no map from categories to lists of ids."""
    path = source / MAP_FILE
    categories = _load_json(path)
    if not isinstance(categories, dict) or not all(
        isinstance(ids, list) and all(isinstance(scene_id, str) for scene_id in ids) for ids in categories.values()
    ):
        raise ValueError(f"{path}: expected an object of categories, each with a list of scene ids (strings)")
    return [_ref(source, category, scene_id) for category, ids in categories.items() for scene_id in ids]


def read_scene(ref: SceneRef) -> dict[str, Any]:
    """A row of the scene store. SceneError names the file and the key that is missing, malformed or damaged."""
    try:
        check_scene_id(ref.scene_id)
    except ValueError as error:
        raise ref.error(MAP_FILE, str(error)) from error
    folder = Path(ref.folder)
    path = folder / TRANSFORMS_FILE
    try:
        transforms = _load_json(path)
    except ValueError as error:
        raise ref.error(str(path), str(error).removeprefix(f"{path}: ")) from error
    frames = transforms.get("frames") if isinstance(transforms, dict) else None
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        raise ref.error(str(path), 'key "frames" must be a list of objects')
    try:
        images = [_image_path(folder, frame, index) for index, frame in enumerate(frames)]
    except ValueError as error:
        raise ref.error(str(path), str(error)) from error
    pngs, size = read_pngs(ref, images)
    try:
        poses = [_pose(frame, index) for index, frame in enumerate(frames)]
        # A frame's own intrinsics win over those of the file.
        intrinsics = [_intrinsics({**transforms, **frame}, index, size) for index, frame in enumerate(frames)]
    except ValueError as error:
        raise ref.error(str(path), str(error)) from error
    tests = default_test_views(len(pngs))
    return make_row(ref.scene_id, ref.category, pngs, poses, intrinsics, tests, size[1], size[0], ref.source)


def _ref(source: Path, category: str, scene_id: str) -> SceneRef:
    """A reference; an id that is no safe name gets no folder, and reading it says so."""
    try:
        folder = source / SCENES_FOLDER / check_scene_id(scene_id)
    except ValueError:
        return SceneRef(scene_id, category, "", LAYOUT, MAP_FILE)
    return SceneRef(scene_id, category, str(folder), LAYOUT, folder.relative_to(source).as_posix())


def _load_json(path: Path) -> Any:
    """ValueError naming the file where it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def _image_path(folder: Path, frame: Mapping[str, Any], index: int) -> Path:
    name = frame.get("file_path")
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f'frames[{index}]: key "file_path" must be the name of a file')
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f'frames[{index}]: "file_path" {name!r:.200} leads out of the scene\'s folder')
    return path


def _pose(frame: Mapping[str, Any], index: int) -> NDArray[np.float64]:
    if "transform_matrix" not in frame:
        raise ValueError(f'frames[{index}]: key "transform_matrix" is missing')
    try:
        return check_pose(frame["transform_matrix"])
    except ValueError as error:
        raise ValueError(f'frames[{index}]: "transform_matrix": {error}') from error


def _intrinsics(values: Mapping[str, Any], index: int, image_size: tuple[int, int]) -> NDArray[np.float64]:
    keys = ("fl_x", "fl_y", "cx", "cy", "w", "h")
    for key in keys:
        if isinstance(values.get(key), bool) or not isinstance(values.get(key), int | float):
            raise ValueError(f'frames[{index}]: key "{key}" is missing or no number')
    try:
        focal_x, focal_y, centre_x, centre_y, width, height = (float(values[key]) for key in keys)
        return intrinsics_from_pixels((focal_x, focal_y), (centre_x, centre_y), width, height, image_size)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"frames[{index}]: {error}") from error
