"""Sweeps on Ray Tune: many trials of a space, several at a time, resumed by the same command.

1. the driver checks the whole space and chooses the scenes by which every trial is judged;
2. Ray Tune picks the trials (grid, random, Optuna), gives each a process with a share of a machine (trial.py), and
   stops those that are behind (ASHA);
3. the driver follows the trials: a child run in MLflow for each, and lines in the terminal;
4. at the end: a table, sweep.json and the Pareto fronts.

RUN/tune/ holds Ray Tune's own state, RUN/trials/NAME/ a run folder per trial, RUN/stage1/HASH/ one per stage 1.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ray import tune

from scaling.config import SettingsError, flatten
from scaling.data.choose_scenes import choose_ids
from scaling.data.stores import EMBEDDED, SourceSpec
from scaling.distributed.cluster import Resources
from scaling.distributed.sweep.callbacks import Follow, Follower, following
from scaling.distributed.sweep.results import (
    FAILED,
    RECORD,
    read_records,
    records_by_folder,
    summarise_sweep,
    sweep_table,
    write_record,
)
from scaling.distributed.sweep.space import Plan, Space
from scaling.distributed.sweep.trial import TrialJob, run_trial
from scaling.distributed.sweep.tune_space import domain, is_whole, scheduler, searcher
from scaling.distributed.tracking import Tracker
from scaling.library.run_folder import RunFolder, ids_hash
from scaling.models.shared_files import read_scene_ids
from scaling.models.shared_model import SharedModel
from scaling.storage.lease import Lease
from scaling.storage.paths import remove_tree
from scaling.training.sampler import bucket_of

ENVIRONMENT = {
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # Tune saves its state every second, so it forgets little in a crash
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a box whatever `verbose` says
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C and SIGTERM end the command alike
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # only a trial's last report has the objective; see trial.py
}


def run_sweep(
    run: RunFolder, plan: Plan, store: str | None, resources: Resources, retry_failed: bool = False
) -> dict[str, Any]:
    """Run the trials that are not done yet. → what sweep.json holds.

    Raises SettingsError where the space cannot be run, or where RUN is in an object store or belongs to another run or
    sweep; LeaseHeld where another driver works on it. Failed trials raise nothing: they are in the result.
    """
    if not isinstance(run.path, Path):
        raise SettingsError(f"--run {run.path}: Ray Tune's state needs a folder, one that all nodes share")
    folder = run.path.absolute()
    run = RunFolder(folder)
    jobs = _plan_jobs(run, plan, store, resources)
    run.check_own()
    lease = Lease.take(run.path / "leases", 1)
    try:
        _note(run, plan, jobs)
        if retry_failed:
            _forget_failed(folder)
        print(f"sweep: {plan.num_trials} trials, {len(read_records(folder))} of them done before", flush=True)
        tracker = Tracker(run, "sweep", tags={"preset": plan.preset})
        tracker.log_params(flatten({key: jobs.notes[key] for key in ("space", "store", "preset", "given")}))
        follower = Follower(run, plan, tracker, lease, store or EMBEDDED)
        # Tune pickles its callbacks, so they find this driver's follower through `following`.
        try:
            with following(follower):
                _tuner(folder / "tune", plan, jobs, retry_failed).fit()
            result = summarise_sweep(folder, jobs.notes, plan.space.metric)
            _finish(run, tracker, result)
        except BaseException as error:
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            follower.close(status)
            tracker.end(status)
            raise
        tracker.end()
        return result
    finally:
        with suppress(OSError):  # a full disk: what stopped the sweep is raised, not this
            lease.release()


def _finish(run: RunFolder, tracker: Tracker, result: dict[str, Any]) -> None:
    """Log the result to the sweep's own MLflow run. No metrics: in charts they would be among the trials'."""
    tracker.note(sweep_table(result))
    tracker.log_file(run.path / "sweep.json")
    if result["best"]:
        tracker.tag("best", result["best"])
        tracker.log_file(run.pictures / "pareto.png")


class Jobs:
    """Makes a trial's job from the values that Tune chose. notes: what identifies the sweep, in plain values."""

    def __init__(
        self, run: RunFolder, plan: Plan, store: str | None, stage1_ids: list[str], ids: list[str], gpus: float
    ):
        self.run, self.plan, self.store, self.gpus = run, plan, store, gpus
        self.stage1_ids, self.stage2_ids = stage1_ids, ids
        self.notes = {
            "space": plan.space.model_dump(exclude_defaults=True),
            "store": store or EMBEDDED,
            "preset": plan.preset,
            "given": plan.given,
            "scenes_hash": ids_hash([*stage1_ids, *ids]),
        }

    def job(self, name: str, config: dict[str, Any]) -> TrialJob:
        """The job of a trial. Raises SettingsError where its values do not go together."""
        trial, space = self.plan.trial(config), self.plan.space
        spec = SourceSpec.of(self.store, trial.settings.data)
        shared = self.plan.shared
        return TrialJob(
            str(self.run.path), name, trial.preset, trial.values, trial.settings.model_dump(),
            (spec.store, spec.image_size, spec.num_views, None), self.stage1_ids[: trial.stage1_scenes],
            self.stage2_ids, None if shared is None else str(shared), space.metric, space.cpus_per_trial, self.gpus,
        )  # fmt: skip


