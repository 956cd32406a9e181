"""Stage 1 on Ray Train: one worker per GPU (or on the CPUs), a checkpoint per epoch, resumed by the same command.

1. the driver chooses the scenes and starts the workers;
2. each worker reads the scenes of its buckets and runs scaling.training.stage1 with the shared model under DDP;
3. after every epoch all workers report: losses to MLflow, a checkpoint to RUN/checkpoints/stage1;
4. the driver turns the last checkpoint into RUN/shared, the stage's fitted scenes and their pictures.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from pyarrow.fs import FileType, SubTreeFileSystem
from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.queue import Queue

from scaling.config import Settings, make_settings, merge
from scaling.data.stores import EMBEDDED
from scaling.distributed.cluster import Resources, Share, share
from scaling.distributed.job import Job
from scaling.distributed.stage1.events import Reports, Story, drain, open_queue
from scaling.distributed.stage1.finish import finish_stage1
from scaling.distributed.stage1.worker import train_worker
from scaling.distributed.tracking import Tracker, tracking_uri
from scaling.library.ledger import Ledger, open_ledger
from scaling.library.run_folder import ids_hash
from scaling.library.summary import summarise
from scaling.models.shared_model import SharedModel
from scaling.storage.atomic import replace_file
from scaling.storage.paths import AnyPath
from scaling.storage.text import shown
from scaling.training.checkpoints.checksums import clear, fault
from scaling.training.measure.box import check_bounds
from scaling.training.sampler import bucket_of
from scaling.training.stage1 import check_workers

RAYS_LIST = "checkpoint_manager_snapshot.json"
RESERVATION = "reservation.txt"
MAX_RESERVATION_BYTES = 1024


def train_stage1(job: Job, num_workers: int | None = None) -> dict[str, Any]:
    """Train the shared model on the job's scenes, or resume where a killed run stopped. → the run's metrics.

    num_workers: None: one per GPU, at most one per scene bucket. Raises SettingsError where there are more workers than
    scene buckets or GPUs, or where the run folder belongs to another job; LeaseHeld where another driver works on the
    run; NoWholeCheckpoint where no checkpoint is whole enough to resume from; RuntimeError where training failed for
    good.
    """
    job = replace(job, settings=with_absolute_folder(job.settings))
    run, settings, ids = job.run, job.settings, job.scene_ids
    with open_ledger(run) as ledger:
        noted = {"num_scenes": len(ids), "scenes_hash": ids_hash(ids), "store": job.spec.store or EMBEDDED}
        run.check_same_job("stage1", settings, noted, ignore={"stage2"})
        trained = (run.shared / "hash.txt").is_file()
        # Refuse a job that cannot run before config.yaml and MLflow note it.
        if not trained:
            each = share(job.resources, num_workers or _default_workers(settings, job.resources), reserve_cpu=False)
            check_workers(settings, each.workers)
            bucket_of(ids, settings.stage1.num_buckets)
            check_bounds(job.spec.open(), settings)
            SharedModel(settings)  # an autoencoder that cannot be loaded fails here, once, not in every worker
            run.write_config("stage1", settings, noted)
        tracker = Tracker(run, "stage1", tags={"preset": job.preset})
        try:
            if trained:
                print(f"{run.shared}: the shared model is there already")
            else:
                tracker.log_settings(settings, {**noted, "num_workers": each.workers})
                _train(job, ledger, each, tracker)
            metrics = summarise(run)
        except BaseException as error:
            tracker.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        tracker.log_summary({"stage1": metrics["stage1"], "shared_bytes": metrics["shared_bytes"]})
        tracker.end()
        return metrics


def with_absolute_folder(settings: Settings) -> Settings:
    """Make the path of a local autoencoder folder absolute: workers run in other folders."""
    named = settings.autoencoder.pretrained
    if named is None or not Path(named).is_dir():
        return settings
    return make_settings(merge(settings.model_dump(), {"autoencoder": {"pretrained": str(Path(named).absolute())}}))


def _default_workers(settings: Settings, resources: Resources) -> int:
    """One worker per GPU, at most one per scene bucket."""
    workers = min(max(resources.gpus, 1), settings.stage1.num_buckets)
    if workers < resources.gpus:
        print(f"stage 1 uses {workers} of {resources.gpus} GPUs: it has no more scene buckets (stage1.num_buckets)")
    return workers


def _train(job: Job, ledger: Ledger, each: Share, tracker: Tracker) -> None:
    run, queue = job.run, open_queue()
    trainer = _trainer(job, each, queue)
    _clear_checkpoints(trainer)
    _free_reservation(trainer)
    log = run.checkpoints / "stage1-errors.log"
    log.unlink(missing_ok=True)  # of a killed run
    result = _follow(trainer, queue, log)
    _clear_checkpoints(trainer)  # Ray keeps two of its own, but does not know those of earlier drivers
    assert result.checkpoint is not None
    if why := fault(result.checkpoint.path, result.checkpoint.filesystem):  # before all that lies there is copied here
        raise RuntimeError(f"{result.checkpoint.path}: {why}; run the same command again to go on from the one before")
    with result.checkpoint.as_directory() as folder:
        finish_stage1(ledger, Path(folder), job.settings, job.spec, tracker.log_image)


def _trainer(job: Job, each: Share, queue: Queue) -> TorchTrainer:
    run, gpu = job.run, each.gpus > 0
    # Ray may choose a group size that still counts a lost node, and then waits this long for it (60 s by default).
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    return TorchTrainer(
        train_worker,
        train_loop_config={
            "settings": job.settings.model_dump(),
            "spec": astuple(job.spec),
            "scene_ids": job.scene_ids,
            "threads": each.threads,
            "wanted": each.workers,
            "queue": queue,
        },
        torch_config=TorchConfig(backend="nccl" if gpu and _real_gpus() else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(1, each.workers) if each.workers > 1 else 1,  # type: ignore[arg-type]
            use_gpu=gpu,
            resources_per_worker={"GPU": 1} if gpu else {"CPU": each.cpus},
        ),
        run_config=RunConfig(
            name="stage1",
            **_storage(run.checkpoints),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=-1),  # `Reports` decides when to give up
            callbacks=[Reports(run.path, tracking_uri(run), queue)],  # type: ignore[list-item]
        ),
    )


def _real_gpus() -> bool:
    """Whether the cluster's GPUs exist: tests give Ray mere numbers of them.

    The driver's machine decides. If Ray has no GPU there, the GPUs of other machines count as real.
    """
    own = ray.get_runtime_context().get_node_id()
    [address] = [node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == own]
    here = [node for node in ray.nodes() if node["NodeManagerAddress"] == address and node["Resources"].get("GPU")]
    return torch.cuda.is_available() if here else torch.distributed.is_nccl_available()


def _storage(folder: AnyPath) -> dict[str, Any]:
    """Where Ray Train keeps its checkpoints, as arguments of RunConfig."""
    if isinstance(folder, Path):
        return {"storage_path": str(folder.absolute())}
    return {"storage_path": folder.path, "storage_filesystem": folder.filesystem}


def _clear_checkpoints(trainer: TorchTrainer) -> None:
    """Remove the checkpoints of killed runs, except for the last two whole ones. Raises NoWholeCheckpoint.

    Ray's own list of checkpoints is removed, too. The workers do not use it, and Ray could not start from a list that a
    crash or a full disk tore, or that names a folder which is gone.
    """
    root = _root(trainer)
    for name, why in clear(root, root.base_path).items():
        print(f"stage 1: removed checkpoint {name}, which is not whole: {shown(why)}")
    if _exists(root, RAYS_LIST):
        root.delete_file(RAYS_LIST)


def _free_reservation(trainer: TorchTrainer) -> None:
    """Cancel the reservation of a killed driver of this run, and note this driver's for the next one.

    With an elastic number of workers Ray counts what is reserved for others as taken, and it keeps a reservation for
    three minutes after its driver is gone.
    """
    root = _root(trainer)
    if _exists(root, RESERVATION):
        with root.open_input_stream(RESERVATION) as file, suppress(ValueError, RayError):  # another cluster, or busy
            coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
            ray.get(coordinator.cancel_request.remote(file.read(MAX_RESERVATION_BYTES).decode()), timeout=10)
    with root.open_output_stream(RESERVATION) as file:
        file.write(f"train-{trainer.train_run_context.run_id}".encode())  # type: ignore[attr-defined]


def _root(trainer: TorchTrainer) -> SubTreeFileSystem:
    """A file system rooted at the folder of the stage's checkpoints."""
    storage = trainer.run_config.storage_context  # type: ignore[attr-defined]
    return SubTreeFileSystem(storage.experiment_fs_path, storage.storage_filesystem)


