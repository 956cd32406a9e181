"""Hands batches of scenes to actors, one in flight per actor, and accounts for every scene.

At least once: a batch whose actor died is cut into single scenes (a cohort stays whole) and tried again; a scene that
has cost `max_attempts` actors is given up. Commits are idempotent, so results are effectively once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.exceptions import RayActorError, RayTaskError
from tqdm import tqdm

from scaling.library.failures import FailureLog

START_ATTEMPTS = 2  # per actor
PROGRESS_SECONDS = 10.0  # at least this often the progress bar moves


@dataclass
class Counts:
    """How a job stands. psnrs: test PSNR of the scenes fitted so far."""

    total: int
    done: int = 0
    failed: int = 0
    psnrs: list[float] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Scenes that are neither fitted nor given up."""
        return self.total - self.done - self.failed

    @property
    def mean_psnr(self) -> float | None:
        """In dB, over the scenes fitted so far."""
        return sum(self.psnrs) / len(self.psnrs) if self.psnrs else None


class Cohorts(Protocol):
    """How far cohorts in flight have come."""

    def text(self) -> str:
        """For the progress bar."""

    def advanced(self, ids: list[str]) -> bool:
        """Whether the cohort of these scenes has come further than when its actor died the last time."""


class Dispatcher:
    """make_actor starts an actor with `ready()` and `fit(table) -> outcomes`; the driver respawns dead ones."""

    def __init__(
        self,
        make_actor: Callable[[], Any],
        num_actors: int,
        max_attempts: int,
        failures: FailureLog,
        committed: Callable[[], set[str]],
        cohorts: Cohorts | None = None,
    ) -> None:
        self.make_actor = make_actor
        self.num_actors = num_actors
        self.max_attempts = max_attempts
        self.failures = failures
        self.committed = committed  # asked after an actor's death: its last commit may have come through
        self.cohorts = cohorts  # given where batches are cohorts, which cannot be cut into scenes
        self.failed_starts = 0
        self.again: deque[pa.Table] = deque()  # what is left of batches whose actor died
        self.attempts: dict[str, int] = {}
        self.in_flight: dict[Any, tuple[Any, pa.Table | None]] = {}  # future → its actor and batch (None: ready())

    def run(self, batches: Iterator[pa.Table], total: int) -> Iterator[Counts]:
        """Fits every batch; yields the counts after each one that came back.

        Raises RuntimeError where no actor can start, or where scenes of `total` are left at the end.
        """
        counts = Counts(total)
        progress = tqdm(total=total, unit="scene", desc="stage 2")
        try:
            for _ in range(self.num_actors):
                self._start_actor()
            while self.in_flight and counts.left:
                finished, _ = ray.wait(list(self.in_flight), num_returns=1, timeout=PROGRESS_SECONDS)
                changed = bool(finished) and self._collect(finished[0], batches, counts)
                progress.update(counts.done + counts.failed - progress.n)
                progress.set_postfix_str(self._standing(counts, progress.format_dict["elapsed"]))
                if changed:
                    yield counts
        finally:
            progress.close()
            for actor, _ in self.in_flight.values():
                ray.kill(actor)
        if counts.left:
            raise RuntimeError(f"{counts.left} of {total} scenes are neither fitted nor recorded as failed")

    def _standing(self, counts: Counts, elapsed: float) -> str:
        psnr = f"{counts.mean_psnr:.2f} dB" if counts.psnrs else "-"
        speed = f"{3600 * counts.done / max(elapsed, 1e-3):.0f}/h"
        words = [
            speed,
            f"done={counts.done}",
            f"failed={counts.failed}",
            f"left={counts.left}",
            psnr,
            self.cohorts.text() if self.cohorts else "",
        ]
        return ", ".join(word for word in words if word)

    def _start_actor(self) -> None:
        actor = self.make_actor()
        self.in_flight[actor.ready.remote()] = (actor, None)

    def _collect(self, future: Any, batches: Iterator[pa.Table], counts: Counts) -> bool:
        """Takes one finished call and gives its actor the next batch. → whether the counts changed."""
        actor, batch = self.in_flight.pop(future)
        try:
            outcomes = ray.get(future)
        except RayActorError as error:
            ray.kill(actor)
            if batch is None:
                self._start_failed(error)
                return False
            self._actor_died(batch, str(error), counts)
            self._start_actor()
            return True
        except RayTaskError as error:  # no scene's failure, those are outcomes: the job's, as a disk that is full
            ray.kill(actor)
            raise error.cause from error
        self.failed_starts = 0
        if batch is not None:
            for outcome in outcomes:
                self._record(outcome, counts)
        following = self.again.popleft() if self.again else next(batches, None)
        if following is None:
            ray.kill(actor)
        else:
            self.in_flight[actor.fit.remote(following)] = (actor, following)
        return batch is not None

    def _start_failed(self, error: RayActorError) -> None:
        """Tries again; after too many failures in a row does without this actor, if there are others."""
        self.failed_starts += 1
        if self.failed_starts < START_ATTEMPTS * self.num_actors:
            self._start_actor()
        elif not self.in_flight:
            raise RuntimeError(f"no actor could start, {self.failed_starts} tries in a row: {error}") from error

    def _record(self, outcome: dict[str, Any], counts: Counts) -> None:
        if outcome["kind"] == "fitted":
            counts.done += 1
            counts.psnrs.append(outcome["psnr"])
            return
        counts.failed += 1
        attempt = self.attempts.get(outcome["scene_id"], 0) + 1
        self.failures.add(outcome["scene_id"], attempt, outcome["kind"], outcome["message"])

    def _actor_died(self, batch: pa.Table, message: str, counts: Counts) -> None:
        """Each scene of the batch that is not committed has cost an actor: try it again, or give it up."""
        ids = batch["scene_id"].to_pylist()
        committed = self.committed().intersection(ids)
        if self.cohorts and self.cohorts.advanced(ids):  # three deaths in a row count, not three in a week
            self.attempts.update(dict.fromkeys(ids, 0))
        left = []
        for index, scene_id in enumerate(ids):
            if scene_id in committed:
                counts.done += 1
                continue
            if committed and self.cohorts:
                counts.failed += 1
                self.failures.add(scene_id, 1, "left out", "its cohort was committed without it")
                continue
            self.attempts[scene_id] = self.attempts.get(scene_id, 0) + 1
            if self.attempts[scene_id] < self.max_attempts:
                self.failures.add(scene_id, self.attempts[scene_id], "retry", message)
                left.append(index)
            else:
                counts.failed += 1
                self.failures.add(scene_id, self.attempts[scene_id], "actor died", message)
        if not self.cohorts:
            self.again.extend(batch.slice(index, 1) for index in left)
        elif left:
            self.again.append(batch.take(left))
