"""When the scenes of a frozen fit on random rays end."""

from __future__ import annotations

import math

import pytest
import torch

from scaling.config import Rates, Stage2Phase, make_settings, merge
from scaling.data.embedded.scenes import embedded_ids, embedded_scene
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.fit_context import FitContext
from scaling.training.fit_frozen import run_phase
from scaling.training.fit_random_rays import HELD_OUT, LEAST_VIEWS, RAYS_CHECKED, Cells, Ends, _split
from scaling.training.training_scene import EncodedScene, encode_scene, prepare_scene


@pytest.fixture(scope="module")
def shared(tiny_values) -> SharedModel:
    torch.manual_seed(0)
    values = {
        "representation": {"base_std": 0.5, "combine": "sum", "field_layers": 1},  # a deeper random field hears little
        "autoencoder": {"kind": "super_resolution", "shrink": 1, "decoder_blocks": 0},
        "stage1": {name: {"num_epochs": 0} for name in ("joint", "adapt", "distil")},
        "stage2": {"rgb": {"num_epochs": 0}},
    }
    shared = SharedModel(make_settings(merge(tiny_values, values))).requires_grad_(False)
    # A field that was never trained shows next to nothing, whatever planes say.
    shared.field.head.weight.mul_(10)
    shared.field.head.bias[0] = 8.0
    return shared


@pytest.fixture(scope="module")
def scenes(shared) -> list[EncodedScene]:
    """Three cars of 12 views, one of them a test view."""
    cars = [embedded_scene(scene_id, 16, 12) for scene_id in embedded_ids(3)]
    return [encode_scene(shared, prepare_scene(shared, car)) for car in cars]


def phase(rate: float, steps: int = 60, **over) -> Stage2Phase:
    values = {"check_every": 5, "decay_steps": 7, "lr_cosine_to": 0.1, "loss": {"latent": 1.0}} | over
    return Stage2Phase(steps_per_epoch=steps, rays_per_item=16, lr={"micro_planes": rate, "coefs": rate}, **values)


def fitted(shared: SharedModel, scenes: list[EncodedScene], of: Stage2Phase) -> tuple[SceneParams, list[float]]:
    params, losses = shared.start_params(len(scenes)), []
    settings = shared.settings.model_copy(
        update={"stage2": shared.settings.stage2.model_copy(update={"latent": of, "micro_dtype": "float32"})}
    )
    run_phase(FitContext(shared, settings, lambda name, step, loss: losses.append(loss)), "latent", scenes, params)
    return params, losses


def test_scenes_that_stand_still_end(shared, scenes):
    """At rates of nothing the second look finds no gain: 10 steps, and 7 for the rates to fall."""
    assert len(fitted(shared, scenes, phase(1e-12))[1]) == 2 * 5 + 7
    assert len(fitted(shared, scenes, phase(1e-12, steps=12))[1]) == 12, "too short to look"
    assert len(fitted(shared, scenes, phase(1e-12, check_every=None))[1]) == 60


def test_scenes_that_gain_go_on(shared, scenes):
    _, losses = fitted(shared, scenes, phase(5e-2, check_every=15))
    assert len(losses) > 2 * 15 + 7 and sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_rates_fall_from_where_a_scene_ends(shared, scenes):
    settings = phase(1e-2)
    ends, cells = Ends(shared, settings, scenes, total=60), Cells(shared, scenes)
    assert ends.factors(settings, 0, 52).tolist() == [1.0, 1.0, 1.0], "the last 7 of 60 steps fall in any case"
    ends.falls[1] = ends.falls_there[1] = 20
    found = ends.factors(settings, 0, 24)
    by_hand = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 7))
    torch.testing.assert_close(found, torch.tensor([1.0, by_hand, 1.0]))
    ends.best[:] = 0.0  # whatever a look finds is worse
    ends.check(shared.start_params(3), cells, 25)
    assert ends.falls == [25, 20, 25] and ends.moving.tolist() == [0, 1, 2]
    ends.check(shared.start_params(3), cells, 27)
    assert ends.moving.tolist() == [0, 2], "seven steps after it began to fall"


def test_nobody_trains_on_what_is_looked_at(shared, scenes):
    views = shared.latent_size**2
    ends = Ends(shared, phase(1e-2), scenes, total=60)
    for before, trained in zip(scenes, ends.trained, strict=True):
        used, all_views = set((trained.drawn // views).tolist()), set((before.drawn // views).tolist())
        assert len(all_views - used) == HELD_OUT and used < all_views


def test_a_scene_does_not_see_the_others(shared, scenes):
    together, _ = fitted(shared, scenes, phase(1e-2, steps=40))
    for row, scene in enumerate(scenes):
        alone, _ = fitted(shared, [scene], phase(1e-2, steps=40))
        torch.testing.assert_close(alone.micro_planes[0], together.micro_planes[row], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(alone.coefs[0], together.coefs[row], rtol=1e-3, atol=1e-4)


def test_few_views_are_all_trained_on(shared, tiny_scenes):
    scene = encode_scene(shared, prepare_scene(shared, tiny_scenes[0]))
    assert scene.num_views < LEAST_VIEWS
    ends = Ends(shared, phase(1e-2), [scene], total=60)
    assert len(ends.trained[0].drawn) == len(scene.drawn)
    assert len(fitted(shared, [scene], phase(1e-12))[1]) == 60


def test_a_look_at_large_images_is_at_some_of_their_rays(shared):
    scene = encode_scene(shared, prepare_scene(shared, embedded_scene("car-00000", 16, 12)))
    scene.drawn = torch.arange(12 * 1000)
    trained, held = _split(scene, rays_per_view=1000)
    assert len(held.drawn) == RAYS_CHECKED and len(trained.drawn) == 10_000
    assert held.drawn.min() == 3000 and held.drawn.max() == 7999, "of views 3 and 7"


@pytest.mark.parametrize("tv_weight", [0.0, 1e-6])
def test_coefs_stand_still_from_a_step_on_unless_they_are_all_that_moves(shared, scenes, tv_weight):
    """The autograd path, which total variation takes, and that of the compiled loops."""
    both = phase(1e-2, steps=20, check_every=None, coefs_until=0.3, tv_weight=tv_weight)
    for steps in (6, 20):  # 0.3 of 20; the rates do not fall
        short = both.model_copy(update={"lr_cosine_to": 1.0, "steps_per_epoch": steps, "coefs_until": 6 / steps})
        coefs = fitted(shared, scenes, short)[0].coefs
        if steps == 6:
            early = coefs
    torch.testing.assert_close(coefs, early)
    alone = both.model_copy(update={"lr": Rates(coefs=1e-2), "lr_cosine_to": 1.0})
    assert (fitted(shared, scenes, alone)[0].coefs - early).abs().max() > 1e-2
