"""The layout of nerfstudio and of Blender's NeRF scenes: ID/transforms.json, or ID/transforms_{train,val,test}.json.

Poses are camera-to-world in OpenGL axes (x right, y up, z backward), unless --poses or --axes say otherwise. Positions
and scale are kept: nothing is centred or scaled to fit the scene's box.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling.data.readers.conventions import Convention
from scaling.data.readers.scene_folders import holds_scenes, list_scene_folders
from scaling.data.readers.transforms_json import Frame, image_path, read_frames, row_from_frames
from scaling.data.readers.zip_paths import is_file
from scaling.data.scene_ref import SceneRef
from scaling.data.scene_views import MAX_VIEWS, default_test_views

NAME = "nerfstudio"
CONVENTION = Convention("cam2world", "opengl")
LOOKED_FOR = "ID/transforms.json or ID/transforms_train.json, or CATEGORY/ID/…"
_WHOLE = "transforms.json"
_SPLITS = {split: f"transforms_{split}.json" for split in ("train", "val", "test")}


def fits(source: Path) -> bool:
    """Whether the source holds scenes of this layout, directly or in folders or zip files."""
    return holds_scenes(source, is_scene)


def list_scenes(source: Path) -> list[SceneRef]:
    """List all scenes of the source, sorted by id."""
    return list_scene_folders(source, NAME, is_scene)


def is_scene(folder: Path) -> bool:
    """Whether a folder is a scene of this layout."""
    return any(is_file(folder / name) for name in (_WHOLE, *_SPLITS.values()))


def read_scene(ref: SceneRef) -> dict[str, Any]:
    """Read a scene → a row of the scene store: first the training views, then the test views.

    Test views are the frames of `test`, or of `val` where `test` has none. All other frames are training views, except
    those whose image is a test view too. A scene without a split gets `default_test_views`.
    Raises SceneError naming the file and the key that is missing, malformed or damaged.
    """
    splits = _read_splits(ref)
    held_out = "test" if splits.get("test") else "val"
    tests = splits.get(held_out, [])
    seen = {frame.image for frame in tests}
    others = [frame for split, frames in splits.items() if split != held_out for frame in frames]
    training = [frame for frame in others if frame.image not in seen]
    frames = [*training, *tests]
    test_views = range(len(training), len(frames)) if tests else default_test_views(len(frames))
    return row_from_frames(ref, frames, test_views, CONVENTION)


def _read_splits(ref: SceneRef) -> dict[str, list[Frame]]:
    """Read the frames of train, val and test; without a split, all frames belong to train.

    Where a scene has both forms, only the split files are read: transforms.json is then their union. Raises SceneError
    as `read_scene` does.
    """
    folder = Path(ref.folder)
    files = {split: folder / name for split, name in _SPLITS.items() if is_file(folder / name)}
    if files and "train" not in files:
        raise ref.error(
            str(folder), f"holds {', '.join(path.name for path in files.values())}, but no {_SPLITS['train']}"
        )
    if files:
        return {split: read_frames(ref, path, CONVENTION)[1] for split, path in files.items()}
    path = folder / _WHOLE
    shared, frames = read_frames(ref, path, CONVENTION)
    try:
        return _named_splits(folder, shared, frames) or {"train": frames}
    except ValueError as error:
        raise ref.error(str(path), str(error)) from error


def _named_splits(folder: Path, shared: Mapping[str, Any], frames: list[Frame]) -> dict[str, list[Frame]]:
    """Assign the frames by nerfstudio's keys train_filenames, val_filenames and test_filenames.

    Frames that no key names are unused; where the keys name no frame at all, the result is empty. Raises ValueError
    where a key is not a list or names an unknown image, or where only val or test frames are named.
    """
    by_image = {frame.image: frame for frame in frames}
    splits: dict[str, list[Frame]] = {}
    for split in _SPLITS:
        key = f"{split}_filenames"
        names = shared.get(key, [])
        if not isinstance(names, list):
            raise ValueError(f'key "{key}" must be a list of file names')
        if len(names) > MAX_VIEWS:
            raise ValueError(f'key "{key}" has {len(names)} entries; at most {MAX_VIEWS} are read')
        for name in names:
            image = image_path(folder, name)
            if image not in by_image:
                raise ValueError(f'"{key}" names {name!r:.200}, which is no frame\'s "file_path"')
            splits.setdefault(split, []).append(by_image[image])
    if splits and "train" not in splits:
        raise ValueError('key "train_filenames" is missing or empty')
    return splits
