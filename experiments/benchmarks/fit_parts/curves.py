"""For fit.py --with-paper: the published stage 2 and ours, as curves of quality over CPU time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from shared.measured import Clock, Curve, every, test_point

from scaling.config import Settings
from scaling.data.scene_views import SceneViews
from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.fit_cohort import Cohort
from scaling.training.fit_context import FitContext
from scaling.training.fit_frozen import hulls_of, run_phase, start_params
from scaling.training.phase_loop import EpochReport
from scaling.training.training_scene import EncodedScene, ready_scene

POINTS = (*range(5, 100, 5), *range(100, 10_001, 50))  # steps at which our 2a is measured


def published_stage2(
    shared: SharedModel, settings: Settings, scenes: Sequence[SceneViews], folder: str, between: Callable[[int], None]
) -> dict[str, Any]:
    """Run 2a and 2b as published, over one cohort. → the point at the start, and the curves of both phases, each with
    its own clock. between(epoch) is called after each epoch of 2a, with the clock stopped."""
    cohort = Cohort(shared, folder, scenes, settings)
    curves = {"latent": Curve(), "rgb": Curve()}
    clock = Clock()

    def on_epoch(report: EpochReport) -> None:
        nonlocal clock
        last = report.epoch == getattr(settings.stage2, report.phase).num_epochs
        with clock.stopped():
            if last or report.phase == "rgb" or report.epoch % 5 == 0:
                point = test_point(cohort.shared, scenes, cohort.table, report.epoch, clock.seconds)
                curves[report.phase].points.append(point)
                print(f"  {report.phase} {point}", flush=True)
            if report.phase == "latent":
                between(report.epoch)
        # The time of 2b counts from the end of 2a.
        if report.phase == "latent" and last:
            clock = Clock()

    start = test_point(cohort.shared, scenes, cohort.table, 0, 0.0)
    clock = Clock()
    cohort.go_on(on_epoch, None)
    return {"start": start, **curves}


def our_2a(
    shared: SharedModel, settings: Settings, scenes: Sequence[SceneViews]
) -> tuple[Curve, SceneParams, list[EncodedScene], float]:
    """Run our 2a. → its curve, the params at its end, the encoded scenes, and the CPU seconds of encoding them."""
    clock = Clock()
    ready = [ready_scene(shared, views) for views in scenes]
    encoding = clock.seconds
    params = replace(start_params(shared, settings, [scene.scene_id for scene in ready]), hull=hulls_of(ready))
    curve = Curve([test_point(shared, scenes, params, 0, 0.0)])
    clock = Clock()

    def measure(step: int) -> None:
        with clock.stopped():
            curve.points.append(test_point(shared, scenes, params, step, clock.seconds))

    taken = 0

    def count(name: str, step: int, loss: float) -> None:
        nonlocal taken
        taken = step + 1
        every(POINTS, measure)(name, step, loss)

    run_phase(FitContext(shared, settings, count), "latent", ready, params)
    measure(taken)  # early stopping may end 2a between two measurements
    return curve, params, ready, encoding


def our_cohort(
    shared: SharedModel,
    settings: Settings,
    scenes: Sequence[SceneViews],
    params: SceneParams | None = None,
    first_seconds: float = 0.0,
) -> Curve:
    """The curve of our stage 2 in mode cohort, which fine-tunes shared parts as the published one does.

    params: where scenes start, those of a 2a; None: their usual start. first_seconds: CPU seconds that the first point
    has cost already.
    """
    cohort = Cohort(shared, "mode cohort", scenes, settings)
    if params is not None:
        micro, coefs = params.micro_planes.detach().clone(), params.coefs.detach().clone()
        cohort.table = replace(cohort.table, micro_planes=micro, coefs=coefs)
    curve = Curve([test_point(cohort.shared, scenes, cohort.table, 0, first_seconds)])
    clock = Clock()

    def measure(report: EpochReport) -> None:
        with clock.stopped():
            steps = report.epochs_done * (getattr(settings.stage2, report.phase).steps_per_epoch or 0)
            point = test_point(cohort.shared, scenes, cohort.table, steps, clock.seconds + first_seconds)
            curve.points.append(point)

    cohort.go_on(measure, None)
    return curve


def our_2b(
    shared: SharedModel,
    settings: Settings,
    scenes: Sequence[SceneViews],
    params: SceneParams,
    ready: Sequence[EncodedScene],
    first_seconds: float,
) -> Curve:
    """The curve of our 2b, which moves params in place. Its first point is 2a as the adapted decoder decodes it;
    first_seconds: CPU seconds that this point has cost already."""
    curve = Curve([test_point(shared, scenes, params, 0, first_seconds)])
    phase = settings.stage2.rgb
    clock = Clock()

    def measure(step: int) -> None:
        with clock.stopped():
            curve.points.append(test_point(shared, scenes, params, step, clock.seconds + first_seconds))

    steps = [epoch * ready[0].num_views for epoch in range(1, phase.num_epochs + 1)]
    if steps:
        run_phase(FitContext(shared, settings, every(steps, measure)), "rgb", ready, params)
    return curve


@torch.no_grad()
def one_decoded_batch(shared: SharedModel, num_scenes: int) -> float:
    """CPU seconds of decoding one view of each scene, the least that decoding 2a by the adapted decoder costs."""
    clock = Clock()
    shared.decode(torch.zeros(num_scenes, shared.autoencoder.latent_channels, shared.latent_size, shared.latent_size))
    return clock.seconds
