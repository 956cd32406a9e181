"""For step.py: the steps of stage 2, written out so that each part can be timed.

They use autograd. On a CPU a frozen fit on random rays no longer does: see training/steps/cpu_fit.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from shared.stopwatch import Laps, seconds_of
from torch import Tensor

from scaling.config import Stage2Phase
from scaling.models.renderer import composite, quadrature
from scaling.models.sampling import samples_in
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams, fuse_planes, point_features
from scaling.training.batches import Item, make_batch
from scaling.training.fit_context import FitContext
from scaling.training.fit_frozen import run_phase
from scaling.training.fit_random_rays import Cells
from scaling.training.losses import RayBatch, ViewBatch, item_losses, per_item, pixel_error, rendered, weighted
from scaling.training.random_ray_batches import RayTable
from scaling.training.random_streams import stream
from scaling.training.training_scene import EncodedScene

CLOSE = 1e-4  # largest relative difference between the loss of a written-out step and that of `item_losses`


def start(shared: SharedModel, num_scenes: int) -> tuple[SceneParams, torch.optim.Adam]:
    """The scenes' parameters at the start, as leaves, and an Adam that moves them."""
    params = shared.start_params(num_scenes)
    tensors = [params.micro_planes.requires_grad_(), params.coefs.requires_grad_()]
    return params, torch.optim.Adam(tensors, lr=1e-2, fused=True)


def latent_parts(
    shared: SharedModel, phase: Stage2Phase, ready: Sequence[EncodedScene], repeats: int
) -> dict[str, float]:
    """ms of each part of a step of 2a. Raises RuntimeError where the loss differs from that of stage 2."""
    laps, (params, optimiser) = Laps(shared.device), start(shared, len(ready))
    streams = [stream(0, row) for row in range(len(ready))]
    table, rows = RayTable(shared, ready), torch.arange(len(ready), device=shared.device)
    drawn = table.draws(streams, phase.rays_per_item or 0, repeats + 2)
    numbers = (of_step for _, some in drawn for of_step in some.unbind(1))
    cells = Cells(shared, ready)
    for _ in range(repeats + 2):
        laps.start()
        batch = table.batch(next(numbers), rows, cells.of(rows))
        laps.lap("make the batch")
        loss = _latent_loss(shared, batch, params, laps)
        _move(optimiser, loss, laps)
    with torch.no_grad():
        _check(_latent_loss(shared, batch, params, Laps(shared.device)), shared, phase, batch, params)
    return laps.medians_ms()


def _latent_loss(shared: SharedModel, batch: RayBatch, params: SceneParams, laps: Laps) -> Tensor:
    planes = fuse_planes(params.micro_planes, params.coefs, shared.base_planes)
    laps.lap("fuse planes")
    renderer, rays = shared.renderer, batch.rays
    assert batch.cells is not None
    inside = renderer.box.into(rays)
    samples = samples_in(renderer.box, rays, batch.cells, renderer.samples, batch.uniforms)
    depths, lengths = samples.depths, samples.lengths
    points = inside.origins[..., None, :] + depths[..., None] * inside.directions[..., None, :]
    laps.lap("place points")
    features = point_features(planes, points.flatten(1, 2), renderer.plane_axes, renderer.combine)
    laps.lap("sample planes")
    raw, colours = shared.field(features)
    laps.lap("field")
    raw, colours = (values.unflatten(1, depths.shape[1:]) for values in (raw, colours))
    out, _, opacity, _ = quadrature(depths, raw, colours, lengths)
    background = shared.background_of(depths.shape[1], batch.pixels)
    loss = per_item(composite(out, opacity, background) - batch.latents).sum()
    laps.lap("quadrature and loss")
    return loss


def rgb_parts(shared: SharedModel, phase: Stage2Phase, ready: Sequence[EncodedScene], repeats: int) -> dict[str, float]:
    """ms of each part of a step of 2b, through the student or the decoder, as the phase says."""
    laps, (params, optimiser) = Laps(shared.device), start(shared, len(ready))
    decode = shared.student if phase.through == "student" and shared.student else shared.decode
    for step in range(repeats + 2):
        laps.start()
        items = [Item(scene, step % scene.num_views, stream(0, row)) for row, scene in enumerate(ready)]
        batch = make_batch(shared, phase, items)
        laps.lap("make the batch")
        assert isinstance(batch, ViewBatch)  # because the loss of this phase compares images
        colours = rendered(shared, batch, params)
        laps.lap("render")
        images = decode(shared.as_latents(colours))
        loss = pixel_error(images, batch.images).sum()
        laps.lap("decode and loss")
        _move(optimiser, loss, laps)
    return laps.medians_ms()


def _move(optimiser: torch.optim.Adam, loss: Tensor, laps: Laps) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    laps.lap("backward")
    optimiser.step()
    laps.lap("Adam")


def _check(loss: Tensor, shared: SharedModel, phase: Stage2Phase, batch: RayBatch, params: SceneParams) -> None:
    wanted = weighted(item_losses(shared, phase.loss, batch, params), phase.loss).sum()
    if not torch.allclose(loss * phase.loss.latent, wanted, rtol=CLOSE):
        raise RuntimeError(f"the written-out step of 2a has loss {loss.item()}, but stage 2 finds {wanted.item()}")


def whole_step(shared: SharedModel, name: str, phase: Stage2Phase, ready: Sequence[EncodedScene], steps: int) -> float:
    """ms of a step of a phase of stage 2 as it is, after one step that is not counted."""

    def run(count: int) -> None:
        once = phase.model_copy(update={"num_epochs": 1, "steps_per_epoch": count})
        stage2 = shared.settings.stage2.model_copy(update={name: once, "micro_dtype": "float32"})
        fit = FitContext(shared, shared.settings.model_copy(update={"stage2": stage2}))
        run_phase(fit, name, ready, shared.start_params(len(ready)))

    run(1)
    return 1000 * seconds_of(lambda: run(steps), shared.device) / steps
