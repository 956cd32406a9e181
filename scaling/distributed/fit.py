"""Stage 2 on Ray actors: every further scene on top of the shared model.

1. Ray Data reads the scenes that are neither committed nor given up, in bounded batches (mode cohort: ids alone);
2. actors that pin one GPU each (or a share of the CPUs) hold the shared model and take one batch at a time:
   encode once, 2a, 2b, pack, evaluate what was packed, commit the batch as one part of the library;
3. the driver keeps the count: a scene that fails is recorded, a batch whose actor died is tried again, mode frozen
   scene by scene, mode cohort from its last epoch.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from scaling.config import Settings
from scaling.data.scene_source import EMBEDDED, SourceSpec
from scaling.distributed.cluster import Resources, share
from scaling.distributed.dispatch import Counts, Dispatcher
from scaling.distributed.fitters import CohortFitter, FitJob, SceneFitter, cohort_checkpoints
from scaling.distributed.prepare import bound_reading, scene_dataset
from scaling.distributed.tracking import Tracker
from scaling.library.failures import FailureLog, given_up
from scaling.library.pictures import log_scene_pictures
from scaling.library.run_folder import RunFolder, settings_hash
from scaling.library.stored_models import StoredModels
from scaling.library.summary import summarise
from scaling.models.shared import load_shared
from scaling.training.cohort import epochs_done

PICTURED_SCENES = 8


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

    Raises SettingsError where more actors are asked for than there are GPUs. Failed scenes raise nothing: they are in
    the metrics.
    """
    cohort = settings.stage2.mode == "cohort"
    batch = (settings.stage2.cohort_size or len(scene_ids)) if cohort else settings.stage2.scenes_per_batch
    shared, shared_hash = load_shared(shared_folder)
    run.check_library(shared_hash)
    settled = set(run.library.ids())
    if not retry_failed:
        settled |= set(given_up(run.failures))
    todo = [scene_id for scene_id in scene_ids if scene_id not in settled]
    parts = share(resources, num_actors or _default_actors(resources, len(todo), batch), reserve_cpu=True)
    folder = str(shared_folder.absolute())
    job = {"num_scenes": len(scene_ids), "store": spec.store or EMBEDDED, "shared": folder}
    _warn_of_other_settings(run, settings)
    run.write_config("stage2", settings, job)
    tracker = Tracker(run, "stage2")
    tracker.log_settings(settings, job)
    print(f"stage 2: {len(todo)} scenes to fit, {len(scene_ids) - len(todo)} already done or given up", flush=True)
    try:
        if todo:
            fit_job = FitJob(str(run.path.absolute()), folder, settings.model_dump(), astuple(spec))
            fitter: Any = CohortFitter if cohort else SceneFitter
            options = {"num_cpus": parts.cpus, "num_gpus": parts.gpus, "max_restarts": 0, "max_task_retries": 0}
            dispatcher = Dispatcher(
                make_actor=lambda: ray.remote(fitter).options(**options).remote(fit_job),
                num_actors=parts.workers,
                max_attempts=settings.stage2.max_attempts,
                failures=FailureLog(run.failures),
                committed=lambda: set(run.library.ids()),
                cohorts=_CohortEpochs(run, shared_hash, settings) if cohort else None,
            )
            batches = _cohorts(scene_ids, batch, settled) if cohort else _batches(spec, todo, batch)
            start, already = time.time(), len(run.library.ids(stage=2))
            for counts in dispatcher.run(batches, len(todo)):
                _track(tracker, counts, time.time() - start, already)
        metrics = summarise(run)
        tracker.log_summary(metrics)
        for path in (run.metrics, run.path / "scenes.parquet"):
            tracker.log_file(path)
        _pictures(run, spec, scene_ids, tracker, StoredModels(run, known={shared_hash: shared}))
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


def _cohorts(ids: Sequence[str], size: int, settled: Collection[str]) -> Iterator[pa.Table]:
    """Fixed chunks of all ids, each without the scenes that are done or given up: going on never mixes cohorts."""
    for start in range(0, len(ids), size):
        members = [scene_id for scene_id in ids[start : start + size] if scene_id not in settled]
        if members:
            yield pa.table({"scene_id": members})


class _CohortEpochs:
    """How far the cohorts in flight have come, as their checkpoints say."""

    def __init__(self, run: RunFolder, shared_hash: str, settings: Settings) -> None:
        self.run, self.shared_hash, self.settings = run, shared_hash, settings
        self.at_last_death: dict[Path, int] = {}

    def text(self) -> str:
        """The epochs that each has done, for the progress bar."""
        total = self.settings.stage2.latent.num_epochs + self.settings.stage2.rgb.num_epochs
        try:
            done = sorted(epochs_done(folder) for folder in (self.run.checkpoints / "cohorts").iterdir())
        except OSError:  # none has begun, or an actor took a finished one's folder away meanwhile
            return ""
        return " ".join(["cohorts at epoch", *[f"{epochs}/{total}" for epochs in done]]) if done else ""

    def advanced(self, ids: list[str]) -> bool:
        """Whether this cohort has come further than when its actor died the last time."""
        folder = cohort_checkpoints(self.run, self.shared_hash, self.settings, ids)
        before, now = self.at_last_death.get(folder, 0), epochs_done(folder)
        self.at_last_death[folder] = now
        return now > before


def _track(tracker: Tracker, counts: Counts, seconds: float, already: int) -> None:
    values = {"stage2/scenes_per_hour": 3600 * counts.done / seconds, "stage2/failed": float(counts.failed)}
    tracker.log_metrics({**values, "stage2/psnr": counts.mean_psnr}, step=already + counts.done)


def _pictures(run: RunFolder, spec: SourceSpec, ids: list[str], tracker: Tracker, models: StoredModels) -> None:
    fitted = set(run.library.ids(stage=2))
    chosen = [scene_id for scene_id in ids if scene_id in fitted][:PICTURED_SCENES]
    log_scene_pictures(run, spec.open(), chosen, "stage2", tracker.log_image, models)
