"""Stage 2 on Ray actors: every further scene on top of the shared model.

1. Ray Data reads the scenes that are neither committed nor given up, in bounded batches (mode cohort: ids alone);
2. actors that pin one GPU each (or a share of the CPUs) hold the shared model and take one batch at a time:
   encode once, 2a, 2b, pack, evaluate what was packed, commit the batch as one part of the library;
3. the driver keeps the ledger: a scene that fails is recorded, a batch whose actor died is tried again, mode frozen in
   halves, mode cohort from its last epoch; the manifest says what is committed and what failed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from scaling.config import Settings
from scaling.data.stores import EMBEDDED, SourceSpec
from scaling.distributed.cluster import gpus_now, share, share_for_actors
from scaling.distributed.job import Job
from scaling.distributed.prepare import batches_of, bound_reading, scene_dataset
from scaling.distributed.stage2.actors import CohortFitter, FitJob, Fitter, SceneFitter, cohort_checkpoints
from scaling.distributed.stage2.dispatcher import Dispatcher
from scaling.distributed.stage2.messages import Counts
from scaling.library.compact import compact_after_job, forget_after_job
from scaling.library.ledger import Ledger, open_ledger
from scaling.library.lpips_values import measure_lpips
from scaling.library.run_folder import RunFolder, settings_hash
from scaling.library.stored_models import StoredModels
from scaling.library.summary import summarise
from scaling.models.shared_files import read_hash
from scaling.pictures.of_runs import log_scene_pictures
from scaling.storage.paths import AnyPath, uri_of
from scaling.training.fit_cohort import epochs_done
from scaling.training.metrics.lpips import read_lpips

if TYPE_CHECKING:
    from scaling.distributed.tracking import Tracker

PICTURED_SCENES = 8
FITTERS: dict[str, type[Fitter]] = {"frozen": SceneFitter, "cohort": CohortFitter}


@dataclass(frozen=True)
class Stage2Job(Job):
    """shared_folder: the shared model; num_actors: None: as many as the cluster can hold; retry_failed: whether scenes
    that were given up are tried again; fitter: what an actor runs, None: the one of the mode; join_parts: whether many
    small parts of the library become few large ones at the end; lpips_weights: the file with which this process
    measures LPIPS at the end."""

    shared_folder: AnyPath = field(kw_only=True)
    num_actors: int | None = None
    retry_failed: bool = False
    fitter: type[Fitter] | None = None
    join_parts: bool = True
    lpips_weights: AnyPath | None = None

    @property
    def batch_size(self) -> int:
        """Scenes that an actor is given at once: mode cohort's belong together."""
        stage2 = self.settings.stage2
        if stage2.mode == "cohort":
            return stage2.cohort_size or len(self.scene_ids)
        return stage2.scenes_per_batch

    @property
    def noted(self) -> dict[str, Any]:
        """What config.yaml and MLflow say of the job beside its settings."""
        store, shared = self.spec.store or EMBEDDED, uri_of(self.shared_folder)
        return {"num_scenes": len(self.scene_ids), "store": store, "shared": shared}


def fit_stage2(job: Stage2Job) -> dict[str, Any]:
    """Fits the job's scenes, or those of them that are not fitted yet. → the run's metrics.

    Raises SettingsError where more actors are asked for than there are GPUs, LeaseHeld where another driver works on
    the run, ValueError for wrong weights of LPIPS. Failed scenes raise nothing: they are in the metrics.
    """
    if job.num_actors:
        share(job.resources, job.num_actors, reserve_cpu=True)  # wrong use is told before anything is written
    if job.lpips_weights:
        read_lpips(job.lpips_weights)
    with open_ledger(job.run) as ledger:
        shared_hash = read_hash(job.shared_folder)  # whether the tensors are of it is what every actor looks at
        ledger.check_shared(shared_hash)
        settled = _settled(job)
        if ledger.other_settings(settings_hash(job.settings)):
            print(f"warning: {job.run.path} holds scenes fitted with other stage-2 settings; they stay as they are")
        job.run.write_config("stage2", job.settings, job.noted)
        metrics = _fit(job, ledger, shared_hash, settled)
        if job.join_parts:
            forget_after_job(ledger)
        return metrics


def _settled(job: Stage2Job) -> set[str]:
    """The scenes that need no fit: those that are in the library, and those that were given up."""
    settled = set(job.run.library.ids())
    if not job.retry_failed:
        settled |= set(job.run.given_up())
    left = sum(scene_id not in settled for scene_id in job.scene_ids)
    print(f"stage 2: {left} scenes to fit, {len(job.scene_ids) - left} already done or given up", flush=True)
    return settled


