"""Stage 2 on Ray actors: every further scene on top of the shared model.

1. Ray Data reads the scenes that are neither committed nor given up, in bounded batches;
2. actors that pin one GPU each (or a share of the CPUs) hold the shared model and take one batch at a time:
   encode once, 2a, 2b, pack, evaluate what was packed, commit the batch as one part of the library;
3. the driver keeps the count: a scene that fails is recorded, a batch whose actor died is tried again scene by scene.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch

from scaling.config import Settings, SettingsError, make_settings
from scaling.data.scene_source import EMBEDDED, SourceSpec
from scaling.data.scenes import SceneError, SceneViews, views_from_row
from scaling.distributed.cluster import Resources, share
from scaling.distributed.dispatch import Counts, Dispatcher
from scaling.distributed.prepare import bound_reading, scene_dataset
from scaling.distributed.tracking import Tracker
from scaling.library.failures import FailureLog, given_up
from scaling.library.fitted_scenes import NotFinite, commit_part, pack_scene, unpack_scene
from scaling.library.pictures import log_scene_pictures
from scaling.library.run_folder import RunFolder, settings_hash
from scaling.library.summary import summarise
from scaling.models.shared import SharedModel, load_shared
from scaling.training.evaluate import evaluate_scene
from scaling.training.stage2 import FittedScene, fit_scenes, unused_rates

PICTURED_SCENES = 8


@dataclass(frozen=True)
class FitJob:
    """What an actor needs to know, in plain values."""

    run: str
    shared: str
    settings: dict[str, Any]
    threads: int


@ray.remote(max_restarts=0, max_task_retries=0)
class SceneFitter:
    """Holds the shared model on its device and fits batches of scenes."""

    def __init__(self, job: FitJob) -> None:
        torch.set_num_threads(job.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.settings = make_settings(job.settings)
        self.run = RunFolder(Path(job.run))
        self.shared, self.shared_hash = load_shared(Path(job.shared), self.device)

    def ready(self) -> bool:
        return True

    def fit(self, rows: pa.Table) -> list[dict[str, Any]]:
        """Fits and commits a batch of store rows. → one outcome a scene: scene_id, kind (`fitted` or why not),
        message, psnr."""
        outcomes: list[dict[str, Any]] = []
        scenes: list[SceneViews] = []
        for row in rows.to_pylist():
            unread = row.pop("error")
            try:
                if unread:
                    raise SceneError(row["scene_id"], "", unread)
                scenes.append(views_from_row(row, self.settings.data.image_size))
            except SceneError as error:
                outcomes.append(_outcome(row["scene_id"], "bad input", str(error)))
        done = []
        for views, fitted in zip(scenes, self._fit(scenes)):
            finished = fitted if isinstance(fitted, Exception) else self._row(views, fitted)
            if isinstance(finished, Exception):
                kind = "diverged" if isinstance(finished, NotFinite) else "raised"
                outcomes.append(_outcome(views.scene_id, kind, f"{type(finished).__name__}: {finished}"))
            else:
                done.append(finished)
        if done:
            commit_part(self.run.library.folder, done)
        return outcomes + [_outcome(row["scene_id"], "fitted", "", row["psnr"]) for row in done]

    def _fit(self, scenes: list[SceneViews]) -> list[FittedScene | Exception]:
        """A batch together; where that raises, each scene alone, so that one cannot take the others with it."""
        if not scenes:
            return []
        fitted = _attempt(lambda: list(fit_scenes(self.shared, scenes, self.settings)))
        if not isinstance(fitted, Exception):
            return list(fitted)
        return [fitted] if len(scenes) == 1 else [self._fit([views])[0] for views in scenes]

    def _row(self, views: SceneViews, fitted: FittedScene) -> dict[str, Any] | Exception:
        return _attempt(lambda: self._packed_and_evaluated(views, fitted))

    def _packed_and_evaluated(self, views: SceneViews, fitted: FittedScene) -> dict[str, Any]:
        start = time.perf_counter()
        packed = vars(pack_scene(fitted.params, self.settings.stage2.micro_dtype))
        packing = time.perf_counter() - start
        stored = unpack_scene({**packed, "scene_id": views.scene_id})[None]  # what readers will see
        on_device = type(stored)(stored.micro_planes.to(self.device), stored.coefs.to(self.device))
        return {
            **packed, **evaluate_scene(self.shared, on_device, views), "scene_id": views.scene_id,
            "category": views.category, "stage": 2, "shared": self.shared_hash, "cohort": None,
            "seconds": fitted.seconds + packing, "settings_hash": settings_hash(self.settings),
            "seed": self.settings.seed,
        }  # fmt: skip


def _attempt(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the exception that it raised, without the frames that would keep its tensors alive.

    A GPU that has failed fails every later call too, so the process ends, and the driver starts another one.
    """
    try:
        return work()
    except torch.AcceleratorError:
        os._exit(1)
    except Exception as error:
        return error.with_traceback(None)


