"""Find the scenes of a source, at SOURCE/ID, SOURCE/CATEGORY/ID or SOURCE/CATEGORY/SPLIT/ID; a .zip file counts as a
folder.

Folders NAME_train, NAME_val and NAME_test are the splits of category NAME; train, val and test those of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from scaling.data.readers.zip_paths import is_zip, list_folder
from scaling.data.scene_id import is_scene_id
from scaling.data.scene_ref import SceneRef, printable

SPLITS = ("train", "val", "test")
MAX_SCENES = 1_000_000  # of a source: each takes memory before the first one is read
IsScene = Callable[[Path], bool]


def holds_scenes(source: Path, is_scene: IsScene) -> bool:
    """Whether the source holds any scene. Raises ValueError naming a folder or a zip file that cannot be read."""
    return any(True for _ in _groups(source, is_scene))


def list_scene_folders(source: Path, layout: str, is_scene: IsScene) -> list[SceneRef]:
    """List the scenes of a source, sorted by id.

    The category is "" for SOURCE/ID and for a source that is a single zip; otherwise it is the name of the folder, or
    of the zip without .zip, both without their split. Only names are read. Every folder beside a scene counts as a
    scene: reading a broken one then reports why it is rejected. Raises ValueError naming a folder or a zip file that
    cannot be read.
    """
    refs = [
        _ref(source, *category_and_split(names), scene, layout)
        for names, group in _groups(source, is_scene)
        for scene in _folders(group)
    ]
    return sorted(refs, key=lambda ref: (ref.scene_id, ref.category))


def category_and_split(names: Sequence[str]) -> tuple[str, str]:
    """Category and split that the names of the folders above a scene tell, from the outermost one.

    >>> category_and_split(["cars_train"]), category_and_split(["cars", "test"]), category_and_split(["vans"])
    (('cars', 'train'), ('cars', 'test'), ('vans', ''))
    """
    category, split = "", ""
    for name in names:
        start, _, end = name.rpartition("_")
        if name in SPLITS:
            split = name
        elif end in SPLITS and start:
            category, split = start, end
        else:
            category = name
    return category, split


def _groups(source: Path, is_scene: IsScene) -> Iterator[tuple[list[str], Path]]:
    """Yield (names of the folders on the way that tell category and split, folder that holds scenes)."""
    if is_zip(source):
        yield from _groups_of_zip([], source, is_scene)
    elif _any_scene(source, is_scene):
        yield [], source
    else:
        for folder in _folders(source):
            yield from (([folder.name, *names], group) for names, group in _with_splits(folder, is_scene))
        for archive in filter(is_zip, list_folder(source)[1]):
            yield from _groups_of_zip([archive.stem], archive, is_scene)


def _with_splits(folder: Path, is_scene: IsScene) -> Iterator[tuple[list[str], Path]]:
    """Yield the folder itself, and its folders train, val and test, where they hold scenes."""
    if _any_scene(folder, is_scene):
        yield [], folder
    else:
        named = [split for split in _folders(folder) if split.name in SPLITS]
        yield from (([split.name], split) for split in named if _any_scene(split, is_scene))


def _groups_of_zip(names: list[str], archive: Path, is_scene: IsScene) -> Iterator[tuple[list[str], Path]]:
    """Yield the folders that hold the scenes of a zip: the zip itself, or folders at its top, and their splits.

    Datasets are often packed as PREFIX/ID. The prefix says no more than the zip's name, so it is not a category; it may
    be a split.
    """
    if _any_scene(archive, is_scene):
        yield names, archive
    for folder in _folders(archive):
        split = category_and_split([folder.name])[1]
        for inner, group in _with_splits(folder, is_scene):
            yield [*names, *([split] if split else []), *inner], group


def _any_scene(folder: Path, is_scene: IsScene) -> bool:
    return any(is_scene(path) for path in _folders(folder))


def _folders(folder: Path) -> list[Path]:
    try:
        return list_folder(folder)[0]
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _ref(source: Path, category: str, split: str, scene: Path, layout: str) -> SceneRef:
    """Make a reference. A bad id, or a path that is not UTF-8, gets no folder; reading the scene then reports this."""
    relative = printable(scene.relative_to(source).as_posix())
    folder = str(scene) if printable(str(scene)) == str(scene) and is_scene_id(scene.name) else ""
    return SceneRef(printable(scene.name), printable(category), folder, layout, relative, split)