def _fit(job: Stage2Job, ledger: Ledger, shared_hash: str, settled: Collection[str]) -> dict[str, Any]:
    """Batches of what is left to actors, until all are accounted for; then what a job leaves. → the run's metrics."""
    rows = job.spec.with_latents(shared_hash)
    if rows.latents:
        print(f"stage 2: cached latents are used ({job.spec.store}/latents/{shared_hash[:12]}…)", flush=True)
    todo = [scene_id for scene_id in job.scene_ids if scene_id not in settled]
    dispatcher = _dispatcher(job, ledger, rows, shared_hash, num_batches=-(-len(todo) // job.batch_size))
    batches = _cohorts(job, settled) if job.settings.stage2.mode == "cohort" else _rows(job, rows, todo)
    start, already = time.time(), len(job.run.library.ids(stage=2))
    with closing(batches), closing(dispatcher.run(batches, len(todo))) as progress:
        next(progress, None)  # the actors start meanwhile, for seconds
        with _tracked(job) as tracker:
            for counts in progress:
                _track(tracker, counts, time.time() - start, already)
            ledger.publish()
            return _finish(job, ledger, tracker)


def _finish(job: Stage2Job, ledger: Ledger, tracker: Tracker) -> dict[str, Any]:
    """Joins parts, measures, draws. → the run's metrics."""
    if job.join_parts:
        compact_after_job(ledger)
    if job.lpips_weights:
        measure_lpips(job.run, job.lpips_weights)
    metrics = summarise(job.run)
    tracker.log_summary(metrics)
    for path in (job.run.metrics, job.run.path / "scenes.parquet"):
        tracker.log_file(path)
    fitted = set(job.run.library.ids(stage=2))
    shown = [scene_id for scene_id in job.scene_ids if scene_id in fitted][:PICTURED_SCENES]
    log_scene_pictures(job.run, job.spec.open(), shown, "stage2", tracker.log_image, StoredModels(job.run))
    return metrics


def _dispatcher(job: Stage2Job, ledger: Ledger, rows: SourceSpec, shared_hash: str, num_batches: int) -> Dispatcher:
    """Actors that fit, as many as the cluster can hold: on GPUs as many as there are at the moment."""
    settings, parts = job.settings, share_for_actors(job.resources, job.num_actors, num_batches)
    fit_job = FitJob(
        uri_of(job.run.path), uri_of(job.shared_folder), settings.model_dump(), astuple(rows), ledger.epoch
    )
    actor = ray.remote(job.fitter or FITTERS[settings.stage2.mode]).options(
        num_cpus=parts.cpus, num_gpus=parts.gpus, scheduling_strategy="SPREAD", max_restarts=0, max_task_retries=0
    )

    def wanted() -> int:
        if not parts.gpus:
            return parts.workers
        return job.num_actors or max(job.resources.gpus_asked, gpus_now())

    cohort = settings.stage2.mode == "cohort"
    return Dispatcher(
        make_actor=lambda: actor.remote(fit_job),
        wanted=wanted,
        max_attempts=settings.stage2.max_attempts,
        deadline=settings.stage2.deadline_seconds,
        accounts=ledger,
        cohorts=_CohortEpochs(ledger.run, shared_hash, settings) if cohort else None,
    )


def _rows(job: Stage2Job, rows: SourceSpec, todo: list[str]) -> Generator[pa.Table]:
    """Mode frozen: rows of the scenes that are left, read as they are needed."""
    bound_reading()
    dataset = scene_dataset(rows, todo, rows_per_block=job.batch_size)
    with closing(batches_of(dataset, job.batch_size)) as batches:
        yield from batches


def _cohorts(job: Stage2Job, settled: Collection[str]) -> Generator[pa.Table]:
    """Mode cohort: ids of the members. Fixed chunks of all ids, each without the scenes that are settled, so that going
    on never mixes cohorts."""
    for start in range(0, len(job.scene_ids), job.batch_size):
        members = job.scene_ids[start : start + job.batch_size]
        left = [scene_id for scene_id in members if scene_id not in settled]
        if left:
            yield pa.table({"scene_id": left})


class _CohortEpochs:
    """How far the cohorts in flight have come, as their checkpoints say."""

    def __init__(self, run: RunFolder, shared_hash: str, settings: Settings) -> None:
        self.run, self.shared_hash, self.settings = run, shared_hash, settings

    def text(self) -> str:
        """The epochs that each has done, for the progress bar."""
        total = self.settings.stage2.latent.num_epochs + self.settings.stage2.rgb.num_epochs
        try:
            done = sorted(epochs_done(folder) for folder in (self.run.checkpoints / "cohorts").iterdir())
        except OSError:  # none has begun, or an actor took a finished one's folder away meanwhile
            return ""
        return " ".join(["cohorts at epoch", *[f"{epochs}/{total}" for epochs in done]]) if done else ""

    def epochs(self, ids: list[str]) -> int:
        """Epochs that the cohort of these scenes has behind it."""
        return epochs_done(cohort_checkpoints(self.run, self.shared_hash, self.settings, ids))


@contextmanager
def _tracked(job: Stage2Job) -> Iterator[Tracker]:
    """The MLflow run of stage 2, which ends as the block does."""
    from scaling.distributed.tracking import Tracker  # more than a second, which the actors need not wait for

    tracker = Tracker(job.run, "stage2", tags={"preset": job.preset})
    tracker.log_settings(job.settings, job.noted)
    try:
        yield tracker
    except BaseException as error:
        tracker.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracker.end()


def _track(tracker: Tracker, counts: Counts, seconds: float, already: int) -> None:
    values = {"stage2/scenes_per_hour": 3600 * counts.done / seconds, "stage2/failed": float(counts.failed)}
    tracker.log_metrics({**values, "stage2/psnr": counts.mean_psnr}, step=already + counts.done)
