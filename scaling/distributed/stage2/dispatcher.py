"""Hands batches of scenes to actors, one in flight per actor, and accounts for every scene.

A piece is a batch, or what is left of one. It is settled when each of its scenes is in the library or the failures:

    batches ─► waiting ─► in flight ─┬─► came back ─────────────────────────► settled: fitted, or failed with a reason
                                     ├─► lost, but its part was committed ──► settled: fitted
                                     ├─► write failed or node died,
                                     │   at most MAX_LOSSES times ──────────► waiting, as it is
                                     └─► actor died or hung
                                          ├─► several scenes ───────────────► waiting, in halves
                                          └─► one scene, or a cohort
                                               ├─► < max_attempts deaths ───► waiting, as it is
                                               └─► max_attempts deaths ─────► settled: given up

So a scene that kills its actor is soon alone. Every scene is tried at least once. Two attempts may both commit a scene;
readers count the part with the smallest epoch and attempt. A cohort is never divided.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from scaling.distributed.stage2.interrupts import Interrupts
from scaling.distributed.stage2.messages import FITTED, Accounts, Cohorts, Counts, Fitted, Flight, Outcome, Piece
from scaling.library.failures import RETRY, event
from scaling.storage.atomic import ADVICE
from scaling.storage.progress import Progress
from scaling.storage.text import shown

START_ATTEMPTS = 2  # failed starts in a row, per actor, before a job without actors gives up
MAX_LOSSES = 5  # lost nodes and failed writes per scene; one more node counts as a death, one more write ends the job
MOST_TOLD = 20  # warnings about scenes that are printed
TICK_SECONDS = 1.0
STAFF_SECONDS = 10.0  # between two looks at how many actors the cluster can hold
DRAIN_SECONDS = 20.0  # less than a spot machine or a pod gets to shut down


class Dispatcher:
    """Runs batches on actors until every scene is settled.

    make_actor: starts an actor with `ready()` and `fit(rows, attempt) -> Fitted`; it is called again where one dies;
    wanted: how many actors the cluster can hold now; max_attempts: actors that a scene may kill, alone in its piece;
    deadline: seconds that a ready actor may take for a batch (with cohorts: for an epoch) before it is killed;
    accounts: the ledger of the run; cohorts: how far cohorts have come; None: batches may be halved; title: of the
    progress bar.
    """

    def __init__(
        self,
        make_actor: Callable[[], Any],
        wanted: Callable[[], int],
        max_attempts: int,
        deadline: float,
        accounts: Accounts,
        cohorts: Cohorts | None = None,
        title: str = "stage 2",
    ) -> None:
        self.make_actor = make_actor
        self.wanted = wanted
        self.max_attempts = max_attempts
        self.deadline = deadline
        self.accounts = accounts
        self.cohorts = cohorts
        self.title = title
        self.in_flight: dict[Any, Flight] = {}  # by the future of the call
        self.waiting: deque[Piece] = deque()  # what is left of batches that were lost
        self.exhausted = False
        self.deaths: Counter[str] = Counter()  # of actors that held this scene alone, or its cohort
        self.losses: Counter[str] = Counter()
        self.told = 0
        self.failed_starts = 0
        self.no_start_before = 0.0
        self.staffed_at = float("-inf")
        self.target = 1

    def run(self, batches: Iterator[pa.Table], total: int) -> Generator[Counts]:
        """Fit every batch; yield the counts when the first actors start, and whenever scenes are settled.

        Raises RuntimeError where no actor can start, or where scenes of `total` are left at the end; KeyboardInterrupt
        where the job was asked to stop, once the batches in flight are done or DRAIN_SECONDS are over; and an actor's
        own exception where another try would not help, as on a full disk.
        """
        if not total:
            return
        counts = Counts(total)
        progress = Progress(total=total, unit="scene", desc=self.title)
        try:
            with Interrupts() as interrupts:
                stop_at = float("inf")
                self._staff()
                yield counts
                self._read(batches)  # while actors start
                while counts.left:
                    self.accounts.check()
                    # Draining: no new batches and no new actors, while the batches in flight may finish.
                    if interrupts.requested and stop_at == float("inf"):
                        stop_at = time.monotonic() + DRAIN_SECONDS
                        self._start_draining()
                    if not interrupts.requested:
                        self._staff()
                    # When time is up, or nothing is in flight and nothing can start, there is nothing to wait for.
                    if time.monotonic() > stop_at or not (self.in_flight or self._may_start(interrupts.requested)):
                        break
                    changed = self._wait(batches, counts, give_more=not interrupts.requested)
                    progress.update(counts.done + counts.failed - progress.n)
                    progress.set_postfix_str(self._standing(counts, progress.format_dict["elapsed"]))
                    if changed:
                        yield counts
            if interrupts.requested and counts.left:
                raise KeyboardInterrupt
        finally:
            progress.close()
            for flight in self.in_flight.values():  # an actor that stays would keep its GPU
                ray.kill(flight.actor)
        if counts.left:
            raise RuntimeError(f"{counts.left} of {total} scenes are neither fitted nor recorded as failed")

    def _standing(self, counts: Counts, elapsed: float) -> str:
        at_work = sum(flight.piece is not None for flight in self.in_flight.values())
        words = [
            f"{3600 * counts.done / max(elapsed, 1e-3):.0f}/h",
            f"done={counts.done}",
            f"failed={counts.failed}",
            f"left={counts.left}",
            f"actors={at_work}/{len(self.in_flight)}",
            "" if counts.mean_psnr is None else f"{counts.mean_psnr:.2f} dB",
            self.cohorts.text() if self.cohorts else "",
        ]
        return ", ".join(word for word in words if word)

    def _staff(self) -> None:
        """Start actors: as many as the cluster can hold and there may be work for."""
        now = time.monotonic()
        if now - self.staffed_at > STAFF_SECONDS:
            self.target, self.staffed_at = max(1, self.wanted()), now
        while len(self.in_flight) < self.target and now >= self.no_start_before:
            starting = sum(flight.piece is None for flight in self.in_flight.values())
            if self.exhausted and starting >= len(self.waiting):
                return
            actor = self.make_actor()
            self.in_flight[actor.ready.remote()] = Flight(actor, None)

    def _may_start(self, draining: bool) -> bool:
        """Whether there is work to start actors for. After a failed start the next try comes a little later."""
        return not draining and bool(self.waiting or not self.exhausted)

    def _start_draining(self) -> None:
        """Stop the actors that have no batch, and say how long the others have."""
        for future, flight in list(self.in_flight.items()):
            if flight.piece is None:
                ray.kill(flight.actor)
                del self.in_flight[future]
        print(
            f"\nstopping: {len(self.in_flight)} batches in flight have {DRAIN_SECONDS:.0f} s to finish; "
            "interrupt again to stop at once",
            flush=True,
        )

    def _wait(self, batches: Iterator[pa.Table], counts: Counts, give_more: bool) -> bool:
        """Take a call that comes back within TICK_SECONDS. → whether the counts changed."""
        if not self.in_flight:
            time.sleep(TICK_SECONDS / 4)
            return False
        finished, _ = ray.wait(list(self.in_flight), num_returns=1, timeout=TICK_SECONDS)
        before = counts.left
        for future in finished:
            flight = self.in_flight.pop(future)
            if self._collect(future, flight, counts) and give_more:
                self._give(flight.actor, batches)
            else:
                ray.kill(flight.actor)
        self._kill_overdue(counts)
        return counts.left != before

    def _read(self, batches: Iterator[pa.Table]) -> None:
        """Read the next batch, if there is one, to wait for an actor."""
        rows = next(batches, None)
        self.exhausted = rows is None
        if rows is not None:
            self.waiting.append(Piece(rows))

    def _give(self, actor: Any, batches: Iterator[pa.Table]) -> None:
        """Give the actor its next batch, or stop it where there is none."""
        if not self.waiting and not self.exhausted:
            self._read(batches)
        if not self.waiting:
            ray.kill(actor)
            return
        piece = self.waiting.popleft()
        piece.epochs = self.cohorts.epochs(piece.ids) if self.cohorts else 0
        self.in_flight[actor.fit.remote(piece.rows, piece.attempt)] = Flight(actor, piece)

    def _collect(self, future: Any, flight: Flight, counts: Counts) -> bool:
        """Take one finished call. → whether its actor can go on."""
        try:
            result = ray.get(future)
        except RayTaskError as error:
            self._task_failed(flight, error, counts)
            return False
        except RayError as error:
            ray.kill(flight.actor)
            # A lost node is not the fault of its scenes. Of a dead actor only the message says whether its node died.
            lost_node = isinstance(error, ActorUnavailableError) or "its node has died" in str(error)
            self._gone(flight, error, counts, own_doing=isinstance(error, RayActorError) and not lost_node)
            return False
        self.failed_starts = 0
        if flight.piece is not None:
            self._settle(flight.piece, result, counts)
        return True

    def _task_failed(self, flight: Flight, error: RayTaskError, counts: Counts) -> None:
        """Handle an error that the actor raised. It is no scene's own, as those are outcomes. A failed write is tried
        again where that may help; any other error is the job's, and is raised."""
        ray.kill(flight.actor)
        cause = error.cause
        passing = isinstance(cause, RayError) or (isinstance(cause, OSError) and cause.errno not in ADVICE)
        if not passing or any(self.losses[i] >= MAX_LOSSES for i in (flight.piece.ids if flight.piece else [])):
            raise cause from error
        self._gone(
            flight, cause, counts, own_doing=flight.piece is None
        )  # without a piece, it counts as a failed start

    def _kill_overdue(self, counts: Counts) -> None:
        """Kill actors that have held a batch for too long: a hung fit, a stopped process, a device that is gone."""
        now = time.monotonic()
        for future, flight in list(self.in_flight.items()):
            if flight.piece is None or now - flight.since <= self.deadline:
                continue
            epochs = self.cohorts.epochs(flight.piece.ids) if self.cohorts else 0
            if epochs > flight.piece.epochs:  # the deadline of a cohort counts from its last epoch
                flight.piece.epochs, flight.since = epochs, now
                continue
            ray.kill(flight.actor)
            del self.in_flight[future]
            self._gone(flight, TimeoutError(f"no result within {self.deadline:.0f} s"), counts, own_doing=True)

    def _gone(self, flight: Flight, error: Exception, counts: Counts, own_doing: bool) -> None:
        """Handle the end of an actor: settle its piece or try it again, or count a failed start.

        own_doing: whether the actor died of itself, not with its node or of a failed write.
        """
        if flight.piece is not None:
            self._lost(flight.piece, " ".join(str(error).split())[:500], counts, own_doing)
        elif own_doing:
            # Exponential back-off: after a minute at most the next start is tried.
            self.failed_starts += 1
            self.no_start_before = time.monotonic() + min(60.0, 2.0 ** (self.failed_starts - START_ATTEMPTS))
            if self.failed_starts >= START_ATTEMPTS * self.target and not self.in_flight:
                raise RuntimeError(f"no actor could start, {self.failed_starts} tries in a row: {error}") from error

    def _lost(self, piece: Piece, message: str, counts: Counts, own_doing: bool) -> None:
        """Handle a piece that was lost with its actor, its node or its write: settle the scenes that were committed;
        try the others again, or give them up."""
        part = None
        with suppress(FileNotFoundError):
            part = self.accounts.find(piece.attempt, piece.ids)
        if part is not None:  # the commit came through before the actor was lost
            self._settle(piece, Fitted([Outcome(scene_id, FITTED) for scene_id in part.scene_ids], part), counts)
        committed = set(part.scene_ids) if part else set()
        left = [index for index, scene_id in enumerate(piece.ids) if scene_id not in committed]
        ids = [piece.ids[index] for index in left]
        # A committed cohort's own model is final: a scene that is not in its part cannot join it any more.
        if self.cohorts and part is not None:
            self._give_up(ids, piece.attempt, "left out", "its cohort was committed without it", counts)
            return
        if not own_doing:
            self.losses.update(ids)
            if max(self.losses[scene_id] for scene_id in ids or [""]) <= MAX_LOSSES:
                self._retry(piece, [left], message)
                return
        self._died(piece, left, ids, message, counts)

    def _died(self, piece: Piece, left: list[int], ids: list[str], message: str, counts: Counts) -> None:
        """Try a piece that killed its actor again: in halves, or as it is where it is one scene or a cohort. Give it up
        after max_attempts deaths."""
        if len(left) > 1 and not self.cohorts:
            middle = len(left) // 2
            self._retry(piece, [left[:middle], left[middle:]], message)
            return
        # Only deaths in a row count: a cohort that has come further since starts from none.
        if self.cohorts and self.cohorts.epochs(piece.ids) > piece.epochs:
            self.deaths.subtract({scene_id: self.deaths[scene_id] for scene_id in ids})
        self.deaths.update(ids)
        if max((self.deaths[scene_id] for scene_id in ids), default=0) >= self.max_attempts:
            self._give_up(ids, piece.attempt, "actor died", message, counts)
        else:
            self._retry(piece, [left], message)

    def _retry(self, piece: Piece, groups: list[list[int]], message: str) -> None:
        for group in groups:
            if group:
                self.waiting.append(piece.again(group))
                ids = self.waiting[-1].ids
                self.accounts.record([event(scene_id, piece.attempt, RETRY, message) for scene_id in ids])

    def _settle(self, piece: Piece, result: Fitted, counts: Counts) -> None:
        """Count what came back of a piece, and record its failures."""
        if result.part is not None:
            self.accounts.add(result.part)
        for outcome in result.outcomes:
            if outcome.kind == FITTED:
                counts.done += 1
                self._tell(outcome.message)
                if outcome.psnr is not None:
                    counts.psnr_sum += outcome.psnr
                    counts.psnr_count += 1
        failed = [outcome for outcome in result.outcomes if outcome.kind != FITTED]
        counts.failed += len(failed)
        if failed:
            self.accounts.record([event(o.scene_id, piece.attempt, o.kind, o.message) for o in failed])

    def _tell(self, message: str) -> None:
        """Print a warning about a fitted scene above the progress bar. Only the first MOST_TOLD are printed."""
        if message and self.told < MOST_TOLD:
            self.told += 1
            Progress.write(
                f"warning: {shown(message)}" + (" (further warnings are not shown)" if self.told == MOST_TOLD else "")
            )

    def _give_up(self, ids: list[str], attempt: int, kind: str, message: str, counts: Counts) -> None:
        counts.failed += len(ids)
        self.accounts.record([event(scene_id, attempt, kind, message) for scene_id in ids])
