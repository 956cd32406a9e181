"""The units of stage 2's work, and what actors, the driver and its ledger exchange when a batch is done."""

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
    """What became of a scene. kind: `fitted`, or why it is given up; message: what the user is told; psnr: of its test
    views, in dB."""

    scene_id: str
    kind: str
    message: str = ""
    psnr: float | None = None


@dataclass(frozen=True)
class Fitted:
    """What became of a batch: an outcome for each scene, and the part with the fitted ones, None if there are none."""

    outcomes: list[Outcome]
    part: Part | None


class Accounts(Protocol):
    """Keeps account of every scene: the run's ledger, as a rule."""

    def check(self) -> None: ...

    def find(self, attempt: int, batch: list[str]) -> Part | None: ...

    def add(self, part: Part) -> None: ...

    def record(self, events: list[Event]) -> None: ...


class Cohorts(Protocol):
    """Tells how far the cohorts in flight have come."""

    def text(self) -> str:
        """A text for the progress bar."""

    def epochs(self, ids: list[str]) -> int:
        """The number of epochs that the cohort of these scenes has completed."""


@dataclass
class Counts:
    """How far a job has come: numbers of scenes, and the sum of their PSNR in dB."""

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
        """The mean PSNR of the scenes fitted so far, in dB; None where no scene has one."""
        return self.psnr_sum / self.psnr_count if self.psnr_count else None


@dataclass
class Piece:
    """A batch, or what is left of one. attempt: from 1; epochs: completed by a cohort when it was last looked at."""

    rows: pa.Table
    attempt: int = 1
    epochs: int = 0

    @property
    def ids(self) -> list[str]:
        return self.rows["scene_id"].to_pylist()

    def again(self, indices: list[int]) -> Piece:
        """The scenes at `indices`, as a piece for the next attempt."""
        return Piece(self.rows.take(indices), self.attempt + 1)


@dataclass
class Flight:
    """A call in flight. piece: None while the actor starts; since: monotonic seconds from which its deadline counts."""

    actor: Any
    piece: Piece | None
    since: float = field(default_factory=time.monotonic)
