"""Find the layout of --source, a folder or a .zip file, and read its scenes."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from scaling.data.readers import nerfstudio, paper_release, srn
from scaling.data.readers.scene_folders import MAX_SCENES
from scaling.data.readers.zip_paths import is_folder, is_zip, list_folder
from scaling.data.scene_id import check_scene_id
from scaling.data.scene_ref import SceneRef


class Reader(Protocol):
    """What a module that reads a layout provides. It opens files by `zip_paths` alone, so that zips work, too.

    NAME: the reader's own name, which its SceneRefs carry; LOOKED_FOR: for the user, the files that tell the layout;
    fits: whether a source has the layout; list_scenes: its scenes, nothing read but names; read_scene: a row made by
    `scene_views.make_row`, with cam2world in OpenCV axes and intrinsics divided by the image size. read_scene raises
    `ref.error(file, reason)`, a SceneError.
    """

    NAME: str
    LOOKED_FOR: str

    def fits(self, source: Path, /) -> bool: ...

    def list_scenes(self, source: Path, /) -> list[SceneRef]: ...

    def read_scene(self, ref: SceneRef, /) -> dict[str, Any]: ...


# Value of --layout (experiments/prepare.py lists them, too) → its readers; those of one value are tried in this order.
LAYOUTS: dict[str, tuple[Reader, ...]] = {"transforms": (paper_release, nerfstudio), "srn": (srn,)}
SEARCHED_DEPTH, SEARCHED_FOLDERS, SEARCHED_SECONDS = 3, 500, 5.0  # where scenes are looked for if a source has none
_READERS = {reader.NAME: reader for readers in LAYOUTS.values() for reader in readers}


def list_scenes(
    source: str | Path,
    layout: str = "auto",
    category: str | None = None,
    poses: str | None = None,
    axes: str | None = None,
    follow_links: bool = False,
) -> list[SceneRef]:
    """List the scenes of a folder or a .zip file, in the order of its map where it has one, else sorted by id.

    layout: auto, or a key of LAYOUTS; category: list only its scenes; poses, axes: in place of the layout's convention
    (see conventions.py); follow_links: also out of the source. Raises ValueError where the source does not exist
    or holds no scenes, where no layout fits or several do, or where there is no such category.
    """
    root = Path(source).expanduser().absolute()  # scenes are read by workers, which run in other folders
    if not root.is_dir() and not is_zip(root):
        raise ValueError(
            f"source {source}: {'is neither a folder nor a .zip file' if root.exists() else 'no such folder'}"
        )
    reader = _READERS[find_layout(root, layout)]
    told = root / paper_release.MAP_FILE
    if reader is paper_release and not follow_links and not told.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{told}: is a link that leads out of the source, to {told.resolve()}: give --follow-links")
    refs = reader.list_scenes(root)
    if category is not None:
        known = sorted({ref.category for ref in refs} - {""})
        if category not in known:
            choices = f"it has {', '.join(known)}" if known else "it has no categories"
            raise ValueError(f"source {source}: no category {category!r}; {choices}")
        refs = [ref for ref in refs if ref.category == category]
    if not refs:
        raise ValueError(f"source {source}: no scenes in it")
    if len(refs) > MAX_SCENES:
        raise ValueError(f"source {source}: lists {len(refs):,} scenes; at most {MAX_SCENES:,} are read: divide it")
    return [replace(ref, poses=poses, axes=axes, follow_links=follow_links) for ref in refs]


def read_scene(ref: SceneRef) -> dict[str, Any]:
    """Read a scene → a row of the scene store. Raises SceneError saying what is wrong with it, and in which file."""
    try:
        check_scene_id(ref.scene_id)
    except ValueError as error:
        raise ref.error(ref.source, str(error)) from error
    if not ref.folder:
        raise ref.error(ref.source, "the path is not valid UTF-8: rename the folder")
    return _READERS[ref.layout].read_scene(ref)


def find_layout(source: Path, layout: str = "auto") -> str:
    """The name of the reader that fits a source.

    Raises ValueError where the layout is unknown, where no reader of it (with auto: no reader at all) fits, or where
    two layouts fit.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: choose auto, {' or '.join(sorted(LAYOUTS))}")
    asked = list(LAYOUTS) if layout == "auto" else [layout]
    found = {}
    for name in asked:
        for reader in LAYOUTS[name]:
            if name not in found and reader.fits(source):
                found[name] = reader.NAME
    if len(found) > 1:
        raise ValueError(
            f"source {source}: holds scenes of several layouts, {' and '.join(found)}: choose one by --layout"
        )
    if found:
        return next(iter(found.values()))
    wanted = [f"{name} ({' or '.join(reader.LOOKED_FOR for reader in LAYOUTS[name])})" for name in asked]
    raise ValueError(f"source {source}: found no scenes; looked for {' and for '.join(wanted)}{_hint(source)}")


def _hint(source: Path) -> str:
    if not any(list_folder(source)):
        return "; it is empty"
    if is_folder(source / "rgb") or nerfstudio.is_scene(source):
        return f"; this is a single scene: give the folder above it, {source.parent}"
    deeper = _first_with_scenes(source)
    return f"; there are scenes in {deeper}: give that folder" if deeper else ""


def _first_with_scenes(source: Path) -> Path | None:
    """The first folder, at most SEARCHED_DEPTH below a source, that is one itself; None after SEARCHED_FOLDERS."""
    level, looked, until = [source], 0, time.monotonic() + SEARCHED_SECONDS
    for _ in range(SEARCHED_DEPTH):
        inner: list[Path] = []
        for folder in level:
            with suppress(ValueError):
                inner += [found for found in list_folder(folder)[0] if not found.is_symlink()]
        for folder in inner:
            looked += 1
            if looked > SEARCHED_FOLDERS or time.monotonic() > until:
                return None
            with suppress(ValueError):  # what cannot be read is not what the user means
                if any(reader.fits(folder) for readers in LAYOUTS.values() for reader in readers):
                    return folder
        level = inner
    return None
