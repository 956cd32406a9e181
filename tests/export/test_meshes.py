"""Exported meshes: balls whose planes are written by hand, read back by trimesh."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
import torch
import trimesh
from helpers.export import export_main

from scaling.cameras import normalised_intrinsics, zone
from scaling.config import make_settings
from scaling.export.meshes import mesh_bytes, to_linear
from scaling.export.surface import DensityGrid, NoSurface, density_grid, find_surface, outline_level
from scaling.export.surface_colours import seen_colours
from scaling.models.cells import CELLS
from scaling.models.shared_model import SharedModel

RADIUS = 0.5  # of the ball, in the box's coordinates


@pytest.fixture
def ball() -> tuple[SharedModel, torch.Tensor]:
    """A model in RGB space and planes [3, 4, 64, 64] of a ball in the middle of the box, whose red grows with x, green
    with y and blue with z.

    Plane features sum to (r², x, y, z). Hidden units are softplus(40 + feature), which is 40 + feature; the head
    takes the 40 away again.
    """
    values = {
        "data": {"image_size": 64},
        "representation": {
            "micro_features": 4, "macro_features": 0, "num_base_planes": 0, "resolution": 64,
            "combine": "sum", "field_width": 4, "field_layers": 1, "box_side": 2.0, "length_unit": "world",
        },
        "rendering": {"samples": 64},
        "autoencoder": {"kind": "super_resolution", "shrink": 1, "decoder_blocks": 0},
        "stage1": {phase: {"num_epochs": 0} for phase in ("joint", "adapt", "distil")},
        "stage2": {"rgb": {"num_epochs": 0}},
    }  # fmt: skip
    shared = SharedModel(make_settings(values)).requires_grad_(False)
    place = (torch.arange(64) + 0.5) / 32 - 1
    second, first = torch.meshgrid(place, place, indexing="ij")  # rows, columns
    nothing, squares = torch.zeros(64, 64), (first**2 + second**2) / 2
    planes = torch.stack([
        torch.stack([squares, first, second, nothing]),  # xy
        torch.stack([squares, nothing, nothing, second]),  # xz
        torch.stack([squares, nothing, nothing, nothing]),  # yz
    ])  # fmt: skip
    make_ball(shared)
    return shared, planes


LEVEL = 3.0  # raw density of the ball's surface


def make_ball(shared: SharedModel, steep: float = 5000.0) -> None:
    """Raw densities are LEVEL + steep (RADIUS² − r²), colours sigmoid(4 x)."""
    field = shared.field
    field.hidden.weight.copy_(torch.eye(4))
    field.hidden.bias.fill_(40.0)
    field.head.weight.copy_(torch.diag(torch.tensor([-steep, 4.0, 4.0, 4.0])))
    field.head.bias.copy_(torch.tensor([LEVEL + steep * RADIUS**2, 0, 0, 0]) - field.head.weight.diag() * 40)


def measured(shared: SharedModel) -> SharedModel:
    """A model of the same settings, but for a box that is measured."""
    settings = shared.settings.model_dump()
    settings["representation"]["box_side"] = None
    return SharedModel(make_settings(settings)).requires_grad_(False)


def colours_at(points: np.ndarray) -> np.ndarray:
    """What the ball's field says at points [N, 3] in the box's coordinates."""
    return (255 / (1 + np.exp(-4 * points))).round().astype(np.uint8)


def test_the_surface_has_the_outline_of_what_is_half_opaque(ball):
    """A ball of fog: a chord at distance b from the middle has an optical depth, by numpy, and is half opaque where
    that is ln 2. The highest raw density on that chord is the surface's."""
    shared, planes = ball
    make_ball(shared, steep=20.0)
    along, nearest = np.linspace(-1, 1, 2001), np.linspace(0, 1, 1001)
    raw = LEVEL + 20 * (RADIUS**2 - nearest[:, None] ** 2 - along**2)
    depth = np.log1p(np.exp(raw - 1)).mean(1) * 2
    edge = nearest[np.argmax(depth < math.log(2))]
    assert 0.4 < edge < 0.7
    cameras = zone(12, 3.0, -1.4, 1.4), normalised_intrinsics(1.0).repeat(12, 1, 1)
    level = outline_level(shared, planes, density_grid(shared, planes, 65), *cameras)
    assert level == pytest.approx(LEVEL + 20 * (RADIUS**2 - edge**2), abs=0.2)