def _outcome(scene_id: str, kind: str, message: str, psnr: float | None = None) -> dict[str, Any]:
    return {"scene_id": scene_id, "kind": kind, "message": message, "psnr": psnr}


def fit_stage2(
    run: RunFolder,
    shared_folder: Path,
    settings: Settings,
    spec: SourceSpec,
    scene_ids: list[str],
    resources: Resources,
    num_actors: int | None,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """Fits `scene_ids`, or those of them that are not fitted yet. → the run's metrics.

    Raises ValueError where more actors than GPUs are asked for. Failed scenes raise nothing: they are in the metrics.
    """
    if settings.stage2.mode == "cohort":
        raise SettingsError(
            "stage2.mode: cohort is not built yet; frozen fits every scene on the shared model as it is"
        )
    batch = settings.stage2.scenes_per_batch
    shared, shared_hash = load_shared(shared_folder)
    run.check_library(shared_hash)
    left_over = set(run.library.ids())
    if not retry_failed:
        left_over |= set(given_up(run.failures))
    todo = [scene_id for scene_id in scene_ids if scene_id not in left_over]
    folder = str(shared_folder.absolute())
    job = {"num_scenes": len(scene_ids), "store": spec.store or EMBEDDED, "shared": folder}
    _warn_of_other_settings(run, settings)
    run.write_config("stage2", settings, job)
    tracker = Tracker(run, "stage2")
    tracker.log_settings(settings, job)
    if unused_rates(settings):
        print(f"mode frozen moves scenes alone; these rates are not used: {', '.join(unused_rates(settings))}")
    print(f"stage 2: {len(todo)} scenes to fit, {len(scene_ids) - len(todo)} already done or given up", flush=True)
    try:
        if todo:
            parts = share(resources, num_actors or _default_actors(resources, len(todo), batch), reserve_cpu=True)
            fit_job = FitJob(str(run.path.absolute()), folder, settings.model_dump(), parts.threads)
            actor_class: Any = SceneFitter  # Ray's decorator hides the class from type checkers
            options = {"num_cpus": parts.cpus, "num_gpus": parts.gpus}
            dispatcher = Dispatcher(
                make_actor=lambda: actor_class.options(**options).remote(fit_job),
                num_actors=parts.workers,
                max_attempts=settings.stage2.max_attempts,
                failures=FailureLog(run.failures),
                committed=lambda: set(run.library.ids()),
            )
            start, already = time.time(), len(run.library.ids(stage=2))
            for counts in dispatcher.run(_batches(spec, todo, batch), len(todo)):
                _track(tracker, counts, time.time() - start, already)
        metrics = summarise(run)
        tracker.log_summary(metrics)
        for path in (run.metrics, run.path / "scenes.parquet"):
            tracker.log_file(path)
        _pictures(run, shared, spec, scene_ids, tracker)
    except BaseException:
        tracker.end("FAILED")
        raise
    tracker.end()
    return metrics


def _warn_of_other_settings(run: RunFolder, settings: Settings) -> None:
    rows = run.library.table(["stage", "settings_hash"]).to_pylist()
    if {row["settings_hash"] for row in rows if row["stage"] == 2} - {settings_hash(settings)}:
        print(f"warning: {run.path} holds scenes fitted with other stage-2 settings; they stay as they are")


def _default_actors(resources: Resources, num_scenes: int, batch: int) -> int:
    """One per GPU; on CPUs one per core, which wastes less than threads do, but no more than there are batches."""
    return resources.gpus or max(1, min(resources.cpus, -(-num_scenes // batch)))


def _batches(spec: SourceSpec, ids: list[str], batch: int) -> Iterator[pa.Table]:
    bound_reading()
    dataset = scene_dataset(spec, ids, rows_per_block=batch)
    yield from dataset.iter_batches(batch_size=batch, prefetch_batches=1, batch_format="pyarrow")


def _track(tracker: Tracker, counts: Counts, seconds: float, already: int) -> None:
    values = {"stage2/scenes_per_hour": 3600 * counts.done / seconds, "stage2/failed": float(counts.failed)}
    tracker.log_metrics({**values, "stage2/psnr": counts.mean_psnr}, step=already + counts.done)


def _pictures(run: RunFolder, shared: SharedModel, spec: SourceSpec, ids: list[str], tracker: Tracker) -> None:
    fitted = set(run.library.ids(stage=2))
    chosen = [scene_id for scene_id in ids if scene_id in fitted][:PICTURED_SCENES]
    log_scene_pictures(run, shared, spec.open(), chosen, "stage2", tracker.log_image)