def _plan_jobs(run: RunFolder, plan: Plan, store: str | None, resources: Resources) -> Jobs:
    """Check the sweep and choose its scenes. Raises SettingsError for all that can be wrong before a trial starts."""
    space = plan.space
    gpus = _gpus(space, resources)
    if space.cpus_per_trial > resources.machines[0]:
        raise SettingsError(
            f"cpus_per_trial = {space.cpus_per_trial}, but the largest machine has {resources.machines[0]}"
        )
    if space.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise SettingsError("search: optuna is not installed; pip install 'scaling[optuna]'")
    trials = plan.check()
    spec = SourceSpec.of(store, trials[0].settings.data)
    source = spec.open()
    # All trials fit the same scenes, on which none of them trains, so that their figures compare.
    if plan.shared is not None:
        stage1_ids: list[str] = []
        taken = read_scene_ids(plan.shared)
    else:
        taken = stage1_ids = choose_ids(source, None, count=plan.most_stage1_scenes, balanced=True)
        if len(stage1_ids) < plan.most_stage1_scenes:
            raise SettingsError(
                f"stage1_scenes: {plan.most_stage1_scenes} are asked for, {source.name} has {len(stage1_ids)}"
            )
    ids = choose_ids(source, None, leave_out=taken, count=space.stage2_scenes)
    if len(ids) < space.stage2_scenes:
        raise SettingsError(f"stage2_scenes: {space.stage2_scenes} are asked for, {source.name} has {len(ids)} left")
    known = set()
    for trial in trials if plan.shared is None else []:
        bucket_of(stage1_ids[: trial.stage1_scenes], trial.settings.stage1.num_buckets)
        settings = trial.settings
        built = str((settings.autoencoder, settings.data.image_size))
        if built not in known:
            known.add(built)
            with torch.random.fork_rng(devices=[]):
                SharedModel(settings)  # an autoencoder that cannot be loaded fails here, not in every trial
    return Jobs(run, plan, spec.store, stage1_ids, ids, gpus)


def _gpus(space: Space, resources: Resources) -> float:
    if space.gpus_per_trial is None:
        return 1.0 if resources.gpus else 0.0
    if not resources.gpus:
        raise SettingsError(
            f"gpus_per_trial = {space.gpus_per_trial}, but the cluster has no GPU: leave it out to use CPUs"
        )
    return space.gpus_per_trial


def _note(run: RunFolder, plan: Plan, jobs: Jobs) -> None:
    """Note the sweep in config.yaml. Raises SettingsError where the folder belongs to another run or sweep."""
    noted = run.read_config()
    if noted and "sweep" not in noted:
        raise SettingsError(f"{run.path} holds another run; choose another --run for the sweep")
    if noted:
        before, now = flatten(noted["sweep"]["job"]), flatten(jobs.notes)
        changed = [
            f"{key} = {now.get(key)} (was {before.get(key)})"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise SettingsError(
                f"{run.path} was started with another space: {', '.join(changed)}; choose another --run, or give the "
                "same space to go on"
            )
    run.write_config("sweep", plan.trial(next(plan.configs())).settings, jobs.notes)


def _forget_failed(sweep: Path) -> None:
    for folder, record in records_by_folder(sweep):
        if record["status"] == FAILED:
            (folder / RECORD).unlink()


def _tuner(folder: Path, plan: Plan, jobs: Jobs, retry_failed: bool) -> tune.Tuner:
    """A new tuner, or the restored one of a sweep that was stopped."""
    os.environ.update(ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the pages about a failed trial are in its traceback.txt
    logging.getLogger("optuna").setLevel(logging.WARNING)
    space = plan.space
    trainable = tune.with_resources(_trainable(jobs), {"cpu": space.cpus_per_trial, "gpu": jobs.gpus})
    param_space = {name: domain(axis, space.search) for name, axis in space.vary.items()}
    if is_whole(folder):
        return tune.Tuner.restore(
            str(folder), trainable=trainable, param_space=param_space, resume_errored=retry_failed
        )
    remove_tree(folder)  # torn, if it is there; trials that are done have records of their own
    name = partial(trial_name, plan)
    return tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=tune.TuneConfig(
            search_alg=searcher(space),
            scheduler=scheduler(space),
            num_samples=space.num_trials or 1,
            # Without Optuna the searcher limits the trials at a time itself.
            max_concurrent_trials=space.concurrent if space.search == "optuna" else None,
            trial_name_creator=name,
            trial_dirname_creator=name,
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            callbacks=[Follow()],
            verbose=0,
        ),
    )


def _trainable(jobs: Jobs) -> Callable[[dict[str, Any]], None]:
    def trial(config: dict[str, Any]) -> None:
        name = tune.get_context().get_trial_name()
        try:
            job = jobs.job(name, config)
        except SettingsError as error:  # a draw whose values do not go together
            folder = Path(str(jobs.run.path)) / "trials" / name
            write_record(folder, {**jobs.plan.heading(name, config), "status": FAILED, "error": str(error)})
            raise
        run_trial(job, tune.report)

    return trial


def trial_name(plan: Plan, trial: Any) -> str:
    """The name of one of Tune's trials, whose tag begins with its number."""
    return plan.name(int(trial.experiment_tag.split("_")[0]), trial.config)
