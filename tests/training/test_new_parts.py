"""A scene with a part that no scene of stage 1 has is learned; what of it lies outside of the box is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cuboids import cameras, cuboid_views, hits, row_of

from scaling.cameras import pixel_rays
from scaling.config import Settings, make_settings
from scaling.data.scene_views import SceneViews, views_from_row
from scaling.data.store_writer import StoreWriter
from scaling.data.stores import StoreSource
from scaling.training.evaluate import render_views
from scaling.training.fit_frozen import fit_scenes
from scaling.training.measure.box import NO_BACKGROUND, NO_OBJECT, source_bounds
from scaling.training.measure.visual_hull import silhouettes
from scaling.training.process_group import Workers
from scaling.training.stage1 import Stage1
from scaling.training.training_scene import outside_box, prepare_scene

SIZE = 32
BODY = torch.tensor([-0.35, -0.15, -0.2]), torch.tensor([0.35, 0.15, 0.0])
OTHER = torch.tensor([-0.3, -0.2, -0.2]), torch.tensor([0.3, 0.2, -0.05])
FIN = torch.tensor([-0.35, -0.08, 0.0]), torch.tensor([-0.15, 0.08, 0.35])  # half as high again as all of the body

VALUES: dict[str, Any] = {
    "data": {"image_size": SIZE},
    "representation": {
        "micro_features": 4, "macro_features": 4, "num_base_planes": 2, "resolution": 16, "field_width": 16,
    },
    "rendering": {"samples": 16},
    "autoencoder": {"kind": "super_resolution", "shrink": 1, "decoder_blocks": 0},
    "stage1": {
        "warmup": {"num_epochs": 2, "steps_per_epoch": 60, "items_per_step": 2, "rays_per_item": 128},
        **{name: {"num_epochs": 0} for name in ("joint", "adapt", "distil")},
        "num_buckets": 2,
    },
    "stage2": {
        "latent": {"num_epochs": 1, "steps_per_epoch": 200, "rays_per_item": 128, "check_every": None},
        "rgb": {"num_epochs": 0},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def settings() -> Settings:
    return make_settings(VALUES)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> StoreSource:
    """Two bodies, and a third with a fin."""
    path: Path = tmp_path_factory.mktemp("store")
    scenes = {"body": [BODY], "other": [OTHER], "finned": [BODY, FIN]}
    with StoreWriter(path, "made") as writer:
        for scene_id, cuboids in scenes.items():
            writer.add(row_of(cuboid_views(cuboids, size=128, num_views=16, scene_id=scene_id)))
    return StoreSource(path)


def views_of(store: StoreSource) -> list[SceneViews]:
    return [views_from_row(row, SIZE) for row in store.rows()]


def trained(settings: Settings, scenes: list[SceneViews], bounds: torch.Tensor) -> Stage1:
    stage1 = Stage1(settings, [views.scene_id for views in scenes], scenes, bounds=bounds)
    stage1.run(lambda report: None)
    return stage1


def fin_pixels(num_views: int = 16) -> torch.Tensor:
    """Pixels [V, H, W] that show the fin and nothing of the body, by their middles."""
    cam2world, intrinsics = cameras(num_views)
    rays = pixel_rays(cam2world, intrinsics, SIZE, SIZE)
    fin, body = (hits(rays, *cuboid)[0] for cuboid in (FIN, BODY))
    return (fin & ~body).view(num_views, SIZE, SIZE)


@pytest.mark.slow
def test_a_part_that_no_scene_of_stage_1_has_is_in_the_render(settings, store):
    scenes = views_of(store)
    bounds = source_bounds(store, Workers())
    assert bounds is not None and 0.35 <= bounds[1, 2] < 0.45, "around all of the store, not of stage 1's scenes alone"
    shared = trained(settings, scenes[:2], bounds).shared.requires_grad_(False)
    [fitted] = fit_scenes(shared, scenes[2:], settings)
    assert not fitted.warning
    new = cuboid_views([BODY, FIN], SIZE, num_views=19)  # from where it was never seen
    views = [8, 10, 13, 16]
    found = render_views(shared, fitted.params[None], new.cam2world[views], new.intrinsics[views])["images"].mean(1)
    shown = fin_pixels(19)[views]
    assert shown.flatten(1).sum(1).min() > 10
    assert found[shown].mean() < 0.25, "black before white"
    assert found[new.images[views].mean(1) > 0.99].mean() > 0.95


def test_what_lies_outside_of_the_box_is_told(settings, store):
    """Without the store's bounds the box is around stage 1's scenes, and most of the fin is above it."""
    scenes = views_of(store)
    shared = Stage1(settings, ["body", "other"], scenes[:2]).shared.requires_grad_(False)
    shown = silhouettes(scenes[2])
    outside = outside_box(shared, scenes[2], shown)
    by_hand = (fin_pixels()[1:] & shown).sum() / shown.sum()
    assert 0.3 * by_hand < outside <= by_hand, (
        "what is left of the fin beside the body, less what is behind or in the box"
    )
    told = prepare_scene(shared, scenes[2]).warning
    assert told.startswith(f"scene finned: {outside:.0%} of what its views show lies outside of the box from [")
    assert "prepare the store with this scene in it, or train the shared model on a store that holds this scene" in told
    assert [prepare_scene(shared, views).warning for views in scenes[:2]] == ["", ""]
    short = settings.model_copy(update={"stage2": settings.stage2.model_copy(update={"latent": short_phase(settings)})})
    assert [scene.warning for scene in fit_scenes(shared, scenes, short)] == ["", "", told]


def short_phase(settings: Settings) -> Any:
    return settings.stage2.latent.model_copy(update={"steps_per_epoch": 1})


def test_a_scene_that_nothing_was_carved_of_is_told(settings, store):
    scenes = views_of(store)
    shared = Stage1(settings, ["body", "other"], scenes[:2]).shared.requires_grad_(False)
    noise = torch.rand(scenes[0].images.shape, generator=torch.Generator().manual_seed(0)) * 0.9
    for images, why in ((noise, NO_BACKGROUND), (torch.ones_like(noise), NO_OBJECT)):
        told = prepare_scene(shared, replace(scenes[0], images=images)).warning
        assert told == f"scene body: {why}, so nothing could be carved: all of the box is sampled"
