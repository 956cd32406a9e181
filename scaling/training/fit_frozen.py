"""Stage 2, mode frozen: fits scenes on top of the shared model as it is. Scenes of a batch share its cost only.

2a fits micro planes and coefs to the encoded training views (cached once); 2b moves them through the decoder, or its
small student, towards the training images. Loss: the sum over scenes of each scene's own mean, so that no scene touches
another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from scaling.config import Settings, Stage2Phase
from scaling.data.scene_views import SceneViews
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training import watchdog
from scaling.training.fit_random_rays import fit_rays
from scaling.training.losses import Batch, item_losses, variation, weighted
from scaling.training.optim import BETAS, EPSILON, check_ownership, lr_factor
from scaling.training.random_streams import stream
from scaling.training.training_scene import Item, TrainingScene, encode_scene, make_batch, prepare_scene

PHASES = ("latent", "rgb")


@dataclass(frozen=True)
class FittedScene:
    """One scene's result: micro_planes [P, F_mic, K, K], coefs [M], its share of the batch's seconds, from encoding to
    the last step, and what of it could not be learned (see `where_it_is_not`)."""

    scene_id: str
    params: SceneParams
    seconds: float
    warning: str = ""


def fit_scenes(
    shared: SharedModel,
    scenes: Sequence[SceneViews],
    settings: Settings,
    on_step: Callable[[str, int, float], None] | None = None,
) -> list[FittedScene]:
    """Fits S scenes together; results in the order of `scenes`.

    on_step(phase, step, mean loss) is called after every step. Scenes with different numbers of training views are
    fitted apart, as their epochs differ. A scene that diverges has params that are not finite; packing them refuses.
    Raises RuntimeError where a parameter of the shared model is trainable.
    """
    order = sorted(range(len(scenes)), key=lambda i: len(scenes[i].train_views))
    fitted: dict[int, FittedScene] = {}
    for _, group in groupby(order, key=lambda i: len(scenes[i].train_views)):
        rows = sorted(group)
        params, warnings, seconds = _fit_group(shared, [scenes[i] for i in rows], settings, on_step)
        for k, i in enumerate(rows):
            fitted[i] = FittedScene(scenes[i].scene_id, params[k], seconds / len(rows), warnings[k])
    return [fitted[i] for i in range(len(scenes))]


def _fit_group(
    shared: SharedModel,
    scenes: Sequence[SceneViews],
    settings: Settings,
    on_step: Callable[[str, int, float], None] | None,
) -> tuple[SceneParams, list[str], float]:
    check_ownership(shared, None)  # nothing of the shared model may move
    start = time.perf_counter()
    ready = [prepare_scene(shared, views) for views in scenes]
    for scene in ready:
        encode_scene(shared, scene)
        watchdog.beat()
    params = replace(start_params(shared, settings, [scene.scene_id for scene in ready]), hull=hulls_of(ready))
    for name in PHASES:
        phase: Stage2Phase = getattr(settings.stage2, name)
        if phase.num_epochs:
            run_phase(shared, name, phase, ready, params, settings.seed, settings.stage2.micro_dtype, on_step)
    params = SceneParams(params.micro_planes.detach(), params.coefs.detach(), params.hull)
    if shared.device.type == "cuda":
        torch.cuda.synchronize(shared.device)
    return params, [scene.warning for scene in ready], time.perf_counter() - start


def hulls_of(ready: Sequence[TrainingScene]) -> Tensor | None:
    """Their visual hulls [S, CELLS³]; None where rays are sampled evenly."""
    hulls = [scene.hull for scene in ready if scene.hull is not None]
    return torch.stack(hulls) if hulls else None


def start_params(shared: SharedModel, settings: Settings, scene_ids: Sequence[str]) -> SceneParams:
    """Where the scenes start, as stage2.start says: [S, P, F_mic, K, K] and [S, M]."""
    if settings.stage2.start == "random":
        return shared.random_params([stream(settings.seed, "start", scene_id) for scene_id in scene_ids])
    return shared.start_params(len(scene_ids))


def run_phase(
    shared: SharedModel,
    name: str,
    phase: Stage2Phase,
    ready: Sequence[TrainingScene],
    params: SceneParams,
    seed: int,
    micro_dtype: str,
    on_step: Callable[[str, int, float], None] | None,
) -> None:
    """Moves params (S scenes) in place through one phase, "latent" or "rgb"; see `fit_scenes` for on_step."""
    if phase.rays_per_item:
        fit_rays(shared, name, phase, ready, params, seed, micro_dtype, on_step)
        return
    optimiser = _scene_optimiser(phase, params)
    decode = shared.student if phase.through == "student" else None  # without one: the decoder
    steps_per_epoch = phase.steps_per_epoch or ready[0].num_views
    total = phase.num_epochs * steps_per_epoch
    streams = [stream(seed, name, scene.scene_id) for scene in ready]
    for done, batch in enumerate(_view_batches(shared, phase, ready, streams, total)):
        for group in optimiser.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(phase, done // steps_per_epoch, done / total)
        loss = weighted(item_losses(shared, phase.loss, batch, params, decode), phase.loss).sum()
        if phase.tv_weight:
            loss = loss + phase.tv_weight * variation(shared, params)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        watchdog.beat()
        if on_step is not None:
            on_step(name, done, loss.item() / len(ready))


def _view_batches(
    shared: SharedModel,
    phase: Stage2Phase,
    ready: Sequence[TrainingScene],
    streams: Sequence[torch.Generator],
    steps: int,
) -> Iterator[Batch]:
    """A whole view of every scene a step; each goes through its views in an order of its own, again and again."""
    num_views = ready[0].num_views
    for step in range(steps):
        if step % num_views == 0:
            orders = [torch.randperm(num_views, generator=generator).tolist() for generator in streams]
        chosen = [order[step % num_views] for order in orders]
        yield make_batch(shared, phase, [Item(*item) for item in zip(ready, chosen, streams)])


def _scene_optimiser(phase: Stage2Phase, params: SceneParams) -> torch.optim.Adam:
    """Adam acts on each number alone, so one Adam over all scenes is an Adam for each."""
    groups = []
    for tensor, rate in ((params.micro_planes, phase.lr.micro_planes), (params.coefs, phase.lr.coefs)):
        if rate and tensor.numel():
            groups.append({"params": [tensor.requires_grad_()], "lr": rate, "base_lr": rate})
        else:
            tensor.requires_grad_(False)
    return torch.optim.Adam(groups, betas=BETAS, eps=EPSILON, fused=True)
