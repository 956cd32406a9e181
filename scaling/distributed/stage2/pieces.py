"""What becomes of pieces: those that wait, and the account of those that came back or were lost; see dispatcher.py."""

from __future__ import annotations

from collections import Counter, deque
from contextlib import suppress

from scaling.distributed.stage2.messages import FITTED, Accounts, Cohorts, Counts, Fitted, Outcome, Piece
from scaling.library.failures import RETRY, event
from scaling.storage.progress import Progress
from scaling.storage.text import shown

MAX_LOSSES = 5  # lost nodes and failed writes per scene; one more node counts as a death, one more write ends the job
MOST_TOLD = 20  # warnings about scenes that are printed


class Pieces:
    """Settles pieces, or lets them wait for another attempt.

    max_attempts: actors that a scene may kill, alone in its piece; accounts: the ledger of the run; cohorts: how far
    cohorts have come; None: pieces may be halved.
    """

    def __init__(self, max_attempts: int, accounts: Accounts, cohorts: Cohorts | None = None) -> None:
        self.max_attempts = max_attempts
        self.accounts = accounts
        self.cohorts = cohorts
        self.waiting: deque[Piece] = deque()  # for an actor: the batch that was read last, what is left of lost ones
        self.deaths: Counter[str] = Counter()  # of actors that held this scene alone, or its cohort
        self.losses: Counter[str] = Counter()
        self.told = 0

    def lost(self, piece: Piece, message: str, counts: Counts, own_doing: bool, alone: bool = True) -> None:
        """Handle a piece that was lost with its actor, its node or its write: settle the scenes that were committed;
        try the others again, or give them up."""
        part = None
        with suppress(FileNotFoundError):
            part = self.accounts.find(piece.attempt, piece.ids)
        if part is not None:  # the commit came through before the actor was lost
            self.settle(piece, Fitted([Outcome(scene_id, FITTED) for scene_id in part.scene_ids], part), counts)
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
        if not alone:
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

    def settle(self, piece: Piece, result: Fitted, counts: Counts) -> None:
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
