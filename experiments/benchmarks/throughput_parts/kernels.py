"""How the time of a step on a CPU divides between its loops, each called alone, again and again, on one scene."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from scaling.config import Settings
from scaling.data.scene_views import SceneViews
from scaling.models.cpu_kernels import composite_error, sample_and_combine, scatter_gradient
from scaling.models.cpu_render import one_blas_thread
from scaling.models.cpu_render_loops import through_field
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams, texels_together
from scaling.training.random_ray_batches import RayTable
from scaling.training.steps.autograd_fit import Span
from scaling.training.steps.cpu_fit import CpuFit
from scaling.training.steps.cpu_fit_loops import adam, back_through_field, choose_rays, draw_samples, fuse
from scaling.training.training_scene import ready_scene

STEPS = 50


def shares_of_a_step(shared: SharedModel, views: SceneViews, settings: Settings) -> dict[str, float]:
    """The share of each loop in a step of phase 2a that moves micro planes and coefs; they add up to 1."""
    scene, phase = ready_scene(shared, views), settings.stage2.latent
    params = shared.start_params(1)
    params = SceneParams(texels_together(params.micro_planes), params.coefs, params.hull)
    fit = CpuFit(shared, phase, RayTable(shared, [scene]), params, settings.stage2.micro_dtype)
    assert scene.cells is not None
    uniforms = torch.rand(1, STEPS, phase.rays_per_item, 1 + shared.renderer.uniforms_per_ray)
    moving = ["micro_planes", "coefs"]
    span = Span(0, torch.arange(1), moving, [torch.ones(1)] * STEPS, uniforms, scene.cells[None] * 5, None)
    list(fit.take(span))  # makes room, and compiles
    loops = _loops(fit, span)
    with one_blas_thread():
        seconds = {name: _seconds(loop) for name, loop in loops.items()}
    whole = sum(seconds.values())
    return {name: value / whole for name, value in seconds.items()}


def _loops(fit: CpuFit, span: Span) -> dict[str, Callable[[], object]]:
    room, world, task = fit.room, fit.world, fit.task
    assert room is not None
    scene, moving, uniforms = fit._scene(0, span, 0), fit._moving(0, span, 0), span.uniforms[0].numpy()
    rays, samples = room.points.shape[:2]
    chosen = np.zeros((1, rays), np.int64)
    targets = np.empty((1, rays, scene.latents.shape[1]), np.float32)
    points = room.points.reshape(1, rays * samples, 3)
    features, at_features = (each.reshape(1, rays * samples, -1) for each in (room.features, room.at_features))
    heads = room.heads.reshape(1, rays, samples, -1)
    error, pixels = np.empty(1, np.float32), chosen % world.size**2
    own, first, second = (values.ravel() for values in (moving.micro, moving.micro_first, moving.micro_second))
    return {
        "choose rays": lambda: choose_rays(uniforms[:1], scene, chosen, targets),
        "place samples": lambda: draw_samples(uniforms[0], chosen[0], scene, world, room.points, room.lengths[0]),
        "mix base planes": lambda: np.dot(moving.coefs, task.base, room.mixed),
        "fuse planes": lambda: fuse(moving, room.mixed, room.texels[0]),
        "look up features": lambda: sample_and_combine(
            room.texels, points, world.columns, world.product, True, room.sampled, features
        ),
        "field": lambda: through_field(world, room),
        "composite, error": lambda: composite_error(
            heads,
            room.lengths,
            world.backgrounds,
            pixels,
            targets,
            task.weight,
            error,
            room.at_heads.reshape(heads.shape),
        ),
        "field, backwards": lambda: back_through_field(task, room),
        "scatter gradients": lambda: scatter_gradient(
            at_features, room.sampled, points, world.columns, world.product, room.at_texels
        ),
        "gradient of coefs": lambda: np.dot(task.base, room.at_mixed),
        "Adam": lambda: adam(own, first, second, room.at_own.ravel(), 0.0, 1),
    }


def _seconds(loop: Callable[[], object]) -> float:
    loop()  # compiles
    start = time.thread_time()
    for _ in range(STEPS):
        loop()
    return time.thread_time() - start
