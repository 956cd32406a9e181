"""Find the scenes of a source, at SOURCE/ID or SOURCE/CATEGORY/ID; a .zip file counts as a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from scaling.data.readers.zip_paths import is_zip, list_folder
from scaling.data.scene_id import is_scene_id
from scaling.data.scene_views import SceneRef, printable

MAX_SCENES = 1_000_000  # of a source: each takes memory before the first one is read
IsScene = Callable[[Path], bool]


def holds_scenes(source: Path, is_scene: IsScene) -> bool:
    """Whether the source holds any scene. Raises ValueError naming a folder or a zip file that cannot be read."""
    return any(True for _ in _groups(source, is_scene))


def list_scene_folders(source: Path, layout: str, is_scene: IsScene) -> list[SceneRef]:
    """List the scenes of a source, sorted by id.

    The category is "" for SOURCE/ID and for a source that is a single zip; otherwise it is the name of the folder, or
    of the zip without .zip. Only names are read. Every folder beside a scene counts as a scene: reading a broken one
    then reports why it is rejected. Raises ValueError naming a folder or a zip file that cannot be read.
    """
    refs = [
        _ref(source, category, scene, layout)
        for category, group in _groups(source, is_scene)
        for scene in _folders(group)
    ]
    return sorted(refs, key=lambda ref: (ref.scene_id, ref.category))


def _groups(source: Path, is_scene: IsScene) -> Iterator[tuple[str, Path]]:
    """Yield (category, folder that holds scenes)."""
    if is_zip(source):
        yield from (("", folder) for folder in _groups_of_zip(source, is_scene))
    elif _any_scene(source, is_scene):
        yield "", source
    else:
        yield from ((folder.name, folder) for folder in _folders(source) if _any_scene(folder, is_scene))
        for archive in filter(is_zip, list_folder(source)[1]):
            yield from ((archive.stem, folder) for folder in _groups_of_zip(archive, is_scene))


def _groups_of_zip(archive: Path, is_scene: IsScene) -> list[Path]:
    """The folders that hold the scenes of a zip: the zip itself, or folders at its top.

    Datasets are often packed as PREFIX/ID. The prefix says no more than the zip's name, so it is not a category.
    """
    folders = [archive, *_folders(archive)]
    return [folder for folder in folders if _any_scene(folder, is_scene)]


def _any_scene(folder: Path, is_scene: IsScene) -> bool:
    return any(is_scene(path) for path in _folders(folder))


def _folders(folder: Path) -> list[Path]:
    try:
        return list_folder(folder)[0]
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _ref(source: Path, category: str, scene: Path, layout: str) -> SceneRef:
    """Make a reference. A bad id, or a path that is not UTF-8, gets no folder; reading the scene then reports this."""
    relative = printable(scene.relative_to(source).as_posix())
    folder = str(scene) if printable(str(scene)) == str(scene) and is_scene_id(scene.name) else ""
    return SceneRef(printable(scene.name), printable(category), folder, layout, relative)
