"""What --source holds: finds the layout of a folder and reads its scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scaling.data import srn, transforms
from scaling.data.scenes import SceneRef

LAYOUTS = {transforms.LAYOUT: transforms, srn.LAYOUT: srn}  # in the order in which `auto` tries them


def list_scenes(source: str | Path, layout: str = "auto", category: str | None = None) -> list[SceneRef]:
    """The scenes of a folder, in the order of its map where it has one, else sorted by id.

    layout: auto, srn or transforms; category: only scenes of it. ValueError: no such folder, no scenes in it,
    no layout that fits, or no such category.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"source {folder}: no such folder")
    refs = LAYOUTS[find_layout(folder, layout)].list_scenes(folder)
    if category is not None:
        known = sorted({ref.category for ref in refs} - {""})
        if category not in known:
            choices = f"it has {', '.join(known)}" if known else "it has no categories"
            raise ValueError(f"source {folder}: no category {category!r}; {choices}")
        refs = [ref for ref in refs if ref.category == category]
    if not refs:
        raise ValueError(f"source {folder}: no scenes in it")
    return refs


def read_scene(ref: SceneRef) -> dict[str, Any]:
    """A row of the scene store. SceneError says what is wrong with the scene, and in which file."""
    return LAYOUTS[ref.layout].read_scene(ref)


def find_layout(folder: Path, layout: str = "auto") -> str:
    """The name of the folder's layout. ValueError where the given one (or, with auto, none) fits."""
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: choose auto, {' or '.join(sorted(LAYOUTS))}")
    for name in LAYOUTS if layout == "auto" else [layout]:
        if LAYOUTS[name].fits(folder):
            return name
    looked_for = {
        "transforms": f"{transforms.MAP_FILE} beside {transforms.SCENES_FOLDER}/ID/{transforms.TRANSFORMS_FILE}",
        "srn": "ID/rgb/*.png, ID/pose/*.txt and ID/intrinsics.txt, or CATEGORY/ID/…",
    }
    wanted = [f"{name} ({looked_for[name]})" for name in looked_for if layout in ("auto", name)]
    hint = ""
    if not any(folder.iterdir()):
        hint = "; the folder is empty"
    elif (folder / "rgb").is_dir():
        hint = f"; this is a single scene: give the folder above it, {folder.resolve().parent}"
    raise ValueError(f"source {folder}: found no scenes; looked for {' and for '.join(wanted)}{hint}")
