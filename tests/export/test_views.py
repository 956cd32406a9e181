"""Exported views: nerfstudio's layout, read back by json and PIL, and by this program's own readers."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.export import export_main
from PIL import Image

import scaling
from scaling.cameras import orbit, pixel_rays, zone
from scaling.data.embedded.scenes import embedded_scene
from scaling.data.png import decode_png
from scaling.data.readers import nerfstudio
from scaling.export import views as module
from scaling.export.views import transforms
from scaling.library.run_folder import RunFolder
from scaling.library.true_views import stored_views
from scaling.library.viewpoints import NOTED, Viewpoints, note_viewpoints, run_viewpoints
from scaling.pictures.draw import to_pixels


@pytest.fixture
def exported(fitted_run, tmp_path, monkeypatch) -> Path:
    """Six views of each scene."""
    arguments = ("--run", fitted_run.path, "--what", "views", "--out", tmp_path / "out", "--num-views", 6)
    assert export_main(monkeypatch, *arguments) == 0
    return tmp_path / "out"


def test_images_and_cameras_are_those_of_the_renderer(fitted_run, exported):
    """json and PIL, with nerfstudio's own arithmetic: OpenGL rays through pixel centres."""
    library = scaling.load_library(fitted_run.path)
    for scene_id in library.ids():
        told = json.loads((exported / scene_id / "transforms.json").read_text())
        assert told["camera_model"] == "PINHOLE" and (told["w"], told["h"]) == (16, 16) and len(told["frames"]) == 6
        gl = np.array([frame["transform_matrix"] for frame in told["frames"]])
        cv = gl @ np.diag([1.0, -1, -1, 1])
        camera = np.array([[told["fl_x"], 0, told["cx"]], [0, told["fl_y"], told["cy"]], [0, 0, 16]]) / 16
        images = to_pixels(library[scene_id].render(cv.astype(np.float32), camera.astype(np.float32)))
        for frame, pixels in zip(told["frames"], images):
            assert (np.asarray(Image.open(exported / scene_id / frame["file_path"])) == pixels).all()
        # nerfstudio: direction of pixel (i, j) is ((j + ½ − cx) / fx, −(i + ½ − cy) / fy, −1) in camera axes
        i, j = 3, 12
        direction = np.array([(j + 0.5 - told["cx"]) / told["fl_x"], -(i + 0.5 - told["cy"]) / told["fl_y"], -1])
        direction = gl[2, :3, :3] @ direction / np.linalg.norm(direction)
        ours = pixel_rays(torch.from_numpy(cv[2:3]), torch.from_numpy(camera[None]), 16, 16)
        np.testing.assert_allclose(ours.directions[0, i * 16 + j], direction, atol=1e-12)
        np.testing.assert_allclose(ours.origins[0, 0], gl[2, :3, 3])


def test_our_readers_get_the_same_cameras_bit_by_bit(fitted_run, exported):
    run_views = embedded_scene("car-00002", 16, 5)
    assert nerfstudio.fits(exported)
    refs = nerfstudio.list_scenes(exported)
    assert [ref.scene_id for ref in refs] == ["car-00002", "car-00003"]
    first = fitted_run.library.scene(fitted_run.library.ids()[0])
    shared = scaling.load_library(fitted_run.path)[first["scene_id"]].shared
    cam2world, intrinsics = Viewpoints.of(
        stored_views(fitted_run, first["scene_id"], first["stage"], shared.settings.data)
    ).cameras("sphere", 6)
    for ref in refs:
        row = nerfstudio.read_scene(ref)
        assert (row["cam2world"].reshape(-1, 4, 4) == cam2world.numpy()).all()
        assert (row["intrinsics"].reshape(-1, 3, 3) == intrinsics.numpy()).all()
        assert decode_png(row["views"][0]).shape == (16, 16, 3)
    heights = [math.asin(pose[2, 3] / pose[:3, 3].norm()) for pose in run_views.cam2world]
    assert len(heights) == 5 and cam2world.shape == (6, 4, 4)


def test_transforms_by_hand():
    """A camera at x = 2 that looks at the origin: OpenCV axes right = y, down = −z, forward = −x."""
    pose = orbit(1, 2.0, 0.0)
    told = transforms(pose, torch.tensor([[[1.5, 0, 0.5], [0, 1.25, 0.25], [0, 0, 1]]]), 64)
    assert (told["fl_x"], told["fl_y"], told["cx"], told["cy"]) == (96.0, 80.0, 32.0, 16.0)
    [frame] = told["frames"]
    matrix = np.array(frame["transform_matrix"])  # OpenGL: right, up, backward
    np.testing.assert_allclose(matrix, [[0, 0, 1, 2], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], atol=1e-6)


