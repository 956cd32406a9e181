"""Stage 1 on Ray Train: one worker per GPU (or on the CPUs), a checkpoint per epoch, resumed by the same command.

1. the driver chooses the scenes and starts the workers;
2. each worker reads the scenes of its buckets and runs scaling.training.stage1 with the shared model under DDP;
3. after every epoch all workers report: losses to MLflow, a checkpoint to RUN/checkpoints/stage1;
4. the driver turns the last checkpoint into RUN/shared, the stage's fitted scenes and their pictures.
"""

from __future__ import annotations

import json
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scaling.config import Settings, make_settings, merge
from scaling.data.png import decode_png
from scaling.data.scene_source import EMBEDDED, SourceSpec
from scaling.data.scenes import views_from_row
from scaling.distributed.cluster import Resources, Share, largest_divisor, share
from scaling.distributed.tracking import Tracker, tracking_uri
from scaling.files import read_limited, replace_file
from scaling.library.fitted_scenes import pack_scene
from scaling.library.ledger import Ledger, open_ledger
from scaling.library.parts import commit_part, part_name
from scaling.library.pictures import log_scene_pictures
from scaling.library.render import save_png, scene_sheet
from scaling.library.run_folder import RunFolder, ids_hash, settings_hash
from scaling.library.stored_models import StoredModels
from scaling.library.summary import summarise
from scaling.models.shared import SharedModel
from scaling.models.triplanes import SceneParams
from scaling.parsing import parse_json
from scaling.training.checkpoint import load_scenes, read_progress, read_state
from scaling.training.phases import EpochReport
from scaling.training.sampler import bucket_of
from scaling.training.stage1 import Stage1, check_workers
from scaling.training.workers import Workers

SCENES_PER_PART = 256
PICTURED_SCENES = 4


def train_stage1(
    run: RunFolder,
    settings: Settings,
    spec: SourceSpec,
    scene_ids: list[str],
    resources: Resources,
    workers: int | None,
) -> dict[str, Any]:
    """Trains the shared model on `scene_ids`, or goes on where a killed run stopped. → the run's metrics.

    Raises SettingsError where the workers cannot share the buckets, or the run folder belongs to another job, LeaseHeld
    where another driver works on the run.
    """
    with open_ledger(run) as ledger:
        return _train_with(ledger, settings, spec, scene_ids, resources, workers)


def _train_with(
    ledger: Ledger,
    settings: Settings,
    spec: SourceSpec,
    scene_ids: list[str],
    resources: Resources,
    workers: int | None,
) -> dict[str, Any]:
    run = ledger.run
    settings = _with_absolute_folder(settings)
    job = {"num_scenes": len(scene_ids), "scenes_hash": ids_hash(scene_ids), "store": spec.store or EMBEDDED}
    run.check_same_job("stage1", settings, job, ignore={"stage2"})
    trained = (run.shared / "hash.txt").is_file()
    if not trained:
        parts = share(resources, workers or _default_workers(settings, resources), reserve_cpu=False)
        check_workers(settings, parts.workers)
        bucket_of(scene_ids, settings.stage1.num_buckets)
        SharedModel(settings)  # an autoencoder that cannot be loaded is told here, not by every worker
        run.write_config("stage1", settings, job)
    tracker = Tracker(run, "stage1")
    try:
        if trained:
            print(f"{run.shared}: the shared model is there already")
        else:
            tracker.log_settings(settings, {**job, "num_workers": parts.workers})
            history = run.checkpoints / f"stage1-{time.time_ns()}.jsonl"
            result = _train(_trainer(run, settings, spec, scene_ids, parts, history), history)
            assert result.checkpoint is not None
            with result.checkpoint.as_directory() as folder:
                _finish(ledger, Path(folder), settings, spec, tracker)
        metrics = summarise(run)
    except BaseException:
        tracker.end("FAILED")
        raise
    tracker.log_summary({"stage1": metrics["stage1"], "shared_bytes": metrics["shared_bytes"]})
    tracker.end()
    return metrics


def _with_absolute_folder(settings: Settings) -> Settings:
    """A local autoencoder folder as an absolute path: workers run in other folders."""
    named = settings.autoencoder.pretrained
    if named is None or not Path(named).is_dir():
        return settings
    return make_settings(merge(settings.model_dump(), {"autoencoder": {"pretrained": str(Path(named).absolute())}}))


