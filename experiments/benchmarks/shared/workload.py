"""What step.py, memory.py, encode.py and gpu_fit.py work on: models with random weights and scenes of random pictures.

Times do not depend on what the pictures show. They do depend on where rays find something to sample, so boxes and
cameras are those of embedded cars.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from scaling.cameras import normalised_intrinsics
from scaling.cli import read_preset
from scaling.config import Settings, make_settings, merge
from scaling.data.embedded.scenes import FOCAL, embedded_cameras, embedded_ids, embedded_scene
from scaling.data.scene_views import SceneViews, default_test_views
from scaling.models.autoencoders.base import ImageAutoencoder
from scaling.models.box import UNMEASURED
from scaling.models.shared_model import SharedModel
from scaling.training.measure.box import set_box
from scaling.training.process_group import Workers
from scaling.training.random_streams import stream
from scaling.training.training_scene import EncodedScene, ready_scene

SMALL = {"autoencoder": {"pretrained": None}}  # from scratch: in preset sd 8 times smaller a side, 4 channels


def preset_settings(preset: str, **over: Any) -> Settings:
    """A preset with the small autoencoder. over: sections that override it."""
    return make_settings(merge(merge(read_preset(preset), SMALL), over))


def untrained_model(
    settings: Settings, autoencoder: ImageAutoencoder | None = None, device: torch.device | str = "cpu"
) -> SharedModel:
    """A frozen shared model as stage 1 leaves it, with an adapted decoder and a student, but with random weights."""
    torch.manual_seed(0)
    shared = SharedModel(settings, autoencoder)
    if shared.autoencoder.has_decoder:
        shared.adapt_decoder()
        shared.add_student()
    cars = [embedded_scene(scene_id, settings.data.image_size, 8) for scene_id in embedded_ids(2)]
    set_box(shared.renderer.box, None, cars, shared.latent_size, Workers())
    return shared.to(device).requires_grad_(False).eval()


def random_scene(scene_id: str, image_size: int, num_views: int) -> SceneViews:
    """A scene of noise, seen by the cameras of an embedded car."""
    images = torch.rand(num_views, 3, image_size, image_size, generator=stream(0, "pictures", scene_id))
    intrinsics = normalised_intrinsics(FOCAL).repeat(num_views, 1, 1)
    cam2world = embedded_cameras(scene_id, num_views)
    return SceneViews(scene_id, "noise", images, cam2world, intrinsics, default_test_views(num_views))


def everywhere() -> torch.Tensor:
    """Bounds [2, 3] of scenes of noise, whose views do not tell where they are."""
    return torch.tensor(UNMEASURED)


def random_scenes(count: int, settings: Settings, num_views: int | None = None) -> list[SceneViews]:
    """`count` scenes of noise in the settings' image size. num_views None: as many as an embedded car has."""
    views = num_views or settings.data.embedded_views
    return [random_scene(f"noise-{number:05d}", settings.data.image_size, views) for number in range(count)]


def ready_scenes(shared: SharedModel, count: int, num_views: int | None = None) -> list[EncodedScene]:
    """Scenes that are ready for a step: one is encoded, and all are copies of it with memory of their own."""
    scene = ready_scene(shared, random_scenes(1, shared.settings, num_views)[0])
    return [copy.deepcopy(scene) for _ in range(count)]
