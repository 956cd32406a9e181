"""The paper's released layout: dataset_map.json (category → ordered ids), square128_above/ID/transforms_opencv.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scaling.data.readers.conventions import Convention
from scaling.data.readers.scene_folders import MAX_SCENES
from scaling.data.readers.transforms_json import load_json, read_frames, row_from_frames
from scaling.data.readers.zip_paths import is_file, is_folder
from scaling.data.scene_id import is_scene_id
from scaling.data.scene_ref import SceneRef, printable
from scaling.data.scene_views import default_test_views

NAME = "released"
CONVENTION = Convention("cam2world", "opencv")
MAP_FILE = "dataset_map.json"
SCENES_FOLDER = "square128_above"
TRANSFORMS_FILE = "transforms_opencv.json"
LOOKED_FOR = f"{MAP_FILE} beside {SCENES_FOLDER}/ID/{TRANSFORMS_FILE}"


def fits(source: Path) -> bool:
    """Whether the source has this layout: the map and the folder of scenes."""
    return is_file(source / MAP_FILE) and is_folder(source / SCENES_FOLDER)


def list_scenes(source: Path) -> list[SceneRef]:
    """List the scenes of dataset_map.json, in its order.

    An id that two categories name is listed twice: the store keeps the first scene and rejects the second. Raises
    ValueError where the file cannot be read or does not map categories to lists of ids.
    """
    path = source / MAP_FILE
    try:
        categories = load_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(categories, dict) or not all(
        isinstance(ids, list) and all(isinstance(scene_id, str) for scene_id in ids) for ids in categories.values()
    ):
        raise ValueError(f"{path}: expected an object of categories, each with a list of scene ids (strings)")
    num_scenes = sum(map(len, categories.values()))
    if num_scenes > MAX_SCENES:
        raise ValueError(f"{path}: lists {num_scenes:,} scenes; at most {MAX_SCENES:,} are read: divide it")
    return [_ref(source, printable(category), scene_id) for category, ids in categories.items() for scene_id in ids]


def read_scene(ref: SceneRef) -> dict[str, Any]:
    """Read a scene → a row of the scene store.

    Raises SceneError naming the file and the key that is missing, malformed or damaged.
    """
    _, frames = read_frames(ref, Path(ref.folder) / TRANSFORMS_FILE, CONVENTION)
    return row_from_frames(ref, frames, default_test_views(len(frames)), CONVENTION)


def _ref(source: Path, category: str, scene_id: str) -> SceneRef:
    """Make a reference. A bad id gets no folder; reading the scene then reports the id."""
    if not is_scene_id(scene_id):
        return SceneRef(printable(scene_id), category, "", NAME, MAP_FILE)
    folder = source / SCENES_FOLDER / scene_id
    return SceneRef(scene_id, category, str(folder), NAME, folder.relative_to(source).as_posix())
