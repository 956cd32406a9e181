"""Stage 2 on Ray actors: every further scene on top of the shared model.

1. Ray Data reads the scenes that are neither committed nor given up, in bounded batches (mode cohort: ids alone);
2. actors that pin one GPU each (or a share of the CPUs) hold the shared model and take one batch at a time:
   encode once, 2a, 2b, pack, evaluate what was packed, commit the batch as one part of the library;
3. the driver keeps the ledger: a scene that fails is recorded, a batch whose actor died is tried again, mode frozen in
   halves, mode cohort from its last epoch; the manifest says what is committed and what failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from scaling.config import Settings
from scaling.data.stores import EMBEDDED, SourceSpec
from scaling.distributed.cluster import Resources, gpus_now, share, share_for_actors
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


def fit_stage2(
    run: RunFolder,
    shared_folder: AnyPath,
    settings: Settings,
    spec: SourceSpec,
    scene_ids: list[str],
    resources: Resources,
    num_actors: int | None,
    retry_failed: bool = False,
    fitter: type[Fitter] | None = None,
    join_parts: bool = True,
    preset: str = "",
    lpips_weights: AnyPath | None = None,
) -> dict[str, Any]:
    """Fits `scene_ids`, or those of them that are not fitted yet. → the run's metrics.

    fitter: what an actor runs, by default the one of the mode; join_parts: whether many small parts of the library
    become few large ones at the end; preset: whose settings these are, for people who compare runs; lpips_weights: the
    file with which this process measures LPIPS at the end. Raises SettingsError where more actors are asked for than
    there are GPUs, LeaseHeld where another driver works on the run, ValueError for wrong weights.
    Failed scenes raise nothing: they are in the metrics.
    """
    if num_actors:
        share(resources, num_actors, reserve_cpu=True)  # wrong use is told before anything is written
    if lpips_weights:
        read_lpips(lpips_weights)
    with open_ledger(run) as ledger:
        shared_hash = read_hash(shared_folder)  # whether the tensors are of it is what every actor looks at
        ledger.check_shared(shared_hash)
        settled = set(run.library.ids())
        if not retry_failed:
            settled |= set(run.given_up())
        todo = [scene_id for scene_id in scene_ids if scene_id not in settled]
        size = _batch_size(settings, len(scene_ids))
        staff = _staff(resources, num_actors, -(-len(todo) // size))
        folder = uri_of(shared_folder)
        job = {"num_scenes": len(scene_ids), "store": spec.store or EMBEDDED, "shared": folder}
        if ledger.other_settings(settings_hash(settings)):
            print(f"warning: {run.path} holds scenes fitted with other stage-2 settings; they stay as they are")
        run.write_config("stage2", settings, job)
        print(f"stage 2: {len(todo)} scenes to fit, {len(scene_ids) - len(todo)} already done or given up", flush=True)
        rows = spec.with_latents(shared_hash)
        if rows.latents:
            print(f"stage 2: cached latents are used ({spec.store}/latents/{shared_hash[:12]}…)", flush=True)
        fit_job = FitJob(uri_of(run.path), folder, settings.model_dump(), astuple(rows), ledger.epoch)
        runs = fitter or FITTERS[settings.stage2.mode]
        dispatcher = _dispatcher(ledger, fit_job, runs, staff, shared_hash, settings)
        batches = _batches(settings, rows, scene_ids, settled, size)
        start, already = time.time(), len(run.library.ids(stage=2))
        with closing(batches), closing(dispatcher.run(batches, len(todo))) as progress:
            next(progress, None)  # the actors start meanwhile, for seconds
            with _tracked(run, settings, job, preset) as tracker:
                for counts in progress:
                    _track(tracker, counts, time.time() - start, already)
                ledger.publish()
                if join_parts:
                    compact_after_job(ledger)
                if lpips_weights:
                    measure_lpips(run, lpips_weights)
                metrics = summarise(run)
                tracker.log_summary(metrics)
                for path in (run.metrics, run.path / "scenes.parquet"):
                    tracker.log_file(path)
                _pictures(run, spec, scene_ids, tracker)
        if join_parts:
            forget_after_job(ledger)
        return metrics


@dataclass(frozen=True)
class _Staff:
    """resources: of one actor; wanted: how many the cluster can hold now."""

    resources: dict[str, Any]
    wanted: Callable[[], int]


def _staff(resources: Resources, num_actors: int | None, num_batches: int) -> _Staff:
    """On GPUs as many as there are at the moment."""
    parts = share_for_actors(resources, num_actors, num_batches)
    asked = {"num_cpus": parts.cpus, "num_gpus": parts.gpus, "scheduling_strategy": "SPREAD"}
    if not parts.gpus:
        return _Staff(asked, lambda: parts.workers)
    return _Staff(asked, lambda: num_actors or max(resources.gpus_asked, gpus_now()))


def _dispatcher(
    ledger: Ledger, job: FitJob, fitter: type[Fitter], staff: _Staff, shared_hash: str, settings: Settings
) -> Dispatcher:
    actor = ray.remote(fitter).options(**staff.resources, max_restarts=0, max_task_retries=0)
    cohort = settings.stage2.mode == "cohort"
    return Dispatcher(
        make_actor=lambda: actor.remote(job),
        wanted=staff.wanted,
        max_attempts=settings.stage2.max_attempts,
        deadline=settings.stage2.deadline_seconds,
        accounts=ledger,
        cohorts=_CohortEpochs(ledger.run, shared_hash, settings) if cohort else None,
    )


def _batch_size(settings: Settings, num_scenes: int) -> int:
    if settings.stage2.mode == "cohort":
        return settings.stage2.cohort_size or num_scenes
    return settings.stage2.scenes_per_batch


def _batches(
    settings: Settings, spec: SourceSpec, ids: list[str], settled: Collection[str], size: int
) -> Generator[pa.Table]:
    """Mode frozen: rows of the scenes that are left, read as they are needed; mode cohort: ids of the members."""
    if settings.stage2.mode == "cohort":
        yield from _cohorts(ids, size, settled)
        return
    bound_reading()
    dataset = scene_dataset(spec, [scene_id for scene_id in ids if scene_id not in settled], rows_per_block=size)
    with closing(batches_of(dataset, size)) as batches:
        yield from batches


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
def _tracked(run: RunFolder, settings: Settings, job: dict[str, Any], preset: str) -> Iterator[Tracker]:
    """The MLflow run of stage 2, which ends as the block does."""
    from scaling.distributed.tracking import Tracker  # more than a second, which the actors need not wait for

    tracker = Tracker(run, "stage2", tags={"preset": preset})
    tracker.log_settings(settings, job)
    try:
        yield tracker
    except BaseException as error:
        tracker.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracker.end()


def _track(tracker: Tracker, counts: Counts, seconds: float, already: int) -> None:
    values = {"stage2/scenes_per_hour": 3600 * counts.done / seconds, "stage2/failed": float(counts.failed)}
    tracker.log_metrics({**values, "stage2/psnr": counts.mean_psnr}, step=already + counts.done)


def _pictures(run: RunFolder, spec: SourceSpec, ids: list[str], tracker: Tracker) -> None:
    fitted = set(run.library.ids(stage=2))
    chosen = [scene_id for scene_id in ids if scene_id in fitted][:PICTURED_SCENES]
    log_scene_pictures(run, spec.open(), chosen, "stage2", tracker.log_image, StoredModels(run))
