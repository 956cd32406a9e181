"""New views of fitted scenes, each scene a folder in nerfstudio's layout: transforms.json and images/.

Camera axes are OpenGL's (x right, y up, z backward), the world's z is up, intrinsics are in pixels. `prepare.py` reads
the folders as scenes. transforms.json is written last and marks a scene as complete.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from scaling.data.png import encode_png
from scaling.data.readers.conventions import AXES
from scaling.data.scene_id import check_scene_id
from scaling.export.selection import chosen_scenes, read_chosen
from scaling.library.run_folder import RunFolder
from scaling.library.stored_models import StoredModels, chosen_device
from scaling.library.viewpoints import run_viewpoints
from scaling.pictures.draw import to_pixels
from scaling.storage.atomic import replace_file
from scaling.storage.json_yaml import parse_json
from scaling.storage.limited import read_limited
from scaling.storage.links import refuse_links
from scaling.storage.own_folder import claim_folder, own_folder
from scaling.training.evaluate import render_views

TRANSFORMS = "transforms.json"
NUM_VIEWS = 48


def export_views(
    run: RunFolder, folder: Path, wanted: Path | None, path: str, num_views: int, store: str | None = None
) -> int:
    """Write folder/<id>/transforms.json and images/ of all committed scenes, or of those that the file `wanted` names.

    All scenes get the same cameras, those of `run_viewpoints` (which see for `store`); path: "ring" or "sphere". Files
    that were made of the same fit with the same cameras are kept. → the number of scenes. Raises what `chosen_scenes`
    and `run_viewpoints` raise.
    """
    scenes = chosen_scenes(run, wanted)
    models = StoredModels(run, chosen_device())
    first = models.of(scenes[0])
    seen = run_viewpoints(run, scenes[0]["scene_id"], scenes[0]["stage"], first.settings.data, store)
    cam2world, intrinsics = seen.cameras(path, num_views)

    def transforms_of(row: dict[str, Any]) -> bytes:
        # A cohort's model renders the same size as the shared one and need not be read for it.
        size = models.of({**row, "cohort": None}).settings.data.image_size
        return json.dumps({**transforms(cam2world, intrinsics, size), "scaling": row}, indent=1).encode()

    with own_folder(folder, "views"):
        todo = [row for row in scenes if not _is_done(folder / check_scene_id(row["scene_id"]), transforms_of(row))]
        for row, shared, params in read_chosen(models, todo, "views"):
            views = render_views(shared, params, cam2world, intrinsics)
            _write_scene(folder / row["scene_id"], to_pixels(views["images"]), transforms_of(row))
    return len(scenes)


def transforms(cam2world: Tensor, intrinsics: Tensor, size: int) -> dict[str, Any]:
    """Content of transforms.json. cam2world [V, 4, 4], OpenCV axes; intrinsics [V, 3, 3], normalised, the same for all
    views; size: of the images, pixels."""
    camera = intrinsics[0].double()
    return {
        "camera_model": "PINHOLE",
        "w": size,
        "h": size,
        "fl_x": camera[0, 0].item() * size,
        "fl_y": camera[1, 1].item() * size,
        "cx": camera[0, 2].item() * size,
        "cy": camera[1, 2].item() * size,
        "frames": [
            {
                "file_path": f"images/{number:05d}.png",
                "transform_matrix": (pose.double().numpy() @ AXES["opengl"]).tolist(),
            }
            for number, pose in enumerate(cam2world)
        ],
    }


def _write_scene(folder: Path, images: np.ndarray, content: bytes) -> None:
    refuse_links(folder, folder / "images")
    claim_folder(folder, "views of a scene")
    before = _written_before(folder / TRANSFORMS)
    (folder / TRANSFORMS).unlink(missing_ok=True)
    for number, image in enumerate(images):
        replace_file(folder / "images" / f"{number:05d}.png", encode_png(image))
    for name in before - {f"{number:05d}.png" for number in range(len(images))}:
        (folder / "images" / name).unlink(missing_ok=True)
    replace_file(folder / TRANSFORMS, content)


def _written_before(path: Path) -> set[str]:
    """Names of the images that an earlier export with more views made. Raises FileExistsError where the file is of
    somebody else's."""
    if not path.is_file():
        return set()
    try:
        values = parse_json(read_limited(path))
        if values["scaling"] is not None:
            names = (str(frame["file_path"]).removeprefix("images/") for frame in values["frames"])
            return {name for name in names if re.fullmatch(r"[0-9]{5}\.png", name)}
    except (ValueError, TypeError, LookupError):
        pass
    raise FileExistsError(f"{path} was not made by this program, and is not written over: name another folder")


def _is_done(folder: Path, content: bytes) -> bool:
    path = folder / TRANSFORMS
    try:
        return read_limited(path) == content
    except (OSError, ValueError):
        return False