def _exists(root: SubTreeFileSystem, name: str) -> bool:
    return root.get_file_info(name).type == FileType.File


def _follow(trainer: TorchTrainer, queue: Queue, log: AnyPath) -> ray.train.Result:
    """Run the trainer and print what comes through the queue. → the trainer's result.

    The trainer runs in a thread of its own: in the main thread Ray Train takes Ctrl-C over and never gives it back.
    Raises RuntimeError with the reason where training failed for good; `log` then holds the workers' tracebacks.
    """
    story = Story(time.time())
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(trainer.fit)
        try:
            while True:
                # Asked before the queue is emptied, so that the last events are printed, too.
                finished = not wait([future], timeout=1.0).not_done
                for line in [*story.lines(drain(queue), time.time()), *story.waiting(time.time())]:
                    print(shown(line), flush=True)
                if finished:
                    return future.result()
        except KeyboardInterrupt:
            ray.shutdown()  # ends the workers, and with them the thread that waits for them
            raise
        except TrainingFailedError as error:
            where = ""
            with suppress(OSError):  # the disk may be what failed
                replace_file(log, "\n".join(story.tracebacks).encode())
                where = f" (the workers' tracebacks: {log})"
            why = str(getattr(error, "controller_failure", error)).strip().splitlines()[-1]
            raise RuntimeError(
                f"stage 1 failed: {why}{where}; fix the cause, then run the same command again to go on"
            ) from error
