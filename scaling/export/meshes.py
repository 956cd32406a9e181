"""Meshes of fitted scenes with vertex colours: GLB for viewers, PLY for geometry tools; beside each a JSON file.

GLB follows glTF: y is up and colours are linear. The colours already include the scene's light, so the material is
unlit. PLY keeps the world's coordinates, z up, and the images' colours (sRGB). Both are in world units.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scaling.data.scene_id import check_scene_id
from scaling.export.selection import chosen_scenes, read_chosen
from scaling.export.surface import NEEDS, NoSurface, Surface, density_grid, find_surface, outline_level
from scaling.export.surface_colours import seen_colours
from scaling.library.run_folder import RunFolder
from scaling.library.stored_models import StoredModels, chosen_device
from scaling.library.viewpoints import run_viewpoints
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import fuse_planes
from scaling.storage.atomic import replace_file
from scaling.storage.json_yaml import parse_json
from scaling.storage.limited import read_limited
from scaling.storage.own_folder import own_folder

NUM_POINTS = 128  # along the box's longest side: about five a texel on planes of 24 texels a side
NUM_VIEWS = 32  # views from which surfaces and colours are taken
COLOURS = "_COLOURS"  # trimesh wants names of attributes of one's own to begin with _
UNLIT = "KHR_materials_unlit"


def export_meshes(
    run: RunFolder, folder: Path, wanted: Path | None, file_format: str, num_points: int, store: str | None = None
) -> tuple[int, dict[str, str]]:
    """Write folder/<id>.glb and <id>.glb.json (or .ply, .ply.json) of all committed scenes, or of those that the file
    `wanted` names.

    file_format: "glb" or "ply"; num_points: of the density grid, along the box's longest side. Files that were made of
    the same fit in the same way are kept. store: see `run_viewpoints`. → the number of scenes with a mesh, and by id
    why others have none. Raises what `chosen_scenes` and `run_viewpoints` raise; FileExistsError where a file of
    somebody else's would be written over; RuntimeError where the packages for meshes are not installed.
    """
    _check_installed()
    scenes = chosen_scenes(run, wanted)
    models = StoredModels(run, chosen_device())
    todo = [row for row in scenes if not _is_done(folder, row, num_points, file_format)]
    # All scenes are seen by the same cameras, which resemble those of the first scene's own views.
    scene, data = scenes[0], models.of(scenes[0]).settings.data
    cameras = run_viewpoints(run, scene["scene_id"], scene["stage"], data, store).cameras("sphere", NUM_VIEWS)
    with own_folder(folder, "meshes"):
        for row in todo:
            _check_own(_mesh_path(folder, row["scene_id"], file_format))
        without = _write(folder, models, todo, file_format, num_points, cameras)
    return len(scenes) - len(without), without


def _write(
    folder: Path,
    models: StoredModels,
    todo: list[dict[str, Any]],
    file_format: str,
    num_points: int,
    cameras: tuple[Tensor, Tensor],
) -> dict[str, str]:
    """Write the meshes of the rows. → by id, why others have none."""
    without: dict[str, str] = {}
    for row, shared, params in read_chosen(models, todo, "meshes"):
        planes = fuse_planes(params.micro_planes, params.coefs, shared.base_planes)[0]
        path = _mesh_path(folder, row["scene_id"], file_format)
        # The JSON file tells a mesh of ours from a file of somebody else's, and whether it is complete: it is written
        # first and last.
        replace_file(_about(path), json.dumps({"file": path.name, "unfinished": True}).encode())
        try:
            hull = None if params.hull is None else params.hull[0]
            surface, colours, level = coloured_surface(shared, planes, num_points, *cameras, hull)
        except NoSurface as error:
            without[row["scene_id"]] = str(error)
            path.unlink(missing_ok=True)  # of an earlier fit
            _about(path).unlink()
            continue
        replace_file(path, mesh_bytes(surface, colours, file_format))
        about = {**_origin(row, num_points, file_format), "raw_density": level, **_described(surface)}
        replace_file(_about(path), json.dumps(about, indent=1).encode())
    return without


def coloured_surface(
    shared: SharedModel,
    planes: Tensor,
    num_points: int,
    cam2world: Tensor,
    intrinsics: Tensor,
    hull: Tensor | None = None,
) -> tuple[Surface, NDArray[np.uint8], float]:
    """The surface of a tri-plane [P, F, K, K] in its hull [CELLS³], its vertices' colours [N, 3], sRGB, and the raw
    density at which it lies.

    cam2world [V, 4, 4], intrinsics [V, 3, 3]: views from all around, which determine where the surface is and what
    colours it has. Raises NoSurface where they show nothing.
    """
    grid = density_grid(shared, planes, num_points, hull)
    level = outline_level(shared, planes, grid, cam2world, intrinsics, hull)
    surface = find_surface(grid, level)
    return surface, seen_colours(shared, planes, surface, grid, cam2world, intrinsics, hull), level


def mesh_bytes(surface: Surface, colours: NDArray[np.uint8], file_format: str) -> bytes:
    """A mesh as the bytes of a GLB or PLY file. colours [N, 3], sRGB."""
    import trimesh
    from trimesh.exchange.gltf import export_glb
    from trimesh.exchange.ply import export_ply

    if file_format == "ply":
        mesh = trimesh.Trimesh(surface.vertices, surface.faces, vertex_colors=_opaque(colours), process=False)
        return export_ply(mesh, vertex_normal=False)
    surface = y_up(surface)
    mesh = trimesh.Trimesh(surface.vertices, surface.faces, process=False)
    mesh.vertex_attributes[COLOURS] = _opaque(to_linear(colours))
    return export_glb(mesh, include_normals=False, tree_postprocessor=_finish)


def _opaque(colours: NDArray[Any]) -> NDArray[Any]:
    """Colours [N, 3] with the highest alpha of their type → [N, 4]."""
    return np.concatenate([colours, np.full_like(colours[:, :1], np.iinfo(colours.dtype).max)], 1)


def y_up(surface: Surface) -> Surface:
    """Turn world axes (z up) into glTF's (y up): x, y, z → x, z, −y."""
    turn = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=np.float32)
    return replace(surface, vertices=surface.vertices @ turn, normals=surface.normals @ turn)


