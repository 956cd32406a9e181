"""The actors of stage 2: each holds the shared model on its device and turns batches of scenes into committed parts."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from scaling.config import make_settings
from scaling.data.scene_ref import SceneError
from scaling.data.scene_views import SceneViews, views_from_row
from scaling.data.stores import SourceSpec
from scaling.distributed.stage2.messages import FITTED, Fitted, Outcome
from scaling.library.parts import Part, commit_part, part_name
from scaling.library.run_folder import RunFolder, settings_hash
from scaling.library.scene_row import NotFinite, pack_scene, unpack_scene
from scaling.models.cpu_render import one_blas_thread
from scaling.models.shared_files import load_shared
from scaling.models.shared_model import SharedModel
from scaling.storage import atomic
from scaling.storage.paths import to_path
from scaling.training import watchdog
from scaling.training.evaluate import evaluate_scene
from scaling.training.fit_frozen import FittedScene, fit_ready
from scaling.training.phase_loop import Diverged
from scaling.training.training_scene import EncodedScene, ready_scene


@dataclass(frozen=True)
class FitJob:
    """What an actor needs to know, in plain values. run, shared: as `paths.uri_of` returns them; spec: of a SourceSpec;
    epoch: of the driver's lease, the fencing token of its commits; overlaps: whether there is a GPU, or a second core
    for each actor, so that work on batches of views may run beside a fit."""

    run: str
    shared: str
    settings: dict[str, Any]
    spec: tuple[str | None, int, int, str | None]
    epoch: int = 0
    overlaps: bool = False


class Fitter:
    """What the actors of both modes have in common: the shared model, evaluation, commits."""

    def __init__(self, job: FitJob) -> None:
        _one_thread()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.settings = make_settings(job.settings)
        self.spec = SourceSpec(*job.spec)
        self.run = RunFolder(to_path(job.run))
        self.epoch = job.epoch
        with watchdog.Watchdog(self.settings.stage2.stall_seconds):  # nothing else would end a start that hangs
            self.shared, self.shared_hash = load_shared(to_path(job.shared), self.device)

    def ready(self) -> bool:
        """Return when the actor has started, that is, when its shared model is loaded."""
        return True

    def _finished_rows(
        self, model: SharedModel, cohort: str | None, scenes: Sequence[SceneViews], fitted: Sequence[Any]
    ) -> tuple[list[dict[str, Any]], list[Outcome]]:
        """Pack and evaluate fitted scenes. → library rows, and outcomes of scenes whose fit or evaluation failed."""
        rows, outcomes = [], []
        for views, result in zip(scenes, fitted, strict=True):
            if not isinstance(result, Exception):
                result = _attempt(partial(self._row, model, cohort, views, result))
            watchdog.beat()
            if isinstance(result, Exception):
                outcomes.append(Outcome(views.scene_id, _kind(result), f"{type(result).__name__}: {result}"))
            else:
                rows.append(result)
        return rows, outcomes

    def _row(self, model: SharedModel, cohort: str | None, views: SceneViews, fitted: FittedScene) -> dict[str, Any]:
        start = time.perf_counter()
        packed = vars(pack_scene(fitted.params, self.settings.stage2.micro_dtype))
        packing = time.perf_counter() - start
        stored = unpack_scene({**packed, "scene_id": views.scene_id})[None].to(self.device)  # as readers will see it
        metrics = evaluate_scene(model, stored, views)
        if not all(value is None or math.isfinite(value) for value in metrics.values()):
            raise NotFinite(f"the fit diverged: its renders are not finite ({metrics})")
        return {
            **packed, **metrics, "scene_id": views.scene_id,
            "category": views.category, "stage": 2, "shared": self.shared_hash, "cohort": cohort,
            "seconds": fitted.seconds + packing, "settings_hash": settings_hash(self.settings),
            "seed": self.settings.seed,
        }  # fmt: skip

    def _commit(self, rows: list[dict[str, Any]], attempt: int, batch: Sequence[str]) -> Part | None:
        name = part_name(self.epoch, attempt, batch)
        return commit_part(self.run.library.folder, rows, name) if rows else None


class SceneFitter(Fitter):
    """Mode frozen: the scenes of a batch share its cost and nothing else.

    Several calls of `fit` at once are a pipeline: one batch is made ready, another one fitted, a third one evaluated,
    each by one thread at a time; a commit waits for nobody. Where an actor has no more than one core, only commits run
    beside other work. What becomes of a batch does not depend on the others.
    """

    def __init__(self, job: FitJob) -> None:
        super().__init__(job)
        self.core: Any = nullcontext() if job.overlaps else threading.Lock()
        self.preparing, self.fitting, self.finishing = threading.Lock(), threading.Lock(), threading.Lock()

    def fit(self, batch: pa.Table, attempt: int) -> Fitted:
        """Fit and commit a batch of store rows. Raises OSError where the part cannot be written."""
        _one_thread()
        with watchdog.Watchdog(self.settings.stage2.stall_seconds):
            with self.core:
                with self.preparing:
                    scenes, unread = _decode(batch, self.settings.data.image_size)
                    ready = self._ready(scenes)
                with self.fitting:
                    fitted = self._fit(scenes, ready)
                with self.finishing:
                    rows, failed = self._finished_rows(self.shared, None, scenes, fitted)
            part = self._commit(rows, attempt, batch["scene_id"].to_pylist())
            return Fitted(unread + failed + fitted_outcomes(rows, fitted), part)

    def _ready(self, scenes: list[SceneViews]) -> list[EncodedScene | Exception]:
        ready = []
        for views in scenes:
            ready.append(_attempt(partial(ready_scene, self.shared, views)))
            watchdog.beat()
        return ready

    def _fit(self, scenes: list[SceneViews], ready: list[EncodedScene | Exception]) -> list[FittedScene | Exception]:
        """Fit those of a batch's scenes that are ready. → a result or an exception for each."""
        for index, views in enumerate(scenes):
            if isinstance(ready[index], torch.OutOfMemoryError):  # there is more memory now than beside another fit
                [ready[index]] = self._ready([views])
        fitted = iter(self._fit_halves([scene for scene in ready if not isinstance(scene, Exception)]))
        return [scene if isinstance(scene, Exception) else next(fitted) for scene in ready]

    def _fit_halves(self, scenes: list[EncodedScene]) -> list[FittedScene | Exception]:
        """Fit scenes together; where this raises (memory may be short), their halves, down to single scenes."""
        if not scenes:
            return []
        fitted = _attempt(lambda: self._fit_together(scenes))
        if not isinstance(fitted, Exception):
            return list(fitted)
        if len(scenes) == 1:
            return [fitted]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(scenes) // 2
        return self._fit_halves(scenes[:middle]) + self._fit_halves(scenes[middle:])

    def _fit_together(self, scenes: list[EncodedScene]) -> list[FittedScene]:
        return list(fit_ready(self.shared, scenes, self.settings))


