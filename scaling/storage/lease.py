"""The lease of a folder: one process at a time may write there, the driver of a run or the writer of a store.

LEASES/lease-<epoch>[-<token>].json, rewritten every few seconds while its driver lives. A driver that takes the lease
gets the next epoch, a fencing token. A driver that was paused and wakes up finds a higher epoch: it must stop. What it
still commits to a run carries its old epoch, and readers ignore it (`library/manifest.py`). So the lease prevents
double work, and the epochs keep the run consistent.
"""

from __future__ import annotations

import os
import random
import re
import socket
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ValidationError

from scaling.storage.atomic import replace_file
from scaling.storage.commit import commit_file
from scaling.storage.formats import MAX_EPOCH
from scaling.storage.limited import read_limited
from scaling.storage.links import refuse_links
from scaling.storage.paths import AnyPath
from scaling.storage.text import shown

MAX_NOTE_BYTES = 64 << 10  # a hundred times what a lease has
RENEW_SECONDS = 3.0
_NAME = re.compile(r"lease-([0-9]{6})(?:-[0-9a-f]{8})?\.json")
SILENT_SECONDS = 30.0  # a driver that has not renewed its lease for this long is taken for dead


class LeaseHeld(RuntimeError):
    """Another process works in the folder."""


class LeaseLost(RuntimeError):
    """Another process has taken the folder over; this one must not go on."""


class _Note(BaseModel):
    """A lease file. machine: where `pid` is valid; started: when that process started; since: when it took the lease,
    in UTC, for people; beat: grows at each renewal.

    Other keys are ignored: a newer program's lease must hold, too."""

    host: str
    machine: str
    pid: int
    started: str
    since: str = ""
    beat: int = 0
    released: bool = False


class Lease:
    """A lease that this process holds: made by `take`, renewed by a thread until `release`. `check` raises where it is
    lost."""

    def __init__(self, folder: AnyPath, path: AnyPath, epoch: int, note: _Note) -> None:
        self.folder, self.path, self.epoch, self._note = folder, path, epoch, note
        self._lost = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, folder: AnyPath, least_epoch: int) -> Lease:
        """Take the lease with an epoch above all earlier ones and of at least `least_epoch`.

        The lease of a dead process on this machine is taken over at once, any other after SILENT_SECONDS without a sign
        of life. Raises LeaseHeld where another driver is alive, ValueError naming a file that is no lease, or whose
        epoch leaves none above it.
        """
        note = _this_process()
        refuse_links(folder)
        _check_names(folder)
        while True:
            epoch, path = _newest(folder)
            if path is not None:
                _wait_for_silence(path)
            epoch = max(epoch + 1, least_epoch)
            if epoch > MAX_EPOCH:
                raise ValueError(
                    f"{folder}: something in this run bears epoch {epoch - 1}, and none is left above it; no driver "
                    "gets that far (each takes one more than the last): find the file with that number and set it aside"
                )
            claimed = _claim(folder, epoch, note)
            if claimed is not None:
                for old in list(_leases(folder))[:-2]:
                    old.unlink(missing_ok=True)
                return cls(folder, claimed, epoch, note)

    def check(self) -> None:
        """Raise LeaseLost where another driver has taken the run over."""
        if self._lost:
            raise LeaseLost(self._lost)

    def check_now(self) -> None:
        """As `check`, by a look at the folder: a process that was paused may not have noticed yet."""
        epoch, path = _newest(self.folder)
        if epoch > self.epoch:
            self._lost = self._lost or self._taken_by(path)
        self.check()

    def _taken_by(self, path: AnyPath | None) -> str:
        return (
            f"{self.folder.parent}: {_owner(path)} has taken the work over, as this process gave no sign of life for "
            f"{SILENT_SECONDS:.0f} s; nothing is lost: what was committed before counts, and the other one does the "
            "rest"
        )

    def release(self) -> None:
        """Stop renewing the lease and mark it as released, so that the next driver can start at once."""
        self._stop.set()
        self._thread.join()
        if not self._lost:
            replace_file(self.path, self._note.model_copy(update={"released": True}).model_dump_json().encode())

    def _renew(self) -> None:
        """Renew the lease until it is released or another driver has taken the run over."""
        while not self._stop.wait(RENEW_SECONDS):
            try:
                epoch, path = _newest(self.folder)
                if epoch > self.epoch:
                    self._lost = self._taken_by(path)
                    return
                self._note.beat += 1
                replace_file(self.path, self._note.model_dump_json().encode())
            except OSError:  # a full disk, a network: the driver's own writes fail, too, and report it
                continue


