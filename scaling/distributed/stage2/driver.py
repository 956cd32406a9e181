"""Stage 2 on Ray actors: fits every further scene on top of the shared model.

1. Ray Data reads the scenes that are neither committed nor given up, in bounded batches; in mode cohort actors get ids
   alone, and read the scenes themselves;
2. actors, each with a GPU of its own (or a share of the CPUs), hold the shared model and take batches: encode once,
   2a, 2b, pack, evaluate what was packed, commit the batch as one part of the library; a batch is made ready while the
   one before it is fitted, and the one before that is evaluated;
3. the driver keeps the ledger. A scene that fails is recorded. A batch whose actor died is tried again: in halves in
   mode frozen, from its last epoch in mode cohort. The manifest says what is committed and what failed.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from scaling.config import Settings
from scaling.data.stores import EMBEDDED, SourceSpec
from scaling.distributed.cluster import actor_class, gpus_now, share, share_for_actors
from scaling.distributed.job import Job
from scaling.distributed.scene_rows import batches_of, bound_reading, scene_dataset
from scaling.distributed.stage2.actors import FitJob, Fitter, SceneFitter
from scaling.distributed.stage2.cohort_actors import CohortFitter, cohort_checkpoints
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
    """shared_folder: of the shared model; num_actors: None: as many as the cluster can hold; retry_failed: whether to
    try again the scenes that were given up; fitter: what an actor runs, None: the mode's own; join_parts: whether to
    join many small parts of the library into few large ones at the end; lpips_weights: the file of weights with which
    this process measures LPIPS at the end, None: it is not measured."""

    shared_folder: AnyPath = field(kw_only=True)
    num_actors: int | None = None
    retry_failed: bool = False
    fitter: type[Fitter] | None = None
    join_parts: bool = True
    lpips_weights: AnyPath | None = None

    @property
    def batch_size(self) -> int:
        """The number of scenes that an actor gets at once: in mode cohort a whole cohort."""
        stage2 = self.settings.stage2
        if stage2.mode == "cohort":
            return stage2.cohort_size or len(self.scene_ids)
        return stage2.scenes_per_batch

    @property
    def noted(self) -> dict[str, Any]:
        """What config.yaml and MLflow note about the job beside its settings."""
        store, shared = self.spec.store or EMBEDDED, uri_of(self.shared_folder)
        return {"num_scenes": len(self.scene_ids), "store": store, "shared": shared}


def fit_stage2(job: Stage2Job) -> dict[str, Any]:
    """Fit those of the job's scenes that are not fitted yet. → the run's metrics.

    Raises SettingsError where more actors are wanted than there are GPUs (or CPUs without them), or where the run holds
    scenes of another shared model; LeaseHeld where another driver works on the run; ValueError for wrong LPIPS weights;
    and what the dispatcher raises. Failed scenes raise nothing: they are in the metrics.
    """
    if job.num_actors:
        share(job.resources, job.num_actors, reserve_cpu=True)  # refuses too many before anything is written
    if job.lpips_weights:
        read_lpips(job.lpips_weights)
    with open_ledger(job.run) as ledger:
        shared_hash = read_hash(job.shared_folder)  # every actor checks that the tensors match it
        ledger.check_shared(shared_hash)
        settled = settled_scenes(job)
        if ledger.other_settings(settings_hash(job.settings)):
            print(f"warning: {job.run.path} holds scenes fitted with other stage-2 settings; they stay as they are")
        job.run.write_config("stage2", job.settings, job.noted)
        metrics = _fit(job, ledger, shared_hash, settled)
        if job.join_parts:
            forget_after_job(ledger)
        return metrics


def settled_scenes(job: Stage2Job) -> set[str]:
    """The scenes that need no fit: those in the library, and without retry_failed those that were given up."""
    settled = set(job.run.library.ids())
    if not job.retry_failed:
        settled |= set(job.run.given_up())
    left = sum(scene_id not in settled for scene_id in job.scene_ids)
    print(f"stage 2: {left} scenes to fit, {len(job.scene_ids) - left} already done or given up", flush=True)
    return settled


def _fit(job: Stage2Job, ledger: Ledger, shared_hash: str, settled: Collection[str]) -> dict[str, Any]:
    """Fit the scenes that are left, until all are accounted for, and finish the job. → the run's metrics."""
    source = job.spec.with_latents(shared_hash)
    if source.latents:
        print(f"stage 2: cached latents are used ({job.spec.store}/latents/{shared_hash[:12]}…)", flush=True)
    todo = [scene_id for scene_id in job.scene_ids if scene_id not in settled]
    dispatcher = _dispatcher(job, ledger, source, shared_hash, num_batches=-(-len(todo) // job.batch_size))
    batches = _cohorts(job, settled) if job.settings.stage2.mode == "cohort" else _rows(job, source, todo)
    start, already = time.time(), len(job.run.library.ids(stage=2))
    with closing(batches), closing(dispatcher.run(batches, len(todo))) as progress:
        next(progress, None)  # starts the actors, which take seconds, as does the tracker
        with _tracked(job) as tracker:
            for counts in progress:
                _track(tracker, counts, time.time() - start, already)
            ledger.publish()
            return _finish(job, ledger, tracker)


def _finish(job: Stage2Job, ledger: Ledger, tracker: Tracker) -> dict[str, Any]:
    """Join parts, measure, log, draw. → the run's metrics."""
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


def _dispatcher(job: Stage2Job, ledger: Ledger, source: SourceSpec, shared_hash: str, num_batches: int) -> Dispatcher:
    """A dispatcher whose actors fit: num_actors of them, else as many as the cluster can hold."""
    settings, parts = job.settings, share_for_actors(job.resources, job.num_actors, num_batches)
    cohort, overlaps = settings.stage2.mode == "cohort", parts.gpus > 0 or parts.threads > 1
    fit_job = FitJob(
        uri_of(job.run.path), uri_of(job.shared_folder), settings.model_dump(), astuple(source), ledger.epoch, overlaps
    )
    # One batch is fitted; where there is a device or a core for it, one more is made ready, and one evaluated.
    at_once = 1 if cohort else 3 if overlaps else 2
    actor = actor_class(job.fitter or FITTERS[settings.stage2.mode], parts, at_once)

    # Machines with GPUs join and leave during a job, so their GPUs are counted anew each time.
    def wanted() -> int:
        if not parts.gpus:
            return parts.workers
        return job.num_actors or max(job.resources.gpus_asked, gpus_now())

    return Dispatcher(
        make_actor=lambda: actor.remote(fit_job),
        wanted=wanted,
        max_attempts=settings.stage2.max_attempts,
        deadline=settings.stage2.deadline_seconds,
        accounts=ledger,
        cohorts=_CohortEpochs(ledger.run, shared_hash, settings) if cohort else None,
        at_once=at_once,
    )


def _rows(job: Stage2Job, source: SourceSpec, todo: list[str]) -> Generator[pa.Table]:
    """Mode frozen: yield rows of the scenes that are left, read as they are needed."""
    bound_reading()
    dataset = scene_dataset(source, todo, rows_per_block=job.batch_size)
    with closing(batches_of(dataset, job.batch_size)) as batches:
        yield from batches


def _cohorts(job: Stage2Job, settled: Collection[str]) -> Generator[pa.Table]:
    """Mode cohort: yield the ids of each cohort's members. Cohorts are fixed chunks of all ids, each without the scenes
    that are settled, so that a resumed run never mixes cohorts."""
    for start in range(0, len(job.scene_ids), job.batch_size):
        members = job.scene_ids[start : start + job.batch_size]
        left = [scene_id for scene_id in members if scene_id not in settled]
        if left:
            yield pa.table({"scene_id": left})


class _CohortEpochs:
    """Tells how far the cohorts in flight have come, from their checkpoints."""

    def __init__(self, run: RunFolder, shared_hash: str, settings: Settings) -> None:
        self.run, self.shared_hash, self.settings = run, shared_hash, settings

    def text(self) -> str:
        """The numbers of epochs that the cohorts have completed, for the progress bar."""
        total = self.settings.stage2.latent.num_epochs + self.settings.stage2.rgb.num_epochs
        try:
            done = sorted(epochs_done(folder) for folder in (self.run.checkpoints / "cohorts").iterdir())
        except OSError:  # none has begun, or an actor removed the folder of a finished one meanwhile
            return ""
        return " ".join(["cohorts at epoch", *[f"{epochs}/{total}" for epochs in done]]) if done else ""

    def epochs(self, ids: list[str]) -> int:
        """The number of epochs that the cohort of these scenes has completed."""
        return epochs_done(cohort_checkpoints(self.run, self.shared_hash, self.settings, ids))


@contextmanager
def _tracked(job: Stage2Job) -> Iterator[Tracker]:
    """Open the MLflow run of stage 2; it ends with the block, and with its status."""
    from scaling.distributed.tracking import Tracker  # takes more than a second; actors start meanwhile

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
