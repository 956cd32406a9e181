"""What a GPU offers, each against the plain path: bfloat16, torch.compile, CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from scaling.models.shared_model import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.training.fit_frozen import start_params
from scaling.training.random_ray_batches import RayTable
from scaling.training.random_streams import stream
from scaling.training.steps.autograd_fit import AutogradFit, Span
from scaling.training.steps.graph_fit import GraphFit
from scaling.training.training_scene import EncodedScene

STEPS = 20
# The largest difference of the mean loss after STEPS steps, as part of it.
ALLOWED = {"CUDA graphs": 0.01, "torch.compile": 0.01, "bfloat16": 0.05}


def check_all(shared: SharedModel, ready: Sequence[EncodedScene]) -> list[dict[str, Any]]:
    """A row {what, ok, loss, plain, difference, note} for each check. What fails does not end the run: its row says
    why."""
    plain = losses_of(AutogradFit, shared, ready)
    rows = []
    for what, measure in _ways(shared, ready).items():
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            row: dict[str, Any] = {"what": what, "ok": False, "loss": None, "plain": plain, "difference": None}
            try:
                row["loss"] = measure()
                row["difference"] = abs(row["loss"] - plain) / plain
                row["ok"] = row["difference"] <= ALLOWED[what]
            except Exception as error:
                row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        slower = [str(warning.message) for warning in told if "CUDA graphs" in str(warning.message)]
        if slower:
            row |= {"ok": False, "note": slower[0]}
        rows.append(row)
    return rows


def _ways(shared: SharedModel, ready: Sequence[EncodedScene]) -> dict[str, Callable[[], float]]:
    def compiled() -> float:
        try:
            shared.renderer.compile(dynamic=True)
            return losses_of(AutogradFit, shared, ready)
        finally:
            shared.renderer._compiled_call_impl = None  # what `compile` sets

    def half() -> float:
        full = shared.field.precision
        try:
            shared.field.precision = "bfloat16"
            return losses_of(AutogradFit, shared, ready)
        finally:
            shared.field.precision = full

    ways: dict[str, Callable[[], float]] = {"torch.compile": compiled}
    if shared.device.type == "cuda":
        ways = {"CUDA graphs": lambda: losses_of(GraphFit, shared, ready), **ways, "bfloat16": half}
    return ways


def losses_of(kind: type[AutogradFit], shared: SharedModel, ready: Sequence[EncodedScene]) -> float:
    """The mean loss of the last of STEPS steps of 2a."""
    settings = shared.settings
    ids = [scene.scene_id for scene in ready]
    params = start_params(shared, settings, ids)
    params = SceneParams(params.micro_planes.clone(), params.coefs.clone(), params.hull)
    phase, table = settings.stage2.latent, RayTable(shared, ready)
    fit = kind(shared, phase, table, params, settings.stage2.micro_dtype)
    _, uniforms = next(table.draws([stream(0, "latent", name) for name in ids], phase.rays_per_item or 1, STEPS))
    cells = None if ready[0].cells is None else torch.stack([scene.cells for scene in ready if scene.cells is not None])
    moving, rows = ["micro_planes", "coefs"], torch.arange(len(ready), device=shared.device)
    factors: list[float | torch.Tensor] = [1.0] * uniforms.shape[1]
    losses = [float(loss.mean()) for loss in fit.take(Span(0, rows, moving, factors, uniforms, cells, None))]
    return losses[-1]
