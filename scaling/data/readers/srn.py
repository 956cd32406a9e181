"""The ShapeNet-SRN layout: ID/{rgb/*.png (or .jpg), pose/*.txt, intrinsics.txt}."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaling.data.readers.conventions import Convention, as_read
from scaling.data.readers.scene_folders import holds_scenes, list_scene_folders
from scaling.data.readers.zip_paths import MAX_NUMBERS_BYTES, is_folder, list_folder, read_file
from scaling.data.scene_ref import SceneRef
from scaling.data.scene_views import (
    ROUNDED_POSES,
    default_test_views,
    intrinsics_from_pixels,
    make_row,
    near_pose,
    read_pngs,
)

IMAGES = (".png", ".jpg", ".jpeg")
NAME = "srn"
CONVENTION = Convention("cam2world", "opencv")
LOOKED_FOR = "ID/rgb/*.png (or .jpg), ID/pose/*.txt and ID/intrinsics.txt, or CATEGORY/ID/…"


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
    images, poses = _files(ref, folder / "rgb", IMAGES), _files(ref, folder / "pose", (".txt",))
    for path in [*images.values(), *poses.values()]:
        if path.stem not in images or path.stem not in poses:
            partner = "image in rgb/" if path.stem in poses else "pose in pose/"
            raise ref.error(str(path), f"has no {partner} of the same name")
    pngs, size = read_pngs(ref, list(images.values()))
    one, world2cam = _read_intrinsics(ref, folder / "intrinsics.txt", size)
    own = Convention("world2cam", "opencv") if world2cam else CONVENTION
    convention = own.overridden(ref.poses, ref.axes)
    cam2world, rounded = zip(*(_read_pose(ref, poses[name], convention) for name in images))
    notes = [ROUNDED_POSES] * any(rounded)
    if convention.poses == "world2cam" and not ref.poses:
        notes.append("poses are inverted, as intrinsics.txt ends with 1")
    intrinsics = np.repeat(one[None], len(pngs), axis=0)
    tests = default_test_views(len(pngs))
    row = make_row(ref.scene_id, ref.category, pngs, cam2world, intrinsics, tests, size[1], size[0], ref.source, notes)
    return {**row, "split": ref.split, "convention": convention}


def _is_scene(folder: Path) -> bool:
    return is_folder(folder / "rgb")


def _files(ref: SceneRef, folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Stem → path of everything in a folder that has one of the suffixes, in any case, sorted.

    Subfolders with a suffix are included: reading one later reports that it is not a file. Raises SceneError where the
    folder cannot be listed, or two files have the same stem.
    """
    ref.check_link(folder)
    try:
        folders, files = list_folder(folder)
    except ValueError as error:
        raise ref.error(str(folder), str(error)) from error
    found: dict[str, Path] = {}
    for path in sorted([*folders, *files]):
        if path.suffix.lower() in suffixes:
            if path.stem in found:
                raise ref.error(
                    str(path), f"has the same name as {found[path.stem].name}: which of the two is the view?"
                )
            found[path.stem] = path
    return found


def _read_numbers(ref: SceneRef, path: Path) -> list[list[float]]:
    """Read the numbers of a text file, line by line, without empty lines. Raises SceneError naming the file."""
    ref.check_link(path)
    try:
        data = read_file(path, MAX_NUMBERS_BYTES)
    except ValueError as error:
        raise ref.error(str(path), str(error)) from error
    try:
        # utf-8-sig: editors on Windows begin a file with a mark of three bytes.
        lines = data.decode("utf-8-sig").splitlines()
        return [[float(word) for word in line.split()] for line in lines if line.strip()]
    except ValueError as error:
        raise ref.error(str(path), f"expected numbers ({error})") from error


def _read_pose(ref: SceneRef, path: Path, convention: Convention) -> tuple[NDArray[np.float64], bool]:
    """Read a pose → camera-to-world [4, 4], and whether it was rounded. Raises SceneError naming the file."""
    numbers = [number for line in _read_numbers(ref, path) for number in line]
    try:
        pose, rounded = near_pose(numbers)
        return as_read(pose, convention), rounded
    except ValueError as error:
        raise ref.error(str(path), str(error)) from error


def _read_intrinsics(ref: SceneRef, path: Path, image_size: tuple[int, int]) -> tuple[NDArray[np.float64], bool]:
    """Read intrinsics.txt → normalised intrinsics [3, 3], and whether poses are world-to-camera. Raises SceneError
    naming the file.

    The first line is "f cx cy …" in pixels, the last one "H W", after which a line may say 0 (poses are
    camera-to-world, as without it) or 1 (world-to-camera); the lines between them are ignored.
    """
    lines = _read_numbers(ref, path)
    flag = lines.pop() if len(lines) > 2 and len(lines[-1]) == 1 and len(lines[-2]) == 2 else [0.0]
    if len(lines) < 2 or len(lines[0]) < 3 or len(lines[-1]) != 2 or flag not in ([0.0], [1.0]):
        raise ref.error(
            str(path), 'expected "f cx cy 0." in the first line and "H W" in the last one, or 0 or 1 after it'
        )
    focal, centre_x, centre_y = lines[0][:3]
    height, width = lines[-1]
    try:
        return intrinsics_from_pixels((focal, focal), (centre_x, centre_y), width, height, image_size), flag == [1.0]
    except ValueError as error:
        raise ref.error(str(path), str(error)) from error
