"""The Python API: a library as tensors, renders from arrays, and one scene fitted in one call."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_run import make_run, train_shared

import scaling
from scaling.api.arrays import cameras_from_arrays, views_from_arrays
from scaling.api.scenes import Scene
from scaling.config import SettingsError, make_settings, merge
from scaling.data.embedded.scenes import embedded_ids, embedded_scene
from scaling.library.cohorts import commit_cohort
from scaling.library.parts import commit_part
from scaling.library.row_schema import METRICS
from scaling.library.run_folder import RunFolder
from scaling.library.scene_row import NotFinite
from scaling.models.shared_files import SharedModelError, load_shared
from scaling.models.triplanes import fuse_planes
from scaling.training.evaluate import evaluate_scene, render_views
from scaling.training.fit_frozen import fit_scenes


@pytest.fixture(scope="module")
def run(tiny_settings, tmp_path_factory) -> RunFolder:
    """Cars 2 to 6 in parts of two, on the shared model of cars 0 and 1."""
    scenes = [embedded_scene(scene_id, 16, 5) for scene_id in embedded_ids(7)]
    return make_run(tmp_path_factory.mktemp("runs") / "cars", tiny_settings, scenes)


def test_importing_the_package_loads_nothing_heavy():
    program = "import sys, scaling; assert not {'torch', 'numpy', 'pyarrow', 'ray', 'mlflow'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'fit_scenes'"):
        _ = scaling.fit_scenes


# ---------------------------------------------------------------------- a library


def test_a_library_by_id(run):
    library = scaling.load_library(run.path)
    ids = [f"car-{number:05d}" for number in range(2, 7)]
    assert len(library) == 5 and sorted(library) == sorted(library.ids(stage=2)) == ids and not library.ids(stage=1)
    assert "car-00003" in library and "car-00000" not in library
    scene = library["car-00003"]
    assert (scene.scene_id, scene.stage, scene.category) == ("car-00003", 2, run.library.scene("car-00003")["category"])
    assert scene.micro_planes.shape == (3, 2, 4, 4) and scene.coefs.shape == (2,) and scene.seconds > 0
    assert set(scene.metrics) == set(METRICS) and 0 < scene.metrics["psnr"] < 60
    with pytest.raises(LookupError, match="no scene 'car-00099'"):
        library["car-00099"]


def test_tri_planes_come_once_a_scene_and_fused(run):
    library = scaling.load_library(run.path)
    planes = dict(library.tri_planes())
    assert sorted(planes) == sorted(library.ids())
    scene = library["car-00004"]
    base_planes = load_shared(run.shared)[0].base_planes
    by_hand = fuse_planes(scene.micro_planes[None], scene.coefs[None], base_planes)[0]
    assert torch.equal(planes["car-00004"], by_hand) and by_hand.shape == (3, 5, 4, 4)
    assert not by_hand.requires_grad


def test_scenes_share_one_model_in_memory(run):
    assert len({id(scene.shared) for scene in scaling.load_library(run.path).scenes()}) == 1


def test_a_render_is_that_of_the_experiments(run, tiny_scenes):
    scene, views = scaling.load_library(run.path)["car-00003"], tiny_scenes[3]
    expected = render_views(scene.shared, scene.params, views.cam2world, views.intrinsics)["images"]
    assert torch.equal(scene.render(views.cam2world, views.intrinsics), expected)
    from_numpy = scene.render(views.cam2world.double().numpy(), views.intrinsics[0].tolist())
    torch.testing.assert_close(from_numpy, expected)
    assert expected.shape == (5, 3, 16, 16) and expected.min() >= 0 and expected.max() <= 1


def test_a_library_on_another_runs_shared_model(run, tmp_path, tiny_settings):
    other = RunFolder(tmp_path / "other")
    other.write_config("stage2", tiny_settings, {"shared": str(run.shared)})
    other.path.joinpath("library").symlink_to(run.path / "library")
    assert scaling.load_library(str(other.path))["car-00002"].shared.base_planes.shape == (2, 3, 3, 4, 4)
    (other.path / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"car-00002 was fitted on shared model .* not found in"):
        scaling.load_library(other.path)["car-00002"]


def test_a_scene_of_a_cohort_stands_on_the_cohorts_model(run, tmp_path, tiny_settings, tiny_scenes):
    shared, shared_hash = load_shared(run.shared)
    other = RunFolder(tmp_path / "other")
    other.write_config("stage2", tiny_settings, {"shared": str(run.shared)})
    tuned = {"base_planes": shared.base_planes + 1}
    cohort = commit_cohort(other.library.folder, tuned, shared_hash, ["car-00002"])
    commit_part(other.library.folder, [run.library.scene("car-00002") | {"cohort": cohort}])
    own, common = scaling.load_library(other.path)["car-00002"], scaling.load_library(run.path)["car-00002"]
    torch.testing.assert_close(own.tri_planes[:, 2:], common.tri_planes[:, 2:] + common.coefs.sum())
    cameras = tiny_scenes[2].cam2world, tiny_scenes[2].intrinsics
    assert not torch.equal(own.render(*cameras), common.render(*cameras))


def test_a_folder_without_a_library_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no fitted scenes here .* experiments/stage2.py --run"):
        scaling.load_library(tmp_path / "nowhere")


# ---------------------------------------------------------------------- one new scene


def test_a_fit_from_arrays_is_that_of_stage_2(run, tiny_settings, tiny_scenes):
    views = tiny_scenes[2]
    shared = load_shared(run.shared)[0]
    [expected] = fit_scenes(shared, [views], tiny_settings)
    pixels = (views.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for images in (views.images, pixels):
        scene = scaling.fit_scene(
            run.shared, images, views.cam2world, views.intrinsics, scene_id="car-00002", test_views=views.test_views
        )
        assert torch.equal(scene.micro_planes, expected.params.micro_planes)
        assert torch.equal(scene.coefs, expected.params.coefs)
        assert scene.metrics == evaluate_scene(shared, expected.params[None], views)
    assert scene.render(views.cam2world, views.intrinsics).shape == views.images.shape


def test_without_test_views_all_views_train_and_nothing_is_measured(run, tiny_scenes):
    views = tiny_scenes[2]
    arrays = (views.images.numpy(), views.cam2world.numpy(), views.intrinsics[0].numpy())
    scene = scaling.fit_scene(str(run.shared), *arrays)
    assert scene.metrics == dict.fromkeys(METRICS)
    assert views_from_arrays(*arrays, "scene", (), 16).train_views == (0, 1, 2, 3, 4)


def fit(run: RunFolder, views: Any, settings: dict[str, Any]) -> Scene:
    return scaling.fit_scene(run.shared, views.images, views.cam2world, views.intrinsics, settings=settings)


def test_settings_of_a_fit(run, tiny_scenes):
    still = {"stage2": {"latent": {"num_epochs": 0}, "rgb": {"num_epochs": 0}}}
    scene = fit(run, tiny_scenes[2], still)
    assert not scene.micro_planes.any() and torch.equal(scene.coefs, scene.shared.coefs_mean)
    with pytest.raises(SettingsError, match=r"data.image_size = 8 \(shared model: 16\)"):
        fit(run, tiny_scenes[2], {"data": {"image_size": 8}})
    with pytest.raises(SettingsError, match=r"stage2.latents: unknown key"):
        fit(run, tiny_scenes[2], {"stage2": {"latents": {}}})
    with pytest.raises(SettingsError, match=r"stage2.mode is cohort"):
        fit(run, tiny_scenes[2], {"stage2": {"mode": "cohort"}})


def test_a_diverged_fit_is_refused(run, tiny_scenes):
    with pytest.raises(NotFinite, match="the fit diverged"):
        fit(run, tiny_scenes[2], {"stage2": {"latent": {"lr": {"micro_planes": 3e38, "coefs": 3e38}}}})


def test_a_fit_needs_a_shared_model(tmp_path, tiny_scenes):
    with pytest.raises(SharedModelError, match="no shared model here"):
        fit(RunFolder(tmp_path), tiny_scenes[2], {})


def test_rgb_space(tiny_values, tiny_scenes, tmp_path):
    rgb: dict[str, Any] = {
        "autoencoder": {"kind": "super_resolution", "shrink": 1, "decoder_blocks": 0},
        "stage1": {},
        "stage2": {"rgb": {"num_epochs": 0}},
    }
    rgb["stage1"] = {"joint": {"num_epochs": 0}, "adapt": {"num_epochs": 0}, "distil": {"num_epochs": 0}}
    settings = make_settings(merge(tiny_values, rgb))
    train_shared(settings, tiny_scenes[:2], tmp_path / "shared")
    scene = fit(RunFolder(tmp_path), tiny_scenes[2], {})
    assert scene.render(tiny_scenes[2].cam2world, tiny_scenes[2].intrinsics).shape == (5, 3, 16, 16)


# ---------------------------------------------------------------------- arrays


def good() -> dict[str, Any]:
    return {
        "images": np.full((4, 16, 16, 3), 200, np.uint8),
        "cam2world": np.tile(np.eye(4), (4, 1, 1)),
        "intrinsics": np.array([[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]),
        "test_views": [],
    }


def test_transparency_is_composited_on_white_and_larger_images_are_averaged():
    images = np.zeros((4, 32, 32, 4), np.uint8)
    images[:, :16, :, 3] = 255  # the upper half is black, the lower half empty
    views = views_from_arrays(**good() | {"images": images}, scene_id="a", image_size=16)
    assert views.images.shape == (4, 3, 16, 16)
    assert not views.images[:, :, :8].any() and (views.images[:, :, 8:] == 1).all()
    assert (views.alpha[:, :8] == 1).all() and not views.alpha[:, 8:].any()
    assert views_from_arrays(**good() | {"images": images[..., :3]}, scene_id="a", image_size=16).alpha is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("images", np.zeros((4, 3, 16, 16), np.uint8), r"images must be uint8 .*got uint8 \[4, 3, 16, 16\]"),
        ("images", np.zeros((4, 16, 16, 3)), r"images must be .*got float64 \[4, 16, 16, 3\]"),
        ("images", np.zeros((16, 16, 3), np.uint8), "images must be"),
        ("images", np.zeros((4, 0, 0, 3), np.uint8), "images must be"),
        ("images", np.full((4, 3, 16, 16), 200.0), r"in \[0, 1\], these go from 200 to 200"),
        ("images", np.full((4, 3, 16, 16), np.nan), r"in \[0, 1\]"),
        ("images", np.zeros((1, 16, 16, 3), np.uint8), "images has 1 view"),
        ("images", [[1], [1, 2]], "images must be an array of numbers"),
        ("images", "views/*.png", "images must be an array of numbers"),
        ("images", np.zeros((3, 16, 16, 3), np.uint8), "3 views, 4 poses and 4 intrinsics"),
        ("cam2world", np.eye(4), r"cam2world must be \[V, 4, 4\].*got \[4, 4\]"),
        ("cam2world", np.zeros((4, 3, 4)), "cam2world must be"),
        ("cam2world", np.zeros((0, 4, 4)), "cam2world must be"),
        ("cam2world", np.tile(np.diag([1.0, 1, -1, 1]), (4, 1, 1)), "view 0: the pose mirrors"),
        ("cam2world", np.tile(np.diag([2.0, 2, 2, 1]), (4, 1, 1)), "view 0: the pose's rotation is not orthonormal"),
        ("intrinsics", np.tile(np.eye(3), (3, 1, 1)), r"intrinsics must be \[3, 3\], or \[4, 3, 3\].*got \[3, 3, 3\]"),
        ("intrinsics", [[120.0, 0, 64], [0, 120, 64], [0, 0, 1]], "looks like pixels: divide"),
        ("intrinsics", -np.eye(3), "view 0: focal lengths must be positive"),
        ("test_views", [7], r"\[7\] must be different view numbers"),
        ("test_views", [0, 1, 2, 3], "all 4 views are test views"),
    ],
)  # fmt: skip
def test_wrong_arrays_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        views_from_arrays(**good() | {name: value}, scene_id="a", image_size=16)


def test_a_bad_scene_id_is_refused():
    with pytest.raises(ValueError, match="bad scene id"):
        views_from_arrays(**good(), scene_id="../car", image_size=16)


def test_cameras_are_broadcast():
    poses, intrinsics = cameras_from_arrays(torch.eye(4).expand(3, 4, 4), torch.eye(3))
    assert poses.shape == (3, 4, 4) and intrinsics.shape == (3, 3, 3)
    assert poses.dtype == intrinsics.dtype == np.float32