def to_linear(colours: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """sRGB → linear light, as glTF wants vertex colours; viewers turn them back. Of the 64 darkest values 8 bits would
    keep 14 apart, so there are 16."""
    values = colours / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return (linear * 65535).round().astype(np.uint16)


def _finish(tree: dict[str, Any]) -> None:
    """Make our attribute the vertices' colours, which trimesh itself writes with 8 bits; make the material unlit."""
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            place = primitive["attributes"].pop(COLOURS)
            primitive["attributes"]["COLOR_0"] = place
            tree["accessors"][place]["normalized"] = True
    rough = {"metallicFactor": 0, "roughnessFactor": 1}  # for viewers that do not know UNLIT: glTF's default is a metal
    tree["materials"] = [{"pbrMetallicRoughness": rough, "extensions": {UNLIT: {}}}]
    tree["extensionsUsed"] = [UNLIT]
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            primitive["material"] = 0


def _check_installed() -> None:
    try:
        import skimage.measure  # noqa: F401
        import trimesh  # noqa: F401
    except ImportError as error:
        raise RuntimeError(NEEDS) from error


def _mesh_path(folder: Path, scene_id: str, file_format: str) -> Path:
    return folder / f"{check_scene_id(scene_id)}.{file_format}"


def _about(mesh: Path) -> Path:
    return mesh.with_name(f"{mesh.name}.json")


def _check_own(mesh: Path) -> None:
    """Raise FileExistsError where a mesh, or the JSON file beside it, was not written by this program."""
    if not mesh.exists() and not _about(mesh).exists():
        return
    about = _read_about(mesh)
    if about.get("file") != mesh.name or not about.keys() & {"unfinished", "raw_density"}:
        raise FileExistsError(
            f"{mesh} is no mesh of this program's, as {_about(mesh).name} does not say so; it is not written over: "
            "move it away, or name another folder"
        )


def _read_about(mesh: Path) -> dict[str, Any]:
    """The JSON file beside a mesh; empty where there is none, or it cannot be read."""
    try:
        about = parse_json(read_limited(_about(mesh)))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _origin(row: dict[str, Any], num_points: int, file_format: str) -> dict[str, Any]:
    up = "y" if file_format == "glb" else "z"
    return {**row, "file": f"{row['scene_id']}.{file_format}", "up": up, "num_points": num_points}


def _is_done(folder: Path, row: dict[str, Any], num_points: int, file_format: str) -> bool:
    """Whether a mesh exists and its JSON file, which is written last, says that it is of the same fit, format and grid
    size."""
    path = _mesh_path(folder, row["scene_id"], file_format)
    about, origin = _read_about(path), _origin(row, num_points, file_format)
    return path.is_file() and {key: about.get(key) for key in origin} == origin


def _described(surface: Surface) -> dict[str, Any]:
    low, high = surface.vertices.min(0).tolist(), surface.vertices.max(0).tolist()
    return {"vertices": len(surface.vertices), "faces": len(surface.faces), "world_low": low, "world_high": high}
