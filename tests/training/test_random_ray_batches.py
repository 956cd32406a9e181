"""The table of rays against the scenes that it was made of."""

from __future__ import annotations

import pytest
import torch

from scaling.cameras import pixel_rays
from scaling.models.shared_model import SharedModel
from scaling.training.random_ray_batches import STEPS_PER_DRAW, RayTable
from scaling.training.training_scene import EncodedScene, encode_scene, prepare_scene


@pytest.fixture(scope="module")
def shared(tiny_settings) -> SharedModel:
    torch.manual_seed(0)
    return SharedModel(tiny_settings).requires_grad_(False)


@pytest.fixture(scope="module")
def scenes(shared, tiny_scenes) -> list[EncodedScene]:
    """Two scenes with different numbers of rays to draw from."""
    ready = [encode_scene(shared, prepare_scene(shared, views)) for views in tiny_scenes[:2]]
    ready[1].drawn = ready[1].drawn[5:25:2]
    return ready


def test_a_batch_is_what_the_scenes_hold(shared, scenes):
    table = RayTable(shared, scenes)
    uniforms = torch.rand(2, 7, 1 + shared.renderer.uniforms_per_ray)
    uniforms[1, :3, 0] = torch.tensor([0.0, 0.35, 1 - 2**-24])  # of ten rays: the first, the fourth, the last
    cells = torch.stack([scene.cells for scene in scenes])
    batch = table.batch(uniforms, torch.arange(2), cells)
    for row, scene in enumerate(scenes):
        at = scene.drawn[(uniforms[row, :, 0] * len(scene.drawn)).long().clamp(max=len(scene.drawn) - 1)]
        if row == 1:
            assert at[:3].tolist() == scene.drawn[[0, 3, 9]].tolist()
        size = shared.latent_size
        every = pixel_rays(scene.cam2world, scene.intrinsics, size, size)
        torch.testing.assert_close(batch.rays.origins[row], every.origins.flatten(0, 1)[at], rtol=0, atol=0)
        torch.testing.assert_close(batch.rays.directions[row], every.directions.flatten(0, 1)[at])
        torch.testing.assert_close(batch.latents[row], scene.latents[at], rtol=0, atol=0)
        assert batch.pixels[row].tolist() == (at % shared.latent_size**2).tolist()
    assert torch.equal(batch.uniforms, uniforms[..., 1:]) and batch.cells is cells


def test_what_a_scene_gets_depends_on_its_stream_alone(shared, scenes):
    steps = STEPS_PER_DRAW + 2
    generators = [lambda: torch.Generator().manual_seed(0), lambda: torch.Generator().manual_seed(1)]
    table = RayTable(shared, scenes)
    together = list(table.draws([make() for make in generators], 3, steps))
    assert [(first, numbers.shape[1]) for first, numbers in together] == [(0, STEPS_PER_DRAW), (STEPS_PER_DRAW, 2)]
    assert not torch.equal(together[0][1][0], together[0][1][1])
    for row, make in enumerate(generators):
        alone = RayTable(shared, scenes[row : row + 1])
        for (_, numbers), (_, of_both) in zip(alone.draws([make()], 3, steps), together, strict=True):
            assert torch.equal(numbers[0], of_both[row])
        uniforms = numbers[:, 0]
        found = table.batch(uniforms, torch.tensor([row]), None)
        assert torch.equal(found.latents, alone.batch(uniforms, torch.tensor([0]), None).latents)


def test_every_ray_of_the_table(shared, scenes):
    table, rows = RayTable(shared, scenes), torch.tensor([1, 0])
    batch, real = table.every_ray(rows, None), table.real(rows)
    assert real.sum(1).tolist() == [10, len(scenes[0].drawn)]
    torch.testing.assert_close(batch.latents[0][real[0]], scenes[1].latents[scenes[1].drawn], rtol=0, atol=0)
    assert batch.pixels[1].tolist() == (scenes[0].drawn % shared.latent_size**2).tolist()