def _default_workers(settings: Settings, resources: Resources) -> int:
    """One worker per GPU, as far as they can share the scene buckets equally."""
    workers = largest_divisor(settings.stage1.num_buckets, max(resources.gpus, 1))
    if workers < resources.gpus:
        print(
            f"{workers} of {resources.gpus} GPUs: stage1.num_buckets = {settings.stage1.num_buckets} is shared equally"
        )
    return workers


def _trainer(
    run: RunFolder, settings: Settings, spec: SourceSpec, ids: list[str], parts: Share, history: Path
) -> TorchTrainer:
    gpu = parts.gpus > 0
    return TorchTrainer(
        train_worker,
        train_loop_config={
            "settings": settings.model_dump(),
            "spec": astuple(spec),
            "scene_ids": ids,
            "threads": parts.threads,
        },
        torch_config=TorchConfig(backend="nccl" if gpu and torch.cuda.is_available() else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=parts.workers,
            use_gpu=gpu,
            resources_per_worker={"GPU": 1} if gpu else {"CPU": parts.cpus},
        ),
        run_config=RunConfig(
            name="stage1",
            storage_path=str(run.checkpoints.absolute()),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=3),
            callbacks=[_Reports(run.path, history, tracking_uri(run))],  # type: ignore[list-item]
        ),
    )


def data_parallel(module: nn.Module) -> nn.Module:
    """The DDP boundary: gradients of the module's own parameters are averaged, those of its arguments are not."""
    return DistributedDataParallel(module, broadcast_buffers=False)


def train_worker(config: dict[str, Any]) -> None:
    """What each worker runs: its scenes, all phases, a report per epoch, and at the end its scenes' metrics."""
    torch.set_num_threads(config["threads"])
    settings = make_settings(config["settings"])
    context = ray.train.get_context()
    size = context.get_world_size()
    device = get_device() if torch.cuda.is_available() else torch.device("cpu")
    assert isinstance(device, torch.device)
    workers = Workers(context.get_world_rank(), size, device, data_parallel if size > 1 else Workers().wrap)
    buckets = bucket_of(config["scene_ids"], settings.stage1.num_buckets)
    owned = [scene_id for scene_id in config["scene_ids"] if workers.owns(buckets[scene_id])]
    source = SourceSpec(*config["spec"]).open()
    views = [views_from_row(row, settings.data.image_size) for row in source.rows(owned)]
    stage1 = Stage1(settings, config["scene_ids"], views, workers)
    # Names of checkpoints must differ between restarts: an upload that a crash cut short leaves its folder behind.
    start = broadcast_from_rank_zero(uuid.uuid4().hex[:6])

    def report(epoch: EpochReport) -> None:
        losses = {f"stage1/{epoch.phase}/{name}": value for name, value in epoch.losses.items()}
        values = {**losses, "step": epoch.epochs_done, "total": epoch.epochs_total, "seconds": epoch.seconds}
        _report(stage1, values, f"{epoch.epochs_done:05d}-{epoch.phase}-{start}", picture=epoch.phase != "autoencoder")

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        stage1.run(report)
    else:
        with checkpoint.as_directory() as folder:
            stage1.run(report, resume=Path(folder))
    evaluated = stage1.evaluate()
    _report(stage1, {"done": 1}, f"done-{start}", evaluated)


