"""One trial of a sweep, in one process, on a GPU, a part of one, or a CPU. Nothing here imports Ray.

1. stage 1, unless the space names a shared model. Trials with the same stage 1 share it: the first of them trains, the
   others follow. If that trial dies, another one resumes at its last epoch;
2. stage 2 by the code of its actors: every trial fits the same scenes;
3. the figures, in trial.json of the trial's own run folder. This file marks the trial as done.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from scaling.config import Settings, make_settings
from scaling.data.scene_store import SCHEMA
from scaling.data.stores import EMBEDDED, SourceSpec, read_rows
from scaling.distributed.stage2.actors import FitJob, SceneFitter
from scaling.distributed.stage2.cohort_actors import CohortFitter
from scaling.distributed.stage2.messages import FITTED
from scaling.distributed.sweep.results import FAILED, FINISHED, read_record, write_record
from scaling.distributed.sweep.shared_stage1 import STAGE1_SHARE, Report, stage1_folder, train_once
from scaling.library.failures import event
from scaling.library.ledger import open_ledger
from scaling.library.run_folder import RunFolder
from scaling.library.stored_models import StoredModels
from scaling.library.summary import mean, summarise
from scaling.models.shared_files import read_hash
from scaling.pictures.draw import save_png
from scaling.pictures.of_runs import log_scene_pictures
from scaling.storage.atomic import replace_file
from scaling.storage.links import refuse_links
from scaling.storage.paths import AnyPath

PICTURED_SCENES = 8


class TrialFailed(RuntimeError):
    """A trial that failed before and would fail again."""


@dataclass(frozen=True)
class TrialJob:
    """What a trial needs to know, in plain values. sweep: the sweep's run folder; values: of the varied keys; spec: of
    a SourceSpec; shared: folder of the shared model where trials have no stage 1; metric: the sweep's; threads, gpus:
    of the trial's process."""

    sweep: str
    name: str
    preset: str
    values: dict[str, Any]
    settings: dict[str, Any]
    spec: tuple[str | None, int, int, str | None]
    stage1_ids: list[str]
    stage2_ids: list[str]
    shared: str | None
    metric: str = "psnr"
    threads: int = 1
    gpus: float = 0.0

    @property
    def folder(self) -> Path:
        return Path(self.sweep) / "trials" / self.name


def run_trial(job: TrialJob, report: Report) -> None:
    """Run the trial, or what is left of it.

    report: called after each epoch of stage 1 and each batch of stage 2, once scenes are rendered with `progress` (0 to
    100) and `psnr` (dB); at the end also with `objective`, the value of the sweep's metric. The error of a failed trial
    is in trial.json before it is raised; called again the trial raises TrialFailed at once.
    """
    refuse_links(job.folder)
    known = read_record(job.folder)
    if known and known["status"] == FAILED:
        raise TrialFailed(known["error"])
    if not known or known["status"] != FINISHED:
        try:
            known = _run(job, report)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            replace_file(job.folder / "traceback.txt", traceback.format_exc().encode())
            write_record(job.folder, {**_heading(job), "status": FAILED, "error": text})
            raise
    report({"progress": 100.0, "psnr": known["psnr"], "objective": known[job.metric]})


def _heading(job: TrialJob) -> dict[str, Any]:
    return {"trial": job.name, "preset": job.preset, "values": job.values, "stage1_scenes": len(job.stage1_ids)}


def _run(job: TrialJob, report: Report) -> dict[str, Any]:
    settings, spec = make_settings(job.settings), SourceSpec(*job.spec)
    device = _device(job.gpus)
    shared: AnyPath
    stage1: dict[str, Any] = {"stage1_seconds": None, "stage1_psnr": None}
    if job.shared is None:
        torch.set_num_threads(job.threads)  # of stage 1: the fitter of stage 2 sets one thread
        trained = stage1_folder(Path(job.sweep), settings, spec, job.stage1_ids)
        train_once(trained, settings, spec, job.stage1_ids, device, report)
        shared, before = trained.shared, STAGE1_SHARE
        values = summarise(trained)["stage1"]
        stage1 = {
            "stage1_seconds": values["seconds_per_scene"] * values["num_scenes"],
            "stage1_psnr": values["test"]["psnr"],
        }
    else:
        shared, before = Path(job.shared), 0.0
    metrics = fit(job, settings, spec, shared, before, report)
    figures = {
        **_heading(job), "status": FINISHED, "shared": str(shared), **stage1,
        "psnr": metrics["test"]["psnr"], "ssim": metrics["test"]["ssim"],
        "ms_ssim": metrics["test"]["ms_ssim"], "flip": metrics["test"]["flip"], "train_psnr": metrics["train"]["psnr"],
        "autoencoder_psnr": metrics["autoencoder"]["psnr"],
        **{key: metrics[key] for key in ("num_scenes", "num_failed", "seconds_per_scene", "bytes_per_scene")},
        "shared_bytes": metrics["shared_bytes"],
    }  # fmt: skip
    # This marks the trial as done, so it comes last.
    write_record(job.folder, figures)
    return figures


