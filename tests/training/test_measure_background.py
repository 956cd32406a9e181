"""The background of every latent pixel: measured where views are white, shown by rays that meet nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scaling.cameras import Rays
from scaling.models.shared_model import SharedModel
from scaling.training.measure.background import PRIOR, common_colour, measure_background
from scaling.training.process_group import Workers
from scaling.training.stage1 import Stage1
from scaling.training.training_scene import prepare_scene

WHITE = torch.ones(3)


@pytest.fixture(scope="module")
def shared(tiny_settings) -> SharedModel:
    torch.manual_seed(0)
    return SharedModel(tiny_settings).requires_grad_(False)


def test_white_views_give_the_latent_of_white(shared, tiny_scenes):
    white = replace(tiny_scenes[0], images=torch.ones_like(tiny_scenes[0].images))
    scene = prepare_scene(shared, white)
    size = shared.settings.data.image_size
    latent = (shared.autoencoder.encode(torch.ones(1, 3, size, size)).flatten(2)[0].T + 1) / 2
    views = scene.num_views
    expected = (views * latent + PRIOR * latent.mean(0)) / (views + PRIOR)
    torch.testing.assert_close(measure_background(shared, [scene], WHITE, Workers()), expected)


def test_without_any_white_it_is_the_mean_latent_of_a_white_image(shared, tiny_scenes):
    black = prepare_scene(shared, replace(tiny_scenes[0], images=torch.zeros_like(tiny_scenes[0].images)))
    expected = shared.autoencoder.background(shared.settings.data.image_size, "cpu")
    found = measure_background(shared, [black], WHITE, Workers())
    torch.testing.assert_close(found, expected.expand_as(found))


def test_one_pixel_that_is_not_white_empties_its_cell(shared, tiny_scenes):
    images = torch.ones_like(tiny_scenes[0].images)
    images[:, 1, 0, 0] = 0.9  # the first cell of every view
    scene = prepare_scene(shared, replace(tiny_scenes[0], images=images))
    found = measure_background(shared, [scene], WHITE, Workers())
    others = found[1:]
    torch.testing.assert_close(found[0], others.mean(0), atol=0.02, rtol=0)  # what is left to it is the prior


def test_a_ray_that_meets_nothing_shows_its_pixel(shared):
    shared.background.copy_(torch.rand(shared.background.shape))
    away = Rays(torch.tensor([[[5.0, 5.0, 5.0]] * 2]), torch.tensor([[[1.0, 0.0, 0.0]] * 2]))
    pixels = torch.tensor([[3, 1]])
    shown = shared.render(shared.start_params(1), away, pixels=pixels).colours
    torch.testing.assert_close(shown[0], 2 * shared.background[[3, 1]] - 1)
    count = len(shared.background)
    views = Rays(away.origins[:, :1].expand(1, 2 * count, 3), away.directions[:, :1].expand(1, 2 * count, 3))
    whole = shared.render(shared.start_params(1), views).colours[0]
    torch.testing.assert_close(whole, 2 * shared.background.repeat(2, 1) - 1)


def test_the_background_is_that_of_most_scenes(tiny_scenes):
    """Two scenes before black and one before white; and none that shows any."""
    black = [replace(views, images=views.images * (views.images < 1)) for views in tiny_scenes[:2]]
    assert common_colour([*black, tiny_scenes[2]], Workers()).tolist() == [0, 0, 0]
    noise = replace(tiny_scenes[0], images=torch.rand(tiny_scenes[0].images.shape) * 0.9)
    assert common_colour([noise], Workers()).tolist() == [1, 1, 1]


def test_rays_that_meet_nothing_show_the_background_that_was_measured(tiny_values, tiny_scenes):
    """Planes of pixels before black: stage 1 measures black, and stage 2 tells of another."""
    from scaling.config import make_settings, merge

    pixels = {"autoencoder": {"kind": "super_resolution", "shrink": 1, "decoder_blocks": 0}}
    stage1 = {"stage1": {name: {"num_epochs": 0} for name in ("joint", "adapt", "distil")}}
    black = [replace(views, images=views.images * (views.images < 1)) for views in tiny_scenes[:2]]
    stage1["stage2"] = {"rgb": {"num_epochs": 0}}
    run = Stage1(make_settings(merge(merge(tiny_values, pixels), stage1)), [v.scene_id for v in black], black)
    assert run.shared.background.tolist() == [0, 0, 0]
    assert prepare_scene(run.shared, black[0]).warning == ""
    assert "its background is rgb(255, 255, 255)" in prepare_scene(run.shared, tiny_scenes[2]).warning