def _one_thread() -> None:
    """Let this thread, and BLAS in all threads, use one core: with more, the order of sums, and so the planes, would
    depend on how many actors share the machine."""
    torch.set_num_threads(1)
    one_blas_thread()


def _decode(batch: pa.Table, image_size: int) -> tuple[list[SceneViews], list[Outcome]]:
    """Decode store rows. → their scenes, and outcomes of the rows that cannot be used."""
    scenes, outcomes = [], []
    for row in batch.to_pylist():
        unread = row.pop("error")
        try:
            if unread:
                raise SceneError(row["scene_id"], "", unread)
            scenes.append(views_from_row(row, image_size))
        except SceneError as error:
            outcomes.append(Outcome(row["scene_id"], "bad input", str(error)))
    return scenes, outcomes


def _attempt(work: Callable[[], Any]) -> Any:
    """Call `work`. → what it returns, or the exception that it raised, without the frames that keep its tensors alive.

    A GPU that has failed fails every later call, too, so the process ends, and the driver starts another one. A full
    disk fails every scene, so its error is raised and ends the job.
    """
    try:
        return work()
    except torch.AcceleratorError:
        os._exit(1)
    except OSError as error:
        if error.errno in atomic.FULL:
            raise
        return error.with_traceback(None)
    except Exception as error:
        return error.with_traceback(None)


def _kind(error: Exception) -> str:
    """The kind of a failure: why a scene has no result."""
    if isinstance(error, NotFinite | Diverged):
        return "diverged"
    return "out of memory" if isinstance(error, torch.OutOfMemoryError | MemoryError) else "raised"


def fitted_outcomes(rows: Sequence[dict[str, Any]], fitted: Sequence[FittedScene | Exception]) -> list[Outcome]:
    """The outcomes of scenes that have a library row. fitted: results of all scenes of the batch or cohort."""
    told = {scene.scene_id: scene.warning for scene in fitted if not isinstance(scene, Exception)}
    return [Outcome(row["scene_id"], FITTED, told.get(row["scene_id"], ""), row["psnr"]) for row in rows]
