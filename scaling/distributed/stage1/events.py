"""Events that stage 1's workers and Ray Train's controller send to the driver, and which failures end the job.

Events are plain dicts in a queue. A file would not do: the run folder may be in an object store, which cannot append.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import UserCallback
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from scaling.data.png import decode_png
from scaling.distributed.tracking import Tracker
from scaling.library.run_folder import RunFolder
from scaling.storage.atomic import ADVICE
from scaling.storage.limited import read_limited
from scaling.storage.paths import AnyPath

TRIES = 3  # in a row that end without a new checkpoint
LONG = 60.0  # seconds without workers before the driver says so; a group takes some 20 s to come up


def open_queue() -> Queue:
    """Open a queue on the driver's own node, so that any other node may be lost without harm."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


def drain(queue: Queue) -> list[dict[str, Any]]:
    """Take the events that have come in so far."""
    return queue.get_nowait_batch(queue.qsize())


class Reports(UserCallback):
    """Runs in Ray Train's controller: passes each epoch's numbers to MLflow and the driver, and judges failures.

    Ray itself tries for ever (max_failures = -1), as a long job loses many nodes. An exception raised here ends the
    job.
    """

    def __init__(self, run_path: AnyPath, uri: str, queue: Queue) -> None:
        self.run_path, self.uri, self.queue = run_path.absolute(), uri, queue
        self.tracker: Tracker | None = None
        self.in_vain = 0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Pass on a report; Ray Train calls this when all workers have reported."""
        self.in_vain = 0
        values = metrics[0]
        self.queue.put({"event": "report", **values})
        if "step" in values:
            self.tracker = self.tracker or Tracker(RunFolder(self.run_path), "stage1", self.uri, must_answer=False)
            curves = {key: value for key, value in values.items() if key.startswith("stage1/")}
            self.tracker.log_metrics(curves, values["step"])
            with checkpoint.as_directory() as folder:
                picture = Path(folder) / "picture.png"
                if picture.is_file():
                    self.tracker.log_image("stage1/first_scene", decode_png(read_limited(picture)), values["step"])

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Judge a failure; Ray Train calls this when workers failed. RuntimeError: another try would be in vain."""
        if any(is_reclaimed(error) for error in worker_exceptions.values()):
            return  # Ray calls this again and again, from the owner's announcement until the node is gone
        self.in_vain += 1
        rank, error = first_cause(worker_exceptions)
        why = f"worker {rank}: {in_a_line(error, str(RunFolder(self.run_path).checkpoints))}"
        if is_lasting(error):
            raise RuntimeError(why)
        if self.in_vain == TRIES:
            raise RuntimeError(f"{why}; {TRIES} tries in a row made no new checkpoint")
        self.queue.put({"event": "failure", "why": why})


def is_lasting(error: Exception) -> bool:
    """Whether a new try would fail in the same way: settings, data, numbers that diverge, a full disk."""
    if isinstance(error, RayError):
        return False  # may inherit from any of the types below, too
    return isinstance(error, ValueError | LookupError | ArithmeticError) or (
        isinstance(error, OSError) and error.errno in ADVICE
    )


def is_reclaimed(error: Exception) -> bool:
    """Whether the worker died because the owner took its node back, as happens to spot machines."""
    return getattr(_death(error), "preempted", False)


def first_cause(errors: dict[int, Exception]) -> tuple[int, Exception]:
    """The rank and the error to blame. When one worker is gone, the others fail too, as it no longer answers."""
    return min(errors.items(), key=lambda item: (not is_lasting(item[1]), _death(item[1]) is None, item[0]))


def in_a_line(error: Exception, storage: str) -> str:
    """Say an error in one line: its last one, unless a worker died or a disk failed.

    About a worker that died Ray writes pages that say no more than that. A disk's error may not name what is full; the
    line then names `storage`.
    """
    if _death(error) is not None:
        return "its process or node is gone"
    if isinstance(error, OSError) and error.errno in ADVICE:
        return f"{error.filename or storage}: {os.strerror(error.errno)}"
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _death(error: Exception) -> Exception | None:
    return getattr(error, "health_check_failure", None)


class Story:
    """Turns events into the lines that the driver prints. tracebacks: those of the workers; not all were fatal."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.without_workers: float | None = start  # since when; None: there are some, or the wait was told
        self.workers = 0
        self.tracebacks: list[str] = []

    def lines(self, events: list[dict[str, Any]], now: float) -> Iterator[str]:
        for event in events:
            if event["event"] == "traceback":
                self.tracebacks.append(event["text"])
            else:
                yield f"stage 1: {getattr(self, '_' + event['event'])(event, now)}"

    def waiting(self, now: float) -> Iterator[str]:
        """Yield a line, once, when there have been no workers for long."""
        if self.without_workers is not None and now - self.without_workers > LONG:
            self.without_workers = None
            yield "stage 1: waits until the cluster has room for a worker"

    def _group(self, event: dict[str, Any], now: float) -> str:
        """The line for a group of workers that has come up: its size, and where it starts."""
        self.without_workers = None
        before, self.workers = self.workers, event["workers"]
        name = event["checkpoint"]
        where = "epoch 1" if name is None else "evaluation" if name.startswith("done") else f"epoch {int(name[:5]) + 1}"
        of = "" if self.workers == event["wanted"] else f" (of {event['wanted']})"
        torn = "".join(f"; checkpoint {name} is not whole: {why}" for name, why in event["torn"].items())
        if before and before != self.workers:
            verb = "shrinks" if self.workers < before else "grows"
            return f"worker group {verb} to {self.workers}{of} and goes on at {where}{torn}"
        return f"worker group of {self.workers}{of} {'re' if before else ''}starts at {where}{torn}"

    def _failure(self, event: dict[str, Any], now: float) -> str:
        self.without_workers = now
        return f"{event['why']}; goes on from the last checkpoint"

    def _report(self, event: dict[str, Any], now: float) -> str:
        if "done" in event:
            return f"trained and evaluated after {now - self.start:.0f} s"
        losses = {key.removeprefix("stage1/"): v for key, v in event.items() if key.startswith("stage1/")}
        shown = "  ".join(f"{name} {value:.5f}" for name, value in losses.items())
        return f"epoch {event['step']}/{event['total']}  {event['seconds']:.0f} s  {shown}"