def test_a_ball_has_its_radius_and_colours(ball):
    shared, planes = ball
    grid = density_grid(shared, planes, 48)
    surface = find_surface(grid, LEVEL)
    mesh = trimesh.Trimesh(surface.vertices, surface.faces, process=False)
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * RADIUS**3, rel=0.01)
    np.testing.assert_allclose(np.linalg.norm(surface.vertices, axis=1), RADIUS, atol=0.005)
    assert ((surface.normals * surface.vertices).sum(1) > 0.99 * RADIUS).all(), "normals point outwards"
    colours = colours_at(surface.vertices).astype(int)
    cameras = zone(16, 3.0, -1.4, 1.4), normalised_intrinsics(1.5).repeat(16, 1, 1)
    seen = seen_colours(shared, planes, surface, grid, *cameras).astype(int)
    assert np.abs(seen - colours).mean() < 4 and np.abs(seen - colours).max() < 40
    # One view, from x = 3: what it sees has its own colour.
    front = surface.vertices[:, 0] > 0.4
    one = torch.tensor([[[0, 0, -1.0, 3], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]]])
    seen = seen_colours(shared, planes, surface, grid, one, cameras[1][:1]).astype(int)
    assert np.abs(seen[front] - colours[front]).max() < 12


@pytest.mark.parametrize("file_format", ["glb", "ply"])
def test_a_file_has_world_scale_axes_and_colours(ball, tmp_path, file_format):
    """A measured box that is no cube and not around the origin makes the ball an ellipsoid, each axis another."""
    shared, planes = measured(ball[0]), ball[1]
    shared.renderer.box.corners.copy_(torch.tensor([[-0.4, -0.2, 0.1], [0.4, 0.4, 0.5]]))
    make_ball(shared)
    surface = find_surface(density_grid(shared, planes, 65), LEVEL)
    low, high = np.array([-0.2, -0.05, 0.2]), np.array([0.2, 0.25, 0.4])
    middle, half = np.array([0, 0.1, 0.3]), np.array([0.4, 0.3, 0.2])
    np.testing.assert_allclose(surface.vertices.min(0), low, atol=0.002)
    np.testing.assert_allclose(surface.vertices.max(0), high, atol=0.002)

    path = tmp_path / f"ball.{file_format}"
    path.write_bytes(mesh_bytes(surface, colours_at((surface.vertices - middle) / half), file_format))
    read = trimesh.load_mesh(path, process=False, **({"skip_materials": True} if file_format == "glb" else {}))
    assert read.is_watertight and read.volume > 0
    if file_format == "glb":  # y up: world x, z, −y
        expected = np.array([[low[0], low[2], -high[1]], [high[0], high[2], -low[1]]])
        found, back = to_srgb(glb_colours(path.read_bytes())[:, :3]), read.vertices[:, [0, 2, 1]] * [1, -1, 1]
    else:
        expected = np.array([low, high])
        found, back = read.visual.vertex_colors[:, :3], read.vertices
    np.testing.assert_allclose(read.bounds, expected, atol=0.002)
    np.testing.assert_allclose(found.astype(float), colours_at((back - middle) / half).astype(float), atol=6)


