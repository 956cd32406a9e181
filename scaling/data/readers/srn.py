"""The ShapeNet-SRN layout: ID/{rgb/*.png, pose/*.txt, intrinsics.txt}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.data.readers.scene_folders import holds_scenes, list_scene_folders
from scaling.data.readers.zip_paths import MAX_NUMBERS_BYTES, is_folder, list_folder, read_file
from scaling.data.scene_views import (
    SceneRef,
    check_pose,
    default_test_views,
    intrinsics_from_pixels,
    make_row,
    read_pngs,
)

NAME = "srn"
LOOKED_FOR = "ID/rgb/*.png, ID/pose/*.txt and ID/intrinsics.txt, or CATEGORY/ID/…"


def fits(source: Path) -> bool:
    """Whether the source holds scenes of this layout, directly or in folders or zip files."""
    return holds_scenes(source, _is_scene)


def list_scenes(source: Path) -> list[SceneRef]:
    """List all scenes of the source, sorted by id."""
    return list_scene_folders(source, NAME, _is_scene)


def read_scene(ref: SceneRef) -> dict[str, Any]:
    """Read a scene → a row of the scene store.

    Raises SceneError naming the file that is missing, malformed or damaged.
    """
    folder = Path(ref.folder)
    images, poses = _files(ref, folder / "rgb", ".png"), _files(ref, folder / "pose", ".txt")
    for path in [*images.values(), *poses.values()]:
        if path.stem not in images or path.stem not in poses:
            partner = "image in rgb/" if path.stem in poses else "pose in pose/"
            raise ref.error(str(path), f"has no {partner} of the same name")
    pngs, size = read_pngs(ref, list(images.values()))
    cam2world = [_read_pose(ref, poses[name]) for name in images]
    intrinsics = np.repeat(_read_intrinsics(ref, folder / "intrinsics.txt", size)[None], len(pngs), axis=0)
    tests = default_test_views(len(pngs))
    return make_row(ref.scene_id, ref.category, pngs, cam2world, intrinsics, tests, size[1], size[0], ref.source)


def _is_scene(folder: Path) -> bool:
    return is_folder(folder / "rgb")


def _files(ref: SceneRef, folder: Path, suffix: str) -> dict[str, Path]:
    """Stem → path of everything in a folder that has the suffix, sorted.

    Subfolders with the suffix are included: reading one later reports that it is not a file. Raises SceneError where
    the folder cannot be listed.
    """
    try:
        folders, files = list_folder(folder)
    except ValueError as error:
        raise ref.error(str(folder), str(error)) from error
    return {path.stem: path for path in sorted([*folders, *files]) if path.suffix == suffix}


def _read_numbers(ref: SceneRef, path: Path) -> list[list[float]]:
    """Read the numbers of a text file, line by line, without empty lines. Raises SceneError naming the file."""
    try:
        data = read_file(path, MAX_NUMBERS_BYTES)
    except ValueError as error:
        raise ref.error(str(path), str(error)) from error
    try:
        return [[float(word) for word in line.split()] for line in data.decode("utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ref.error(str(path), f"expected numbers ({error})") from error


def _read_pose(ref: SceneRef, path: Path) -> NDArray[np.float64]:
    numbers = [number for line in _read_numbers(ref, path) for number in line]
    try:
        return check_pose(numbers)
    except ValueError as error:
        raise ref.error(str(path), str(error)) from error


def _read_intrinsics(ref: SceneRef, path: Path, image_size: tuple[int, int]) -> NDArray[np.float64]:
    """Read intrinsics.txt → normalised intrinsics [3, 3]. Raises SceneError naming the file.

    The first line is "f cx cy …" in pixels, the last line is "H W"; the lines between them are ignored.
    """
    lines = _read_numbers(ref, path)
    if len(lines) < 2 or len(lines[0]) < 3 or len(lines[-1]) != 2:
        raise ref.error(str(path), 'expected "f cx cy 0." in the first line and "H W" in the last one')
    focal, centre_x, centre_y = lines[0][:3]
    height, width = lines[-1]
    try:
        return intrinsics_from_pixels((focal, focal), (centre_x, centre_y), width, height, image_size)
    except ValueError as error:
        raise ref.error(str(path), str(error)) from error
