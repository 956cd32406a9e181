"""Follows the trials in a sweep's driver while Ray Tune runs them: child runs in MLflow, and lines in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune

from scaling.config import SettingsError, flatten
from scaling.data.png import decode_png
from scaling.distributed.sweep.results import FAILED, FINISHED, STOPPED, read_record, read_records, write_record
from scaling.distributed.sweep.space import Plan, short
from scaling.distributed.tracking import Tracker
from scaling.library.run_folder import RunFolder
from scaling.storage.json_yaml import parse_json
from scaling.storage.lease import Lease
from scaling.storage.limited import read_limited
from scaling.storage.text import shown

LOST = "it could not start, or its process or node was lost; --retry-failed goes on at its last epoch"
_follower: Follower | None = None


@contextmanager
def following(follower: Follower) -> Iterator[None]:
    """Let `follower` follow the sweep of this process within the block."""
    global _follower
    _follower = follower
    try:
        yield
    finally:
        _follower = None


class Follow(tune.Callback):
    """Passes Tune's calls on to the follower. It has no state, as Tune pickles it and restores it in later drivers."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process has started, perhaps not for the first time."""
        if _follower:
            _follower.started(str(trial), trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has reported."""
        if _follower:
            _follower.result(str(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has returned, or the scheduler has stopped it."""
        if _follower:
            _follower.ended(str(trial), trial.config, trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has failed for good."""
        if _follower:
            _follower.failed(str(trial), trial.config, _words(trial.error_file))


class Follower:
    """Follows the trials of one driver. store: its name for MLflow."""

    def __init__(self, run: RunFolder, plan: Plan, parent: Tracker, lease: Lease, store: str) -> None:
        self.run, self.plan, self.parent, self.lease, self.store = run, plan, parent, lease, store
        self.trackers: dict[str, Tracker] = {}
        self.last_step: dict[str, int] = {}
        self.told: dict[str, int] = {}

    def started(self, name: str, config: dict[str, Any]) -> None:
        """Open the trial's run in MLflow, or find the one that an earlier driver opened."""
        self.lease.check()
        if name not in self.trackers:
            heading = self.plan.heading(name, config)
            shown = ", ".join(f"{key} = {value}" for key, value in short(heading["values"]).items())
            tags = {"stage": "trial", "trial": name.partition("_")[0], "preset": heading["preset"], "values": shown}
            tracker = Tracker(self.run, f"sweep/{name}", parent=self.parent, tags=tags, must_answer=False)
            tracker.log_params({**self._settings(config), **self._job(heading)})
            tracker.note(shown)
            self.trackers[name] = tracker
            self.last_step[name] = tracker.last_step("stage1/")
            print(f"{name}: started", flush=True)

    def result(self, name: str, result: dict[str, Any]) -> None:
        """Log the curves and pictures of an epoch of stage 1, or the PSNR of a batch of stage 2."""
        self.lease.check()
        tracker = self.trackers[name]
        step = result.get("step")
        if step is not None and step > self.last_step[name]:
            self.last_step[name] = step
            curves = {key: value for key, value in result.items() if key.startswith("stage1/")}
            tracker.log_metrics(curves, step)
            if "picture" in result:
                tracker.log_image("stage1/first_scene", _read_png(Path(result["picture"])), step)
        if "progress" in result:
            tracker.log_metrics({"on_the_way/psnr": result["psnr"]}, round(result["progress"]))
            if result["progress"] // 10 > self.told.get(name, 0) and result["progress"] < 100:
                self.told[name] = int(result["progress"] // 10)
                print(f"{name}: {result['progress']:.0f} %, {result['psnr']:.2f} dB", flush=True)
        if "fitted" in result:
            tracker.log_metrics({"stage2/psnr": result["stage2/psnr"]}, result["fitted"])

    def ended(self, name: str, config: dict[str, Any], last: dict[str, Any]) -> None:
        """Close the run of a trial that has finished, with all its figures, or that was stopped on its way."""
        folder = self.run.path / "trials" / name
        assert isinstance(folder, Path)
        record = read_record(folder)
        if record is None or record["status"] != FINISHED:
            values = {"progress": last.get("progress", 0.0), "psnr": last.get("psnr")}
            write_record(folder, {**self.plan.heading(name, config), "status": STOPPED, **values})
            self._close(name, "KILLED", STOPPED, f"stopped at {values['progress']:.0f} %: behind the others")
            return
        tracker = self.trackers[name]
        metrics = parse_json(read_limited(folder / "metrics.json"))
        stage1 = {"seconds": record["stage1_seconds"], "test": {"psnr": record["stage1_psnr"]}}
        tracker.log_summary({**metrics, "stage1": stage1})
        for path in sorted((folder / "pictures" / "scenes").glob("*.png")):
            tracker.log_image("stage2/scenes", _read_png(path), int(path.stem))
        tracker.log_file(folder / "metrics.json")
        costs = f"{record['seconds_per_scene']:.2f} s and {record['bytes_per_scene']:,.0f} bytes a scene"
        self._close(name, "FINISHED", FINISHED, f"{record['psnr']:.2f} dB, {costs}")

    def failed(self, name: str, config: dict[str, Any], why: str) -> None:
        """Close the run of a trial that has failed. why: Ray's reason, for a trial that left no record."""
        folder = self.run.path / "trials" / name
        assert isinstance(folder, Path)
        record = read_record(folder)
        if record is None or record["status"] != FAILED:
            error = f"{LOST} ({why})"
            record = {**self.plan.heading(name, config), "status": FAILED, "error": error}
            write_record(folder, record)
        if name not in self.trackers:
            self.started(name, config)
        self.trackers[name].note(record["error"])
        self._close(name, "FAILED", FAILED, f"failed: {record['error'].splitlines()[0]}")

    def close(self, status: str) -> None:
        """End the runs that are open, where the driver ends before its trials do."""
        for tracker in self.trackers.values():
            tracker.end(status)

    def _close(self, name: str, mlflow_status: str, status: str, outcome: str) -> None:
        tracker = self.trackers.pop(name)
        tracker.tag("status", status)
        tracker.end(mlflow_status)
        done = len(read_records(self.run.path))  # type: ignore[arg-type]
        print(f"[{done}/{self.plan.num_trials}] {name}: {shown(outcome)}", flush=True)

    def _settings(self, config: dict[str, Any]) -> dict[str, Any]:
        """The trial's settings, flattened; where its values do not go together and it will fail, only those values."""
        try:
            return flatten(self.plan.trial(config).settings.model_dump())
        except SettingsError:
            return self.plan.values(config)

    def _job(self, heading: dict[str, Any]) -> dict[str, Any]:
        job = {"preset": heading["preset"], "store": self.store, "stage2_scenes": self.plan.space.stage2_scenes}
        return job if self.plan.shared else {**job, "stage1_scenes": heading["stage1_scenes"]}


def _words(error_file: str | None) -> str:
    """Ray's reason for a failure: the second line of its error file, whose first line says when it was."""
    path = Path(error_file or "no file")
    return [*path.read_text().splitlines(), ""][1] if path.is_file() else "no reason is known"


def _read_png(path: Path) -> Any:
    return decode_png(read_limited(path))