def _report(
    stage1: Stage1, values: dict[str, Any], name: str, evaluated: dict[str, Any] | None = None, picture: bool = False
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        stage1.save(Path(folder))
        if picture and stage1.workers.rank == 0:
            save_png(Path(folder) / "picture.png", scene_sheet(stage1.shared, stage1.table[:1], stage1.views[0], 4))
        if evaluated is not None:
            (Path(folder) / f"metrics-{stage1.workers.rank}.json").write_text(json.dumps(evaluated))
        ray.train.report(values, checkpoint=Checkpoint.from_directory(folder), checkpoint_dir_name=name)


class _Reports(UserCallback):
    """Runs beside Ray Train's controller: every epoch's numbers to MLflow and to a file that the driver follows."""

    def __init__(self, run_path: Path, history: Path, uri: str) -> None:
        self.run_path, self.history, self.uri = run_path.absolute(), history.absolute(), uri
        self.tracker: Tracker | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        values = metrics[0]
        self.history.parent.mkdir(parents=True, exist_ok=True)
        with self.history.open("a") as file:
            file.write(json.dumps(values) + "\n")
        if "step" in values:
            self.tracker = self.tracker or Tracker(RunFolder(self.run_path), "stage1", self.uri)
            curves = {key: value for key, value in values.items() if key.startswith("stage1/")}
            self.tracker.log_metrics(curves, values["step"])
            with checkpoint.as_directory() as folder:
                picture = Path(folder) / "picture.png"
                if picture.is_file():
                    self.tracker.log_image("stage1/first_scene", decode_png(picture.read_bytes()), values["step"])


def _train(trainer: TorchTrainer, history: Path) -> ray.train.Result:
    """Runs the trainer and prints the lines that its history file gains.

    In a thread of its own: in the main one Ray Train takes Ctrl-C over and never gives it back. Raises RuntimeError
    with the workers' first error where training failed for good.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(trainer.fit)
        start, shown = time.time(), 0
        try:
            while True:
                finished = not wait([future], timeout=1.0).not_done
                lines = history.read_text().splitlines() if history.is_file() else []
                for line in lines[shown:]:
                    print(_progress_line(json.loads(line), time.time() - start), flush=True)
                shown = len(lines)
                if finished:
                    return future.result()
        except KeyboardInterrupt:
            ray.shutdown()  # ends the workers, and with them the thread that waits for them
            raise
        except TrainingFailedError as error:
            failures = getattr(error, "worker_failures", {})
            first = failures[min(failures)] if failures else error
            log, where = history.with_suffix(".log"), ""
            with suppress(OSError):  # the disk may be what failed
                replace_file(log, str(first).encode())
                where = f" (the worker's traceback: {log})"
            last_line = str(first).strip().splitlines()[-1]
            raise RuntimeError(
                f"stage 1 failed: {last_line}{where}; once that is mended, the same command goes on"
            ) from error


def _progress_line(values: dict[str, Any], elapsed: float) -> str:
    if "done" in values:
        return f"stage 1: trained and evaluated after {elapsed:.0f} s"
    losses = {key.removeprefix("stage1/"): v for key, v in values.items() if key.startswith("stage1/")}
    shown = "  ".join(f"{name} {value:.5f}" for name, value in losses.items())
    return f"stage 1: epoch {values['step']}/{values['total']}  {values['seconds']:.0f} s  {shown}"


def _finish(ledger: Ledger, checkpoint: Path, settings: Settings, spec: SourceSpec, tracker: Tracker) -> None:
    """The last checkpoint → fitted scenes in the library, pictures, and last RUN/shared, which marks the stage done."""
    run = ledger.run
    shared = SharedModel(settings)
    shared.load_tensors(read_state(checkpoint))
    shared.requires_grad_(False).eval()
    progress, scenes = read_progress(checkpoint), load_scenes(checkpoint)
    ids = progress["scene_ids"]
    reports = [parse_json(read_limited(path)) for path in sorted(checkpoint.glob("metrics-*.json"))]
    metrics = {scene_id: values for report in reports for scene_id, values in report.items()}
    content_hash = shared.content_hash()
    ledger.check_shared(content_hash)
    seconds = progress["seconds"] * progress["num_shards"] / len(ids)  # of all workers' devices
    source = spec.open()
    categories = dict(zip(source.ids(), source.categories()))
    for start in range(0, len(ids), SCENES_PER_PART):
        rows = []
        for scene_id in ids[start : start + SCENES_PER_PART]:
            params = SceneParams(scenes[f"{scene_id}/micro_planes"], scenes[f"{scene_id}/coefs"])
            packed = pack_scene(params, "float16")
            rows.append(
                {
                    **vars(packed), **metrics[scene_id], "scene_id": scene_id, "category": categories[scene_id],
                    "stage": 1, "shared": content_hash, "cohort": None, "seconds": seconds,
                    "settings_hash": settings_hash(settings), "seed": settings.seed,
                }
            )  # fmt: skip
        batch = [row["scene_id"] for row in rows]
        ledger.add(commit_part(run.library.folder, rows, part_name(ledger.epoch, 1, batch)))
    ledger.publish()
    models = StoredModels(run, known={content_hash: shared})
    log_scene_pictures(run, source, ids[:PICTURED_SCENES], "stage1", tracker.log_image, models)
    shared.save(run.shared, ids)
