"""The stage 1 that trials of a sweep share: the first of them trains it in its own process, the others follow.

SWEEP/stage1/HASH is a run folder as stage 1 leaves it; its lease says who trains. If that trial dies or is stopped, the
next one resumes at its last epoch's checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from scaling.config import Settings
from scaling.data.scene_views import views_from_row
from scaling.data.stores import EMBEDDED, SourceSpec
from scaling.distributed.stage1.finish import finish_stage1
from scaling.library.ledger import Ledger, open_ledger
from scaling.library.run_folder import RunFolder, ids_hash
from scaling.pictures.draw import save_png, scene_sheet
from scaling.storage.atomic import replace_file
from scaling.storage.json_yaml import parse_json
from scaling.storage.lease import LeaseHeld
from scaling.storage.limited import read_limited
from scaling.storage.links import refuse_links
from scaling.storage.paths import AnyPath, remove_tree
from scaling.training.checkpoints.checksums import clear, newest_whole, seal
from scaling.training.evaluate import render_views
from scaling.training.measure.box import source_bounds
from scaling.training.metrics.images import psnr
from scaling.training.phase_loop import EpochReport
from scaling.training.process_group import Workers
from scaling.training.stage1 import Stage1

STAGE1_SHARE = 80.0  # per cent of a trial's progress; stage 2 has the rest
WATCHED_SCENES = 4  # the first scenes of stage 1; the PSNR of their test views is reported after each epoch
POLL_SECONDS = 2.0

Report = Callable[[dict[str, Any]], None]


def stage1_folder(sweep: Path, settings: Settings, spec: SourceSpec, ids: list[str]) -> RunFolder:
    """The run folder of the stage 1 with these settings and scenes: SWEEP/stage1/HASH."""
    job = [settings.model_dump(exclude={"stage2"}), asdict(spec), ids_hash(ids)]
    folder = sweep / "stage1" / hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:12]
    refuse_links(folder)
    return RunFolder(folder)


def train_once(
    run: RunFolder, settings: Settings, spec: SourceSpec, ids: list[str], device: torch.device, report: Report
) -> None:
    """Return when the run's shared model is trained, by this process or by another one that holds the run's lease.

    Every trial reports every epoch, whichever process trained it. Raises Diverged, SettingsError.
    """
    told = 0
    while not (run.shared / "hash.txt").is_file():
        try:
            with open_ledger(run) as ledger:
                if not (run.shared / "hash.txt").is_file():  # or another process finished it in between
                    _train(ledger, settings, spec, ids, device, report, told)
                    return
        except LeaseHeld:
            told = _report_again(run, told, report)
            time.sleep(POLL_SECONDS)
    _report_again(run, told, report)


def _history(run: RunFolder) -> list[dict[str, Any]]:
    """The values that were reported after each epoch so far. Raises ValueError naming a file that is damaged."""
    path = run.path / "reports.json"
    try:
        history = parse_json(read_limited(path))
        for values in history:
            if "picture" in values:  # no path is taken from a file
                values["picture"] = str(_picture(run, int(values["step"])))
        return history
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path}: no reports of epochs ({error}); set it aside") from None


def _picture(run: RunFolder, epochs_done: int) -> AnyPath:
    return run.path / "pictures" / "epochs" / f"{epochs_done:05d}.png"


def _report_again(run: RunFolder, told: int, report: Report) -> int:
    history = _history(run)
    for values in history[told:]:
        report(values)
    return len(history)


def _train(
    ledger: Ledger,
    settings: Settings,
    spec: SourceSpec,
    ids: list[str],
    device: torch.device,
    report: Report,
    told: int,
) -> None:
    """Train stage 1 in this process, from its last whole checkpoint on. told: epochs that were reported before."""
    run = ledger.run
    assert isinstance(run.path, Path)
    run.write_config("stage1", settings, {"num_scenes": len(ids), "store": spec.store or EMBEDDED})
    checkpoints = run.path / "checkpoints" / "stage1"
    checkpoints.mkdir(parents=True, exist_ok=True)
    root = SubTreeFileSystem(str(checkpoints), LocalFileSystem())
    clear(root, str(checkpoints))
    last, _ = newest_whole(root, str(checkpoints))
    source, workers = spec.open(), Workers(device=device)
    views = [views_from_row(row, settings.data.image_size) for row in source.rows(ids)]
    bounds = source_bounds(source, workers) if settings.representation.box_side is None else None
    stage1 = Stage1(settings, ids, views, workers, bounds)
    # Epochs after the checkpoint are trained, and reported, again.
    epochs = int(last[:5]) if last else 0
    history = [values for values in _history(run) if values["step"] <= epochs]
    for values in history[told:]:
        report(values)

    def after_epoch(epoch: EpochReport) -> None:
        name = f"{epoch.epochs_done:05d}-{epoch.phase}"
        # The checkpoint comes first: a report without one would be of an epoch that a crash undoes.
        _checkpoint(stage1, checkpoints / name)
        values = _on_the_way(stage1, epoch)
        if epoch.phase != "autoencoder":
            picture = _picture(run, epoch.epochs_done)
            save_png(picture, scene_sheet(stage1.shared, stage1.table[:1], stage1.views[0], 4))
            values["picture"] = str(picture)
        history.append(values)
        replace_file(run.path / "reports.json", json.dumps(history).encode())
        clear(root, str(checkpoints))
        ledger.check()
        if len(history) > told:
            report(values)

    stage1.run(after_epoch, resume=checkpoints / last if last else None)
    # `finish_stage1` takes the metrics from a checkpoint, where the workers of Ray Train leave theirs.
    done = checkpoints / f"{len(history):05d}-evaluated"
    replace_file(done / "metrics-0.json", json.dumps(stage1.evaluate()).encode())
    _checkpoint(stage1, done)
    finish_stage1(ledger, done, settings, spec, lambda key, image, step: None)
    remove_tree(run.checkpoints)


def _checkpoint(stage1: Stage1, folder: Path) -> None:
    stage1.save(folder)
    seal(folder)


def _on_the_way(stage1: Stage1, epoch: EpochReport) -> dict[str, Any]:
    """What a trial reports after an epoch: losses, and once scenes are rendered also `progress` and `psnr`."""
    losses = {f"stage1/{epoch.phase}/{name}": value for name, value in epoch.losses.items()}
    values: dict[str, Any] = {**losses, "step": epoch.epochs_done}
    if epoch.phase != "autoencoder":
        before = stage1.phases["autoencoder"].num_epochs if "autoencoder" in stage1.phases else 0
        share = (epoch.epochs_done - before) / (epoch.epochs_total - before)
        values |= {"progress": STAGE1_SHARE * share, "psnr": _watched_psnr(stage1)}
    return values


@torch.no_grad()
def _watched_psnr(stage1: Stage1) -> float:
    """Mean PSNR, in dB, of decoded renders of the test views of the first WATCHED_SCENES scenes."""
    found = []
    for row, views in enumerate(stage1.views[:WATCHED_SCENES]):
        test = list(views.test_views)
        seen = render_views(stage1.shared, stage1.table[row : row + 1], views.cam2world[test], views.intrinsics[test])
        found.append(psnr(seen["images"], views.images[test].to(stage1.shared.device)).mean().item())
    return sum(found) / len(found)
