"""A fitter that notes when it does what. It has a module of its own, because Ray's workers import it by name.

Each call of a noted function becomes a line {"part", "start", "end", "cpu", "own"} in SCALING_TIMES/<pid>.jsonl: start
and end in seconds of the wall clock, cpu: CPU-seconds of its thread, own: those outside of other noted functions.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from scaling.data import scene_views
from scaling.distributed.stage2 import actors
from scaling.distributed.stage2.actors import FitJob, SceneFitter
from scaling.distributed.stage2.messages import Fitted
from scaling.models.shared_model import SharedModel
from scaling.training import evaluate, fit_random_rays, training_scene
from scaling.training.metrics import images
from scaling.training.steps import cpu_fit

# Where a part of an actor's work is done: the module or class, the name of the function in it, the part.
NOTED: tuple[tuple[Any, str, str], ...] = (
    (actors, "_decode", "rows of a batch"),
    (scene_views, "decode_layers", "decode PNG"),
    (actors, "ready_scene", "make a scene ready"),
    (training_scene, "silhouettes", "silhouettes"),
    (training_scene, "where_it_is_not", "checks of a scene"),
    (training_scene, "scene_hull", "hull"),
    (training_scene, "encode_images", "encode"),
    (actors, "fit_ready", "fit, other"),
    (fit_random_rays, "RayTable", "ray table"),
    (SharedModel, "cells", "cells"),
    (cpu_fit, "fit_scene", "steps"),
    (evaluate, "render_views", "render views"),
    (images, "psnr", "PSNR"),
    (images, "structure", "SSIM, MS-SSIM"),
    (images, "flip", "FLIP"),
    (SharedModel, "decode", "decode latents"),
    (actors, "pack_scene", "pack"),
)
METHODS = {"_finished_rows": "evaluation, other", "_commit": "commit"}  # of the fitter itself
# The parts that contain others: from a batch's rows to its commit, an actor is in one of them or waits.
WHOLE = ("rows of a batch", "make a scene ready", "fit, other", "evaluation, other", "commit")
FIT = ("make a scene ready", "fit, other")  # what counts as the fit: the `seconds` of a scene's row


class Notes:
    """The lines of this process, and how functions are noted."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.nested = threading.local()

    def noted(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, noted as `part`."""

        @functools.wraps(function, updated=())
        def call(*args: Any, **kwargs: Any) -> Any:
            stack = self.nested.__dict__.setdefault("inner", [0.0])
            stack.append(0.0)
            start, cpu = time.time(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                cpu, inner = time.thread_time() - cpu, stack.pop()
                stack[-1] += cpu
                self.lines.append({"part": part, "start": start, "end": time.time(), "cpu": cpu, "own": cpu - inner})

        return call


class ClockedFitter(SceneFitter):
    """Real fits, noted."""

    def __init__(self, job: FitJob) -> None:
        super().__init__(job)
        self.notes = Notes()
        for owner, name, part in NOTED:
            setattr(owner, name, self.notes.noted(part, getattr(owner, name)))
        for name, part in METHODS.items():  # not of its class: Ray makes another one of it
            setattr(self, name, self.notes.noted(part, getattr(self, name)))

    def fit(self, batch: pa.Table, attempt: int) -> Fitted:
        """The fit of the parent class; afterwards the lines are written."""
        try:
            return super().fit(batch, attempt)
        finally:
            lines, self.notes.lines = self.notes.lines, []
            with (Path(os.environ["SCALING_TIMES"]) / f"{os.getpid()}.jsonl").open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


def read_notes(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of each process."""
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}


def union(spans: list[tuple[float, float]]) -> float:
    """Seconds that lie in at least one span."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
