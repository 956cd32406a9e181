"""What --source holds: finds the layout of a folder or a .zip file and reads its scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scaling.data.readers import nerfstudio, paper_release, srn
from scaling.data.readers.zip_paths import is_folder, is_zip, list_folder
from scaling.data.scene_id import check_scene_id
from scaling.data.scene_views import SceneRef

# What --layout names: layouts that one word stands for are tried in this order.
LAYOUTS = {"transforms": (paper_release, nerfstudio), "srn": (srn,)}
_READERS = {layout.LAYOUT: layout for layouts in LAYOUTS.values() for layout in layouts}


def list_scenes(source: str | Path, layout: str = "auto", category: str | None = None) -> list[SceneRef]:
    """The scenes of a folder or a .zip file, in the order of its map where it has one, else sorted by id.

    layout: auto, srn or transforms; category: only scenes of it. ValueError: no such folder, no scenes in it,
    no layout that fits, several that do, or no such category.
    """
    root = Path(source).absolute()  # the scenes' readers run in other folders
    if not root.is_dir() and not is_zip(root):
        raise ValueError(
            f"source {source}: {'is neither a folder nor a .zip file' if root.exists() else 'no such folder'}"
        )
    refs = _READERS[find_layout(root, layout)].list_scenes(root)
    if category is not None:
        known = sorted({ref.category for ref in refs} - {""})
        if category not in known:
            choices = f"it has {', '.join(known)}" if known else "it has no categories"
            raise ValueError(f"source {source}: no category {category!r}; {choices}")
        refs = [ref for ref in refs if ref.category == category]
    if not refs:
        raise ValueError(f"source {source}: no scenes in it")
    return refs


def read_scene(ref: SceneRef) -> dict[str, Any]:
    """A row of the scene store. SceneError says what is wrong with the scene, and in which file."""
    try:
        check_scene_id(ref.scene_id)
    except ValueError as error:
        raise ref.error(ref.source, str(error)) from error
    if not ref.folder:
        raise ref.error(ref.source, "the path is not valid UTF-8: rename the folder")
    return _READERS[ref.layout].read_scene(ref)


def find_layout(source: Path, layout: str = "auto") -> str:
    """The name of the reader of a source. ValueError where the given layout (or, with auto, none) fits, or two do."""
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: choose auto, {' or '.join(sorted(LAYOUTS))}")
    asked = list(LAYOUTS) if layout == "auto" else [layout]
    found = {}
    for name in asked:
        for reader in LAYOUTS[name]:
            if name not in found and reader.fits(source):
                found[name] = reader.LAYOUT
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
    return ""
