"""The ShapeNet-SRN layout: SOURCE/ID/{rgb/*.png, pose/*.txt, intrinsics.txt}, or SOURCE/CATEGORY/ID/… for several."""

from __future__ import annotations

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

LAYOUT = "srn"


def fits(source: Path) -> bool:
    """Whether source holds scenes of this layout, or folders of them."""
    return _holds_scenes(source) or any(_holds_scenes(folder) for folder in _folders(source))


def list_scenes(source: Path) -> list[SceneRef]:
    """All scenes of the source, sorted by id; their category is "" or, of several folders, the folder's name.

    Only names are read. Broken scenes are listed too, so that reading them tells why they are rejected.
    """
    if _holds_scenes(source):
        groups = {"": source}
    else:
        groups = {folder.name: folder for folder in _folders(source) if _holds_scenes(folder)}
    refs = [
        SceneRef(scene.name, category, str(scene), LAYOUT, scene.relative_to(source).as_posix())
        for category, group in groups.items()
        for scene in _folders(group)
    ]
    return sorted(refs, key=lambda ref: (ref.scene_id, ref.category))


def read_scene(ref: SceneRef) -> dict[str, Any]:
    """A row of the scene store. SceneError names the file that is missing, malformed or damaged."""
    try:
        check_scene_id(ref.scene_id)
    except ValueError as error:
        raise ref.error(ref.folder, str(error)) from error
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


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _holds_scenes(folder: Path) -> bool:
    return any((path / "rgb").is_dir() for path in _folders(folder))


def _files(ref: SceneRef, folder: Path, suffix: str) -> dict[str, Path]:
    """The folder's files with the suffix by stem, sorted."""
    if not folder.is_dir():
        raise ref.error(str(folder), "no such folder")
    names = (path for path in folder.iterdir() if path.suffix == suffix and not path.name.startswith("."))
    return {path.stem: path for path in sorted(names)}


def _read_numbers(ref: SceneRef, path: Path) -> list[list[float]]:
    """The numbers of a text file, line by line, without empty lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [[float(word) for word in line.split()] for line in lines if line.strip()]
    except OSError as error:
        raise ref.error(str(path), f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ref.error(str(path), f"expected numbers ({error})") from error


def _read_pose(ref: SceneRef, path: Path) -> NDArray[np.float64]:
    numbers = [number for line in _read_numbers(ref, path) for number in line]
    try:
        return check_pose(numbers)
    except ValueError as error:
        raise ref.error(str(path), str(error)) from error


def _read_intrinsics(ref: SceneRef, path: Path, image_size: tuple[int, int]) -> NDArray[np.float64]:
    """The first line is "f cx cy …" in pixels, the last one "H W"; between them are values that nothing here needs."""
    lines = _read_numbers(ref, path)
    if len(lines) < 2 or len(lines[0]) < 3 or len(lines[-1]) != 2:
        raise ref.error(str(path), 'expected "f cx cy 0." in the first line and "H W" in the last one')
    focal, centre_x, centre_y = lines[0][:3]
    height, width = lines[-1]
    try:
        return intrinsics_from_pixels((focal, focal), (centre_x, centre_y), width, height, image_size)
    except ValueError as error:
        raise ref.error(str(path), str(error)) from error