def _device(gpus: float) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if 0 < gpus < 1:  # a trial that takes more than its share fails, not its neighbours
        torch.cuda.set_per_process_memory_fraction(gpus)
    return torch.device("cuda")


def fit(
    job: TrialJob, settings: Settings, spec: SourceSpec, shared: AnyPath, before: float, report: Report
) -> dict[str, Any]:
    """Fit those of the trial's scenes that are not settled yet, into its run folder. → its metrics.

    before: the trial's progress so far, in per cent. Raises RuntimeError where no scene could be fitted.
    """
    run = RunFolder(job.folder)
    with open_ledger(run) as ledger:
        ledger.check_shared(read_hash(shared))
        settled = {*run.library.ids(), *run.given_up()}
        todo = [scene_id for scene_id in job.stage2_ids if scene_id not in settled]
        notes = {"num_scenes": len(job.stage2_ids), "store": spec.store or EMBEDDED, "shared": str(shared)}
        run.write_config("stage2", settings, {**notes, "preset": job.preset})
        fit_job = FitJob(str(run.path), str(shared), settings.model_dump(), job.spec, ledger.epoch)
        fitter = CohortFitter(fit_job) if settings.stage2.mode == "cohort" else SceneFitter(fit_job)
        done = len(job.stage2_ids) - len(todo)
        # Each batch is settled before the next one starts, so a restarted trial fits only what is left.
        for batch in _batches(settings, spec, job.stage2_ids, settled):
            fitted = fitter.fit(batch, attempt=1)
            if fitted.part:
                ledger.add(fitted.part)
            failed = [outcome for outcome in fitted.outcomes if outcome.kind != FITTED]
            ledger.record([event(outcome.scene_id, 1, outcome.kind, outcome.message) for outcome in failed])
            ledger.check()
            done += len(batch)
            if done < len(job.stage2_ids) and run.library.parts():  # `run_trial` reports the end, when all is written
                progress = before + (100.0 - before) * done / len(job.stage2_ids)
                fitted_psnr = mean(run.library.table(), "psnr")
                report({"progress": progress, "psnr": fitted_psnr, "stage2/psnr": fitted_psnr, "fitted": done})
    if not run.library.parts():
        reasons = {f"{found.kind}: {found.message}" for found in run.given_up().values()}
        raise RuntimeError(f"no scene could be fitted: {'; '.join(sorted(reasons)[:3])}")
    _pictures(run, spec, job.stage2_ids)
    return summarise(run)


def _batches(settings: Settings, spec: SourceSpec, ids: list[str], settled: Collection[str]) -> Iterator[pa.Table]:
    """Batches are fixed chunks of all ids, each without the scenes that are settled: so cohorts are never mixed."""
    cohort = settings.stage2.mode == "cohort"
    size = (settings.stage2.cohort_size or len(ids)) if cohort else settings.stage2.scenes_per_batch
    for start in range(0, len(ids), size):
        chosen = [scene_id for scene_id in ids[start : start + size] if scene_id not in settled]
        if cohort and chosen:
            yield pa.table({"scene_id": chosen})
        elif chosen:
            yield pa.Table.from_pylist(
                read_rows(spec.open(), chosen), schema=SCHEMA.append(pa.field("error", pa.string()))
            )


def _pictures(run: RunFolder, spec: SourceSpec, ids: list[str]) -> None:
    """Draw sheets of the first fitted scenes, the same in every trial, to RUN/pictures/scenes/*.png, for MLflow."""

    def keep(key: str, image: np.ndarray, step: int) -> None:
        save_png(run.pictures / "scenes" / f"{step:05d}.png", image)

    fitted = set(run.library.ids(stage=2))
    chosen = [scene_id for scene_id in ids if scene_id in fitted][:PICTURED_SCENES]
    log_scene_pictures(run, spec.open(), chosen, "stage2", keep, StoredModels(run))
