"""Sources of every layout with images of a few pixels, for the tests of the readers."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from scaling.data.png import encode_png
from scaling.data.scene_views import default_test_views, make_row

POSE = np.array([[0, 0, -1, 1.3], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
OPENGL_POSE = np.array([[0, 0, 1, 1.3], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=np.float64)  # the same camera
INTRINSICS = [[1.0, 0, 0.5], [0, 1.0, 0.5], [0, 0, 1]]


def picture(shade: int = 100, width: int = 8, height: int = 8) -> bytes:
    return encode_png(np.full((height, width, 3), shade, dtype=np.uint8))


def row(scene_id: str = "one", num_views: int = 2, shade: int = 100) -> dict[str, Any]:
    """A row of the scene store; view v is all of shade + v."""
    pngs = [picture(shade + view) for view in range(num_views)]
    cameras = np.tile(POSE, (num_views, 1, 1)), np.tile(INTRINSICS, (num_views, 1, 1))
    return make_row(scene_id, "car", pngs, *cameras, default_test_views(num_views), 8, 8, scene_id)


def srn_scene(folder: Path, num_views: int = 3) -> Path:
    (folder / "rgb").mkdir(parents=True)
    (folder / "pose").mkdir()
    for view in range(num_views):
        (folder / "rgb" / f"{view:06d}.png").write_bytes(picture(view))
        (folder / "pose" / f"{view:06d}.txt").write_text(" ".join(str(number) for number in POSE.ravel()))
    (folder / "intrinsics.txt").write_text("131.25 64. 48. 0.\n0. 0. 0.\n1.\n128 128\n")
    return folder


def released_source(folder: Path, categories: dict[str, list[str]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "dataset_map.json").write_text(json.dumps(categories))
    for scene_id in {scene_id for ids in categories.values() for scene_id in ids}:
        images = folder / "square128_above" / scene_id / "images"
        images.mkdir(parents=True)
        frames = []
        for view in range(2):
            (images / f"{view}.png").write_bytes(picture(view))
            camera = {"fl_x": 8.16, "fl_y": 8.16, "cx": 4, "cy": 4, "w": 8, "h": 8}
            frames.append({"file_path": f"images/{view}.png", "transform_matrix": POSE.tolist(), **camera})
        (images.parent / "transforms_opencv.json").write_text(json.dumps({"frames": frames}))
    return folder


def nerfstudio_scene(folder: Path, num_views: int = 3, **keys: Any) -> Path:
    """One transforms.json; `keys` are added to it. View v is all of shade v."""
    (folder / "images").mkdir(parents=True)
    for view in range(num_views):
        (folder / "images" / f"{view}.png").write_bytes(picture(view))
    frames = [_frame(f"images/{view}.png") for view in range(num_views)]
    (folder / "transforms.json").write_text(json.dumps({"fl_x": 8.16, **keys, "frames": frames}))
    return folder


def blender_scene(folder: Path, **num_views: int) -> Path:
    """blender_scene(folder, train=3, test=2): file names without .png, as Blender scenes have them."""
    for split, count in num_views.items():
        (folder / split).mkdir(parents=True)
        for view in range(count):
            (folder / split / f"r_{view}.png").write_bytes(picture({"train": 0, "val": 50, "test": 100}[split] + view))
        frames = [{**_frame(f"./{split}/r_{view}"), "rotation": 0.0126} for view in range(count)]
        transforms = {"camera_angle_x": 0.6911112070083618, "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(transforms))
    return folder


def zip_folder(folder: Path, archive: Path, prefix: str = "") -> Path:
    """The files of a folder, below PREFIX; folders are not listed, as most zips do not list them."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                out.write(path, Path(prefix) / path.relative_to(folder))
    return archive


def edit_json(path: Path, **changes: Any) -> None:
    """Changes keys of the file; those set to None are removed."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_frame(path: Path, index: int = 1, **changes: Any) -> None:
    """Changes keys of one frame; those set to None are removed."""
    frames = json.loads(path.read_text())["frames"]
    frame = {**frames[index], **changes}
    frames[index] = {key: value for key, value in frame.items() if value is not None}
    edit_json(path, frames=frames)


def _frame(file_path: str) -> dict[str, Any]:
    return {"file_path": file_path, "transform_matrix": OPENGL_POSE.tolist()}
