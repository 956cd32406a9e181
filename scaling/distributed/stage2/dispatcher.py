"""Hands batches of scenes to actors, a few in flight per actor, and accounts for every scene.

A piece is a batch, or what is left of one. It is settled when each of its scenes is in the library or the failures:

    batches ─► waiting ─► in flight ─┬─► came back ─────────────────────────► settled: fitted, or failed with a reason
                                     ├─► lost, but its part was committed ──► settled: fitted
                                     ├─► write failed or node died,
                                     │   at most MAX_LOSSES times ──────────► waiting, as it is
                                     └─► actor died or hung
                                          ├─► beside other pieces ──────────► waiting, as it is, to be held alone
                                          ├─► several scenes ───────────────► waiting, in halves
                                          └─► one scene, or a cohort
                                               ├─► < max_attempts deaths ───► waiting, as it is
                                               └─► max_attempts deaths ─────► settled: given up

So a scene that kills its actor is soon alone. Every scene is tried at least once. Two attempts may both commit a scene;
readers count the part with the smallest epoch and attempt. A cohort is never divided.

An actor that holds several pieces is a pipeline. The last batches are not given ahead: who is free first takes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError

from scaling.distributed.stage2.interrupts import Interrupts
from scaling.distributed.stage2.messages import Accounts, Cohorts, Counts, Flight, Piece
from scaling.distributed.stage2.pieces import MAX_LOSSES, Pieces
from scaling.storage.atomic import ADVICE
from scaling.storage.progress import Progress

START_ATTEMPTS = 2  # failed starts in a row, per actor, before a job without actors gives up
TICK_SECONDS = 1.0
STAFF_SECONDS = 10.0  # between two looks at how many actors the cluster can hold
DRAIN_SECONDS = 20.0  # less than a spot machine or a pod gets to shut down


class Dispatcher:
    """Runs batches on actors until every scene is settled.

    make_actor: starts an actor with `ready()` and `fit(rows, attempt) -> Fitted`; it is called again where one dies;
    wanted: how many actors the cluster can hold now; max_attempts: actors that a scene may kill, alone in its piece;
    deadline: seconds that a ready actor may take for a batch (with cohorts: for an epoch) before it is killed;
    accounts: the ledger of the run; cohorts: how far cohorts have come; None: batches may be halved; title: of the
    progress bar; at_once: pieces that an actor may hold.
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
        at_once: int = 1,
    ) -> None:
        self.make_actor = make_actor
        self.wanted = wanted
        self.deadline = deadline
        self.pieces = Pieces(max_attempts, accounts, cohorts)
        self.cohorts = cohorts
        self.title = title
        self.at_once = at_once
        self.in_flight: dict[Any, Flight] = {}  # by the future of the call
        self.exhausted = False
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
                    self.pieces.accounts.check()
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
        at_work = len({id(flight.actor) for flight in self.in_flight.values() if flight.piece is not None})
        words = [
            f"{3600 * counts.done / max(elapsed, 1e-3):.0f}/h",
            f"done={counts.done}",
            f"failed={counts.failed}",
            f"left={counts.left}",
            f"actors={at_work}/{self._num_actors()}",
            "" if counts.mean_psnr is None else f"{counts.mean_psnr:.2f} dB",
            self.cohorts.text() if self.cohorts else "",
        ]
        return ", ".join(word for word in words if word)

    def _num_actors(self) -> int:
        return len({id(flight.actor) for flight in self.in_flight.values()})

    def _held_by(self, actor: Any) -> list[Any]:
        """The futures of an actor's calls in flight, in the order in which they were made."""
        return [future for future, flight in self.in_flight.items() if flight.actor is actor]

    def _staff(self) -> None:
        """Start actors: as many as the cluster can hold and there may be work for."""
        now = time.monotonic()
        if now - self.staffed_at > STAFF_SECONDS:
            self.target, self.staffed_at = max(1, self.wanted()), now
        while self._num_actors() < self.target and now >= self.no_start_before:
            starting = sum(flight.piece is None for flight in self.in_flight.values())
            if self.exhausted and starting >= len(self.pieces.waiting):
                return
            actor = self.make_actor()
            self.in_flight[actor.ready.remote()] = Flight(actor, None)

    def _may_start(self, draining: bool) -> bool:
        """Whether there is work to start actors for. After a failed start the next try comes a little later."""
        return not draining and bool(self.pieces.waiting or not self.exhausted)

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
            goes_on = self._collect(future, flight, counts)
            if goes_on and give_more:
                self._give(flight.actor, batches, counts)
            if not self._held_by(flight.actor):
                ray.kill(flight.actor)
        self._kill_overdue(counts)
        return counts.left != before

    def _read(self, batches: Iterator[pa.Table]) -> None:
        """Read the next batch, if there is one, to wait for an actor."""
        rows = next(batches, None)
        self.exhausted = rows is None
        if rows is not None:
            self.pieces.waiting.append(Piece(rows))

    def _give(self, actor: Any, batches: Iterator[pa.Table], counts: Counts) -> None:
        """Give the actor its next pieces."""
        while len(self._held_by(actor)) < self.at_once:
            if not self.pieces.waiting and not self.exhausted:
                self._read(batches)
            if not self.pieces.waiting or not self._may_hold(actor, self.pieces.waiting[0], counts):
                return
            piece = self.pieces.waiting.popleft()
            piece.epochs = self.cohorts.epochs(piece.ids) if self.cohorts else 0
            self.in_flight[actor.fit.remote(piece.rows, piece.attempt)] = Flight(actor, piece)

    def _may_hold(self, actor: Any, piece: Piece, counts: Counts) -> bool:
        """Whether a piece may be given to an actor beside what it holds."""
        held = [self.in_flight[future].piece for future in self._held_by(actor)]
        if not held:
            return True
        # What was lost before may be deadly, so it is held alone.
        suspect = piece.attempt > 1 or any(other is not None and other.attempt > 1 for other in held)
        given = sum(len(flight.piece.rows) for flight in self.in_flight.values() if flight.piece is not None)
        return not suspect and counts.left - given >= len(piece.rows) * self.target

    def _collect(self, future: Any, flight: Flight, counts: Counts) -> bool:
        """Take one finished call. → whether its actor can go on."""
        try:
            result = ray.get(future)
        except RayTaskError as error:
            self._task_failed(flight, error, counts)
            return False
        except RayError as error:
            # A lost node is not the fault of its scenes. Of a dead actor only the message says whether its node died.
            lost_node = isinstance(error, ActorUnavailableError) or "its node has died" in str(error)
            own_doing = isinstance(error, RayActorError) and not lost_node
            others = self._end(flight.actor)
            for lost in (flight, *others):
                self._gone(lost, error, counts, own_doing, alone=not others)
            return False
        self.failed_starts = 0
        if flight.piece is not None:
            self.pieces.settle(flight.piece, result, counts)
        # What was given later may have waited for this piece.
        for other in map(self.in_flight.__getitem__, self._held_by(flight.actor)):
            if other.since >= flight.since:
                other.since = time.monotonic()
        return True

    def _end(self, actor: Any) -> list[Flight]:
        """Kill an actor. → its flights that are still under way, which come back no more."""
        ray.kill(actor)
        return [self.in_flight.pop(future) for future in self._held_by(actor)]

    def _task_failed(self, flight: Flight, error: RayTaskError, counts: Counts) -> None:
        """Handle an error that the actor raised. It is no scene's own, as those are outcomes. A failed write is tried
        again where that may help; any other error is the job's, and is raised."""
        others, cause = self._end(flight.actor), error.cause
        passing = isinstance(cause, RayError) or (isinstance(cause, OSError) and cause.errno not in ADVICE)
        if not passing or any(self.pieces.losses[i] >= MAX_LOSSES for i in (flight.piece.ids if flight.piece else [])):
            raise cause from error
        for lost in (flight, *others):
            self._gone(lost, cause, counts, own_doing=lost.piece is None)  # without a piece: a failed start

    def _kill_overdue(self, counts: Counts) -> None:
        """Kill actors that have held a batch for too long: a hung fit, a stopped process, a device that is gone."""
        now = time.monotonic()
        for future, flight in list(self.in_flight.items()):
            if future not in self.in_flight or flight.piece is None or now - flight.since <= self.deadline:
                continue
            epochs = self.cohorts.epochs(flight.piece.ids) if self.cohorts else 0
            if epochs > flight.piece.epochs:  # the deadline of a cohort counts from its last epoch
                flight.piece.epochs, flight.since = epochs, now
                continue
            late = TimeoutError(f"no result within {self.deadline:.0f} s")
            for lost in self._end(flight.actor):
                self._gone(lost, late, counts, own_doing=lost is flight)

    def _gone(self, flight: Flight, error: Exception, counts: Counts, own_doing: bool, alone: bool = True) -> None:
        """Handle the end of an actor: settle its piece or try it again, or count a failed start.

        own_doing: whether the actor died of itself, not with its node or of a failed write; alone: whether only this
        piece can be the cause.
        """
        if flight.piece is not None:
            self.pieces.lost(flight.piece, " ".join(str(error).split())[:500], counts, own_doing, alone)
        elif own_doing:
            # Exponential back-off: after a minute at most the next start is tried.
            self.failed_starts += 1
            self.no_start_before = time.monotonic() + min(60.0, 2.0 ** (self.failed_starts - START_ATTEMPTS))
            if self.failed_starts >= START_ATTEMPTS * self.target and not self.in_flight:
                raise RuntimeError(f"no actor could start, {self.failed_starts} tries in a row: {error}") from error
