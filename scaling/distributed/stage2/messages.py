"""The units of stage 2's work, and what passes between an actor, the driver and its ledger when a batch is done."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from scaling.library.manifest import Event
from scaling.library.parts import Part

FITTED = "fitted"


@dataclass(frozen=True)
class Outcome:
    """One scene's. kind: `fitted`, or why it is given up; message: what the user is told; psnr: in dB, of its test
    views."""

    scene_id: str
    kind: str
    message: str = ""
    psnr: float | None = None


@dataclass(frozen=True)
class Fitted:
    """A batch's: an outcome for each scene, and the part that holds those that were fitted."""

    outcomes: list[Outcome]
    part: Part | None


class Accounts(Protocol):
    """Where scenes are accounted for: the ledger of the run."""

    def check(self) -> None: ...

    def find(self, attempt: int, batch: list[str]) -> Part | None: ...

    def add(self, part: Part) -> None: ...

    def record(self, events: list[Event]) -> None: ...


class Cohorts(Protocol):
    """How far cohorts in flight have come."""

    def text(self) -> str:
        """For the progress bar."""

    def epochs(self, ids: list[str]) -> int:
        """Epochs that the cohort of these scenes has behind it."""


@dataclass
class Counts:
    """How a job stands."""

    total: int
    done: int = 0
    failed: int = 0
    psnr_sum: float = 0.0
    psnr_count: int = 0

    @property
    def left(self) -> int:
        """Scenes that are neither fitted nor given up."""
        return self.total - self.done - self.failed

    @property
    def mean_psnr(self) -> float | None:
        """In dB, over the scenes fitted so far."""
        return self.psnr_sum / self.psnr_count if self.psnr_count else None


@dataclass
class Piece:
    """A batch or what is left of one. attempt: from 1; epochs: that a cohort had behind it when it was handed out."""

    rows: pa.Table
    attempt: int = 1
    epochs: int = 0

    @property
    def ids(self) -> list[str]:
        return self.rows["scene_id"].to_pylist()

    def again(self, indices: list[int]) -> Piece:
        """Some of its scenes, for another attempt."""
        return Piece(self.rows.take(indices), self.attempt + 1)


@dataclass
class Flight:
    """A call in flight: an actor and its piece (None while it starts), and since when."""

    actor: Any
    piece: Piece | None
    since: float = field(default_factory=time.monotonic)
