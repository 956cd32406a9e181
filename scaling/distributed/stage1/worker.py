"""What each worker of stage 1 runs: all phases on its scenes, a checkpoint per epoch, then its scenes' metrics."""

from __future__ import annotations

import json
import tempfile
import traceback
import uuid
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray.train
import torch
from pyarrow.fs import SubTreeFileSystem
from ray.train import Checkpoint
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scaling.config import make_settings
from scaling.data.scene_views import views_from_row
from scaling.data.stores import SourceSpec
from scaling.pictures.draw import save_png, scene_sheet
from scaling.training.checkpoints.checksums import newest_whole, seal
from scaling.training.measure.box import source_bounds
from scaling.training.phase_loop import EpochReport
from scaling.training.process_group import Workers
from scaling.training.sampler import bucket_of
from scaling.training.stage1 import Stage1


def data_parallel(module: nn.Module) -> nn.Module:
    """Wrap a module in DDP: gradients of its own parameters are averaged, those of its arguments are not."""
    return DistributedDataParallel(module, broadcast_buffers=False)


def train_worker(config: dict[str, Any]) -> None:
    """Run stage 1 in one worker of Ray Train.

    config: settings, spec (of the scenes' source), scene_ids, threads, wanted (number of workers), queue (as
    `events.open_queue` makes it). The traceback of an exception goes to the driver through the queue, as Ray passes on
    the message alone.
    """
    context = ray.train.get_context()
    try:
        _train(config, context.get_world_rank(), context.get_world_size())
    except Exception:
        config["queue"].put(
            {"event": "traceback", "text": f"worker {context.get_world_rank()}\n{traceback.format_exc()}"}
        )
        raise


def _train(config: dict[str, Any], rank: int, size: int) -> None:
    torch.set_num_threads(config["threads"])
    settings = make_settings(config["settings"])
    start, last = _agreed_start(config, rank, size)
    device = get_device() if torch.cuda.is_available() else torch.device("cpu")
    assert isinstance(device, torch.device)
    workers = Workers(rank, size, device, data_parallel if size > 1 else Workers().wrap)
    # A worker reads only the scenes whose micro planes and coefs it owns.
    buckets = bucket_of(config["scene_ids"], settings.stage1.num_buckets)
    owned = [scene_id for scene_id in config["scene_ids"] if workers.owns(buckets[scene_id])]
    source = SourceSpec(*config["spec"]).open()
    views = [views_from_row(row, settings.data.image_size) for row in source.rows(owned)]
    bounds = source_bounds(source, workers) if settings.representation.box_side is None else None
    stage1 = Stage1(settings, config["scene_ids"], views, workers, bounds)

    def report(epoch: EpochReport) -> None:
        losses = {f"stage1/{epoch.phase}/{name}": value for name, value in epoch.losses.items()}
        values = {**losses, "step": epoch.epochs_done, "total": epoch.epochs_total, "seconds": epoch.seconds}
        _report(stage1, values, f"{epoch.epochs_done:05d}-{epoch.phase}-{start}", picture=epoch.phase != "autoencoder")

    with last.as_directory() if last else nullcontext() as folder:
        stage1.run(report, resume=Path(folder) if folder else None)
    _report(stage1, {"done": 1}, f"done-{start}", stage1.evaluate())


def _agreed_start(config: dict[str, Any], rank: int, size: int) -> tuple[str, Checkpoint | None]:
    """Agree on a name for this start, and on the newest whole checkpoint. Rank 0 decides for all and tells the driver.

    Names of checkpoints must differ between starts, as an upload that a crash cut short leaves its folder behind. Ray's
    own list of checkpoints is not used: it holds torn ones, and lacks those whose last report was lost.
    """
    storage = ray.train.get_context().get_storage()
    last = None
    if rank == 0:
        root = SubTreeFileSystem(storage.experiment_fs_path, storage.storage_filesystem)
        last, torn = newest_whole(root, storage.experiment_fs_path)
        group = {"workers": size, "wanted": config["wanted"], "checkpoint": last, "torn": torn}
        config["queue"].put({"event": "group", **group})
    start, last = broadcast_from_rank_zero((uuid.uuid4().hex[:6], last))
    return start, last and Checkpoint(f"{storage.experiment_fs_path}/{last}", storage.storage_filesystem)


def _report(
    stage1: Stage1, values: dict[str, Any], name: str, evaluated: dict[str, Any] | None = None, picture: bool = False
) -> None:
    rank, size = stage1.workers.rank, stage1.workers.size
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stage1.save(folder)
        if picture and rank == 0:
            save_png(folder / "picture.png", scene_sheet(stage1.shared, stage1.table[:1], stage1.views[0], 4))
        if evaluated is not None:
            (folder / f"metrics-{rank}.json").write_text(json.dumps(evaluated))
        seal(folder, rank, size)
        ray.train.report(values, checkpoint=Checkpoint.from_directory(temporary), checkpoint_dir_name=name)