def holder(folder: AnyPath) -> str:
    """Who holds the lease, in words, from its file alone. Raises ValueError naming a file that is no lease."""
    _check_names(folder)
    _, path = _newest(folder)
    note = _read(path)
    if note is None or note.released:
        return "none"
    who = f"process {note.pid} on {note.host}"
    if _died_here(note):
        return f"none: {who} died; the same command goes on"
    return f"{who}, last sign of life number {note.beat}" + ("" if note.machine == _machine() else " (another machine)")


def _claim(folder: AnyPath, epoch: int, note: _Note) -> AnyPath | None:
    """Try to claim an epoch. → the lease file, or None where another driver claims it.

    On a disk the first link wins. An object store has no exclusive write: a claim holds if no other is visible after it
    was written. If two drivers claim at once, at least one of them gives way.
    """
    data = note.model_dump_json().encode()
    if isinstance(folder, Path):
        path = folder / f"lease-{epoch:06d}.json"
        return path if commit_file(path, data) else None
    mine = folder / f"lease-{epoch:06d}-{uuid.uuid4().hex[:8]}.json"
    replace_file(mine, data)
    if [path.name for path in _leases(folder) if _epoch(path) >= epoch] == [mine.name]:
        return mine
    # Both drivers may have given way: random waits let one of them come first at the next try.
    mine.unlink(missing_ok=True)
    time.sleep(random.uniform(0.1, 1.0))
    return None


def _wait_for_silence(path: AnyPath) -> None:
    """Return when the driver of a lease is dead, has released it, or was silent for SILENT_SECONDS. Raises LeaseHeld at
    its next sign of life."""
    found = _read(path)
    if found is None or found.released or _died_here(found):
        return
    # Beats are compared, not times: clocks of two machines may differ.
    deadline, told = time.monotonic() + SILENT_SECONDS, False
    while time.monotonic() < deadline:
        now = _read(path)
        if now is None or now.released or _died_here(now):
            return
        if now.beat != found.beat:
            since = f" since {now.since}" if now.since else ""
            raise LeaseHeld(
                f"{path.parent.parent}: process {now.pid} on {now.host} works here{since}, and only one can: wait for "
                "it, stop it (kill -TERM; it finishes what it has begun and goes), or name another folder"
            )
        if not told and time.monotonic() > deadline - SILENT_SECONDS + 2 * RENEW_SECONDS:
            told = True
            print(
                f"no sign of life of process {now.pid} on {shown(now.host)}: after {SILENT_SECONDS:.0f} s without one "
                "its work is taken over"
            )
        time.sleep(RENEW_SECONDS / 10)


def _leases(folder: AnyPath) -> list[AnyPath]:
    """The lease files, the newest last. Other names are left out: `_check_names` reports them."""
    found = (path for path in folder.glob("lease-*.json") if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: path.name)


def _check_names(folder: AnyPath) -> None:
    """Raise ValueError naming a file that seems to be a lease and has no lease's name."""
    for path in folder.glob("lease-*.json"):
        if not _NAME.fullmatch(path.name):
            raise ValueError(f"{path}: this is no name of a lease; set the file aside")


def _epoch(path: AnyPath) -> int:
    return int(path.name.removeprefix("lease-")[:6])


def _newest(folder: AnyPath) -> tuple[int, AnyPath | None]:
    paths = _leases(folder)
    return (_epoch(paths[-1]), paths[-1]) if paths else (0, None)


def _read(path: AnyPath | None) -> _Note | None:
    """The content of a lease file; None where the file is gone: then nobody holds the lease.

    Raises ValueError naming a file that is no lease: who wrote it is not known, so nobody may take it for free.
    """
    if path is None:
        return None
    try:
        return _Note.model_validate_json(read_limited(path, MAX_NOTE_BYTES))
    except FileNotFoundError:
        return None
    except ValueError as error:
        why = "not the content of one" if isinstance(error, ValidationError) else str(error)
        raise ValueError(f"{path}: this is no lease ({why}); if nobody works there, set the file aside") from None


def _owner(path: AnyPath | None) -> str:
    try:
        note = _read(path)
    except (OSError, ValueError):
        note = None
    return f"process {note.pid} on {note.host}" if note else "another driver"


def _this_process() -> _Note:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return _Note(
        host=socket.gethostname(), machine=_machine(), pid=os.getpid(), started=_started(os.getpid()), since=now
    )


def _machine() -> str:
    """Differs wherever a process id may mean another process: machine, boot, container. "" without Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return ""


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks, as process ids are used again. "" where there is no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _died_here(note: _Note) -> bool:
    """Whether the process of a lease ran on this machine and has ended."""
    return note.machine == _machine() != "" and _started(note.pid) != note.started