def test_cameras_stay_where_the_scene_was_seen_from():
    views = embedded_scene("car-00000", 16, 30)
    seen = Viewpoints.of(views)
    assert seen.radius == pytest.approx(1.3, abs=1e-4) and 5 <= math.degrees(seen.lowest) < 15
    for path, lowest, highest in (("sphere", seen.lowest, seen.highest), ("ring", seen.middle, seen.middle)):
        cam2world, intrinsics = seen.cameras(path, 40)
        position = cam2world[:, :3, 3]
        elevation = (position[:, 2] / seen.radius).asin()
        assert elevation.min() >= lowest - 1e-4 and elevation.max() <= highest + 1e-4
        assert intrinsics.shape == (40, 3, 3) and intrinsics[0, 0, 0] == views.intrinsics[0, 0, 0]
    whole = zone(2000, 1.0, -math.pi / 2, math.pi / 2)[:, :3, 3]
    assert whole.mean(0).abs().max() < 0.01 and torch.allclose((whole**2).mean(0), torch.tensor(1 / 3), atol=0.01)


def test_a_run_notes_its_viewpoints_as_its_store_may_be_gone(fitted_run, tiny_settings, tmp_path):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(fitted_run.path, run.path)
    run.write_config("stage2", tiny_settings, {"store": str(tmp_path / "gone")})
    row = run.library.scene(run.library.ids()[0])
    where = row["scene_id"], row["stage"], tiny_settings.data
    with pytest.raises(FileNotFoundError, match=r"gone holds no complete scene store .* or give --store STORE"):
        run_viewpoints(run, *where, None)
    note_viewpoints(run, embedded_scene("car-00000", 16, 5))
    assert run_viewpoints(run, *where, None) == Viewpoints.of(embedded_scene("car-00000", 16, 5))
    assert run_viewpoints(run, *where, "embedded") == Viewpoints.of(embedded_scene(row["scene_id"], 16, 5))
    for radius, focal in (("1e999", 1), ("0", 1), ("-1", 1), ("1", 0), ("1e300", 1)):
        numbers = f'{{"radius": {radius}, "focal": {focal}, "lowest": 0, "middle": 0, "highest": 0}}'
        (run.path / NOTED).write_text(numbers)
        with pytest.raises(ValueError, match=r"viewpoints\.json: .*; give --store STORE"):
            run_viewpoints(run, *where, None)


def test_scenes_off_the_origin_are_seen_around_their_centre():
    views = embedded_scene("car-00000", 16, 30)
    cam2world = views.cam2world.clone()
    cam2world[:, :3, 3] = 10 * cam2world[:, :3, 3] + torch.tensor([7.0, 0.0, -3.0])
    seen = Viewpoints.of(replace(views, cam2world=cam2world))
    assert seen.radius == pytest.approx(13, abs=1e-3) and seen.centre == pytest.approx((7.0, 0.0, -3.0), abs=1e-3)
    poses, _ = seen.cameras("ring", 4)
    assert (poses[:, :3, 3] - torch.tensor(seen.centre)).norm(dim=1).tolist() == pytest.approx([13.0] * 4, abs=1e-3)


def test_what_is_whole_is_kept_and_the_rest_made_again(fitted_run, exported, monkeypatch):
    arguments = ("--run", fitted_run.path, "--what", "views", "--out", exported, "--num-views")
    kept, torn = exported / "car-00002", exported / "car-00003"
    (torn / "transforms.json").unlink()  # it was killed there
    before = (kept / "images" / "00000.png").stat().st_ino
    assert export_main(monkeypatch, *arguments, 6) == 0
    assert (torn / "transforms.json").is_file()
    assert (kept / "images" / "00000.png").stat().st_ino == before
    assert export_main(monkeypatch, *arguments, 4, "--path", "ring") == 0
    assert (
        len(list((kept / "images").iterdir())) == len(json.loads((kept / "transforms.json").read_text())["frames"]) == 4
    )

    monkeypatch.setattr(module, "encode_png", lambda image: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        module.export_views(fitted_run, exported, None, "sphere", 5)
    assert len(list(exported.glob("*/transforms.json"))) == 1, "a scene that was begun is not whole"


def test_a_store_that_is_gone_is_named(fitted_run, tmp_path, monkeypatch, capsys):
    noted = fitted_run.read_config()
    noted["stage2"]["job"]["store"] = str(tmp_path / "gone")
    monkeypatch.setattr(type(fitted_run), "read_config", lambda self: noted)
    assert export_main(monkeypatch, "--run", fitted_run.path, "--what", "views", "--out", tmp_path) == 1
    assert str(tmp_path / "gone") in capsys.readouterr().err
