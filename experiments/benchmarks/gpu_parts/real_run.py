"""A real run: stage 1 in so many seconds, then as many further cars as fit into so many, and how good they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch

from gpu_parts.workload import FEW_STEPS, Plan, cars, train
from scaling.data.scene_views import SceneViews
from scaling.models.shared_model import SharedModel
from scaling.pictures.draw import overview, save_png
from scaling.training.evaluate import evaluate_scene, render_views
from scaling.training.fit_frozen import FittedScene, fit_scenes

PICTURED, EVALUATED = 8, 32
EPOCHS = 16


def real_run(plan: Plan) -> dict[str, Any]:
    """→ figures; the picture is OUT/cars.png. Times of drawing and of evaluation are not in those of the stages."""
    start = time.perf_counter()
    scenes = cars(plan, plan.stage1_scenes + plan.stage2_scenes)
    drawing = time.perf_counter() - start
    print(f"  {len(scenes)} cars drawn in {drawing:.0f} s", flush=True)
    some, further = scenes[: plan.stage1_scenes], scenes[plan.stage1_scenes :]
    _, seconds = train(plan.settings(FEW_STEPS), some, plan.device)
    # The second epoch has nothing to warm up any more.
    steps = max(1, int(plan.seconds_stage1 / (seconds[-1] / 20) / EPOCHS))
    start = time.perf_counter()
    shared, _ = train(
        plan.settings({"stage1": {"warmup": {"num_epochs": EPOCHS, "steps_per_epoch": steps}}}), some, plan.device
    )
    stage1 = time.perf_counter() - start
    print(f"  stage 1: {EPOCHS} epochs of {steps} steps in {stage1:.0f} s", flush=True)
    fitted, stage2 = fit_for(plan, shared, further)
    figures = {
        "drawing_s": drawing, "stage1_s": stage1, "stage1_scenes": len(some), "stage1_steps": EPOCHS * steps,
        "stage2_s": stage2, "stage2_scenes": len(fitted), "scenes_per_gpu_hour": 3600 * len(fitted) / stage2,
    }  # fmt: skip
    print(f"  stage 2: {len(fitted)} cars in {stage2:.0f} s", flush=True)
    return {**figures, **quality(plan, shared, further, fitted)}


def fit_for(plan: Plan, shared: SharedModel, scenes: Sequence[SceneViews]) -> tuple[list[FittedScene], float]:
    """Fit batch after batch until the time is over or all scenes are fitted. → results, and the seconds they took."""
    settings, size, fitted = shared.settings, max(plan.scenes_per_batch), []
    start = time.perf_counter()
    for first in range(0, len(scenes), size):
        fitted += fit_scenes(shared, scenes[first : first + size], settings)
        if time.perf_counter() - start > plan.seconds_stage2:
            break
    return fitted, time.perf_counter() - start


def quality(
    plan: Plan, shared: SharedModel, scenes: Sequence[SceneViews], fitted: Sequence[FittedScene]
) -> dict[str, Any]:
    """Mean, worst and best PSNR of up to EVALUATED scenes on their test views, and the picture."""
    values, truth, rendered = [], [], []
    start = time.perf_counter()
    for views, result in zip(scenes[:EVALUATED], fitted[:EVALUATED]):
        params = result.params[None]
        values.append(evaluate_scene(shared, params, views)["psnr"] or 0.0)
        if len(truth) < PICTURED:
            view = [views.test_views[0]]
            truth.append(views.images[view])
            rendered.append(render_views(shared, params, views.cam2world[view], views.intrinsics[view])["images"].cpu())
    save_png(plan.out / "cars.png", overview(torch.cat(truth), torch.cat(rendered)))
    took = time.perf_counter() - start
    return {"psnr": mean(values), "psnr_worst": min(values), "psnr_best": max(values), "evaluation_s": took}
