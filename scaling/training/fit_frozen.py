"""Stage 2, mode frozen: fit scenes on top of the shared model as it is. Scenes of a batch share its cost only.

2a fits micro planes and coefs to the encoded training views, which are encoded once. 2b moves them through the decoder,
or its small student, towards the training images. The loss is the sum over scenes of each scene's own mean, so no scene
influences another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from scaling.config import Settings, Stage2Phase
from scaling.data.scene_views import SceneViews
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training import watchdog
from scaling.training.batches import Item, make_batch
from scaling.training.fit_context import FitContext
from scaling.training.fit_random_rays import fit_random_rays
from scaling.training.losses import Batch, weighted
from scaling.training.optim import check_ownership, lr_factor
from scaling.training.random_streams import stream
from scaling.training.scene_step import SceneOptimiser, by_autograd, scene_loss
from scaling.training.training_scene import EncodedScene, TrainingScene, ready_scene

PHASES = ("latent", "rgb")


@dataclass(frozen=True)
class FittedScene:
    """One scene's result.

    params: micro_planes [P, F_mic, K, K], coefs [M], hull [CELLS³] or None; seconds: that it took to make the scene
    ready, and its share of the time that its group's steps took; warning: see `where_it_is_not`, "" for most scenes.
    """

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
    """Fit S scenes together: `ready_scene` and `fit_ready`. Raises what they raise."""
    ready = []
    for views in scenes:
        ready.append(ready_scene(shared, views))
        watchdog.beat()
    return fit_ready(shared, ready, settings, on_step)


def fit_ready(
    shared: SharedModel,
    scenes: Sequence[EncodedScene],
    settings: Settings,
    on_step: Callable[[str, int, float], None] | None = None,
) -> list[FittedScene]:
    """Fit S scenes that are ready together. → results in the order of `scenes`.

    on_step(phase, step, mean loss) is called after every step. Scenes with different numbers of training views are
    fitted in separate groups, as their epochs differ. A scene that diverges gets params that are not finite, which
    packing refuses.
    Raises RuntimeError where a parameter of the shared model is trainable.
    """
    check_ownership(shared, None)  # nothing of the shared model may move
    fit = FitContext(shared, settings, on_step)
    order = sorted(range(len(scenes)), key=lambda i: scenes[i].num_views)
    fitted: dict[int, FittedScene] = {}
    for _, group in groupby(order, key=lambda i: scenes[i].num_views):
        rows = sorted(group)
        params, seconds = _fit_group(fit, [scenes[i] for i in rows])
        for k, i in enumerate(rows):
            took = scenes[i].seconds + seconds / len(rows)
            fitted[i] = FittedScene(scenes[i].scene_id, params[k], took, scenes[i].warning)
    return [fitted[i] for i in range(len(scenes))]


def _fit_group(fit: FitContext, ready: Sequence[EncodedScene]) -> tuple[SceneParams, float]:
    """→ the scenes' params, and the seconds that all of them took together."""
    shared, settings = fit.shared, fit.settings
    start = time.perf_counter()
    params = replace(start_params(shared, settings, [scene.scene_id for scene in ready]), hull=hulls_of(ready))
    for name in PHASES:
        if getattr(settings.stage2, name).num_epochs:
            run_phase(fit, name, ready, params)
    params = SceneParams(params.micro_planes.detach(), params.coefs.detach(), params.hull)
    if shared.device.type == "cuda":  # kernels run asynchronously, and the clock must count them
        torch.cuda.synchronize(shared.device)
    return params, time.perf_counter() - start


def hulls_of(ready: Sequence[TrainingScene]) -> Tensor | None:
    """Visual hulls of S scenes, [S, CELLS³]; None with rendering.sampled: cuboid."""
    hulls = [scene.hull for scene in ready if scene.hull is not None]
    return torch.stack(hulls) if hulls else None


def start_params(shared: SharedModel, settings: Settings, scene_ids: Sequence[str]) -> SceneParams:
    """Params that the scenes start from, as stage2.start says: micro planes [S, P, F_mic, K, K] and coefs [S, M]."""
    if settings.stage2.start == "random":
        return shared.random_params([stream(settings.seed, "start", scene_id) for scene_id in scene_ids])
    return shared.start_params(len(scene_ids))


def run_phase(fit: FitContext, name: str, ready: Sequence[EncodedScene], params: SceneParams) -> None:
    """Move params (S scenes) in place through one phase, "latent" or "rgb"."""
    phase: Stage2Phase = getattr(fit.settings.stage2, name)
    if phase.rays_per_item:
        fit_random_rays(fit, name, phase, ready, params)
    else:
        fit_views(fit, name, phase, ready, params)


def fit_views(
    fit: FitContext, name: str, phase: Stage2Phase, ready: Sequence[TrainingScene], params: SceneParams
) -> None:
    """Fit S scenes through a phase with one view of every scene a step, or with `crop` a square of one; `params` move
    in place."""
    shared = fit.shared
    decode = shared.student if phase.through == "student" else None  # None: the decoder
    optimiser = SceneOptimiser(params, phase.lr, together=True)
    rows = torch.arange(len(ready), device=shared.device)
    steps_per_epoch = phase.steps_per_epoch or ready[0].num_views
    total = phase.num_epochs * steps_per_epoch
    for step, batch in enumerate(_view_batches(fit, name, phase, ready, total)):

        def loss_of(now: SceneParams, batch: Batch = batch) -> tuple[Tensor, dict[str, Tensor]]:
            return scene_loss(shared, phase, batch, now, decode)

        factor = lr_factor(phase, step // steps_per_epoch, step / total)
        losses, _ = optimiser.step(rows, partial(by_autograd, loss_of=loss_of), factor)
        fit.stepped(name, step, weighted(losses, phase.loss))


def _view_batches(
    fit: FitContext, name: str, phase: Stage2Phase, ready: Sequence[TrainingScene], steps: int
) -> Iterator[Batch]:
    """Yield a batch for each step. Each scene goes through its views in a random order of its own, again and again."""
    num_views, streams = ready[0].num_views, fit.streams(name, ready)
    for step in range(steps):
        if step % num_views == 0:
            orders = [torch.randperm(num_views, generator=generator).tolist() for generator in streams]
        chosen = [order[step % num_views] for order in orders]
        yield make_batch(fit.shared, phase, [Item(*item) for item in zip(ready, chosen, streams)])