def glb_colours(data: bytes) -> np.ndarray:
    """COLOR_0 of a GLB by its own words, as trimesh's reader takes it for 8 bits. [N, 4], 0 to 65535."""
    length = struct.unpack("<I", data[12:16])[0]
    tree, binary = json.loads(data[20 : 20 + length]), data[20 + length + 8 :]
    accessor = tree["accessors"][tree["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]]
    view = tree["bufferViews"][accessor["bufferView"]]
    start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
    return np.frombuffer(binary, "<u2", accessor["count"] * 4, start).reshape(-1, 4)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    values = linear / 65535
    return 255 * np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def test_colours_survive_linear_light():
    levels = np.arange(256, dtype=np.uint8)
    back = to_srgb(to_linear(levels)) - levels
    assert np.abs(back).max() < 0.5, "all 256 values come back"


def test_a_glb_is_unlit(ball):
    shared, planes = ball
    surface = find_surface(density_grid(shared, planes, 16), LEVEL)
    data = mesh_bytes(surface, colours_at(surface.vertices), "glb")
    magic, version, length, json_length, kind = struct.unpack("<4sIII4s", data[:20])
    assert (magic, version, length, kind) == (b"glTF", 2, len(data), b"JSON")
    tree = json.loads(data[20 : 20 + json_length])
    [primitive] = tree["meshes"][0]["primitives"]
    assert set(primitive["attributes"]) == {"POSITION", "COLOR_0"}
    accessor = tree["accessors"][primitive["attributes"]["COLOR_0"]]
    assert (accessor["componentType"], accessor["type"], accessor["normalized"]) == (5123, "VEC4", True)  # 16 bits
    assert "KHR_materials_unlit" in tree["materials"][primitive["material"]]["extensions"]
    assert tree["extensionsUsed"] == ["KHR_materials_unlit"]


def test_cells_that_nothing_fills_are_empty(ball):
    half, planes = measured(ball[0]), ball[1]
    make_ball(half)
    half.renderer.box.filled[24:] = False  # x above the middle
    surface = find_surface(density_grid(half, planes, 33), LEVEL)
    assert trimesh.Trimesh(surface.vertices, surface.faces, process=False).is_watertight
    assert surface.vertices[:, 0].max() < 0.01 and surface.vertices[:, 0].min() < -0.35


def test_cells_outside_of_a_scenes_hull_are_empty(ball):
    shared, planes = ball
    hull = torch.ones(CELLS, CELLS, CELLS, dtype=torch.bool)
    hull[:, CELLS // 2 :] = False  # y above the middle
    surface = find_surface(density_grid(shared, planes, 33, hull.view(-1)), LEVEL)
    assert surface.vertices[:, 1].max() < 0.05 and surface.vertices[:, 1].min() < -0.45
    cameras = zone(12, 3.0, -1.4, 1.4), normalised_intrinsics(1.0).repeat(12, 1, 1)
    grid = density_grid(shared, planes, 65, hull.view(-1))
    colours = seen_colours(shared, planes, surface, grid, *cameras, hull.view(-1))
    expected = colours_at(surface.vertices).astype(int)
    assert np.abs(colours.astype(int) - expected).mean() < 8, "the cut face has colours, too"


def test_nothing_dense_is_no_surface(ball):
    shared, planes = ball
    shared.field.head.bias[0] -= 10_000
    grid = density_grid(shared, planes, 16)
    with pytest.raises(NoSurface, match="no ray around it is more than 0% opaque"):
        outline_level(shared, planes, grid, zone(4, 3.0, -1.4, 1.4), normalised_intrinsics(1.0).repeat(4, 1, 1))
    with pytest.raises(NoSurface, match="the surface would be at 3"):
        find_surface(grid, LEVEL)


def test_specks_are_left_out():
    raw = torch.full((20, 20, 20), -5.0)
    raw[4:14, 4:14, 4:14] = 5.0
    raw[17, 17, 17] = 5.0  # a thousandth of the cube
    surface = find_surface(DensityGrid(raw, torch.tensor([[0.0] * 3, [19.0] * 3])), 0.0)
    np.testing.assert_allclose([surface.vertices.min(), surface.vertices.max()], [3.5, 13.5])


def test_the_command_keeps_what_is_done_and_lists_what_has_no_surface(fitted_run, tmp_path, monkeypatch, capsys):
    """Fits of a few steps: their densities are made a ball's, and those of one scene nothing's."""
    from scaling.export import meshes

    density, made = meshes.density_grid, []

    def ball_or_nothing(shared, planes, num_points, hull):
        assert hull.shape == (CELLS**3,)
        grid = density(shared, planes, num_points, hull)
        axes = [torch.linspace(-1, 1, count) for count in grid.raw.shape]
        square = sum(axis**2 for axis in torch.meshgrid(*axes, indexing="ij"))
        made.append(planes)
        return DensityGrid(100 * (0.25 - square - 9 * (len(made) == 2)), grid.bounds)

    monkeypatch.setattr(meshes, "density_grid", ball_or_nothing)
    monkeypatch.setattr(meshes, "outline_level", lambda *arguments: 0.0)
    arguments = ("--run", fitted_run.path, "--what", "mesh", "--out", tmp_path / "out", "--points", 24)
    assert export_main(monkeypatch, *arguments) == 0
    said = capsys.readouterr().out
    assert "1 meshes" in said and "has none: its raw density is at most" in said
    [path] = (tmp_path / "out").glob("*.glb")
    about = json.loads(path.with_name(f"{path.name}.json").read_text())
    mesh = trimesh.load_mesh(path, skip_materials=True, process=False)
    assert mesh.is_watertight and about["scene_id"] == path.stem and about["up"] == "y"
    assert (about["vertices"], about["faces"]) == (len(mesh.vertices), len(mesh.faces))
    before = path.stat().st_ino
    assert export_main(monkeypatch, *arguments) == 0
    assert "2 meshes" in capsys.readouterr().out
    assert path.stat().st_ino == before and len(made) == 3, "the other one alone was made again"
    assert export_main(monkeypatch, *arguments, "--format", "ply") == 0
    assert len(list((tmp_path / "out").glob("*.ply"))) == 2 and path.stat().st_ino == before
