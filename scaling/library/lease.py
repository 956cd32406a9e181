"""The lease of a run: one driver at a time may write to it.

LEASES/lease-<epoch>[-<token>].json, rewritten every few seconds while its driver lives. A driver that takes the lease
gets the next epoch, a fencing token. A driver that was paused and wakes up finds a higher epoch: it must stop. What it
still commits carries its old epoch, and readers ignore it (`manifest.py`). So the lease prevents double work, and
the epochs keep the run consistent.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
import uuid
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from scaling.storage.atomic import replace_file
from scaling.storage.commit import commit_file
from scaling.storage.paths import AnyPath

RENEW_SECONDS = 3.0
SILENT_SECONDS = 30.0  # a driver that has not renewed its lease for this long is taken for dead


class LeaseHeld(RuntimeError):
    """Another driver works on the run."""


class LeaseLost(RuntimeError):
    """Another driver has taken the run over; this one must not go on."""


class _Note(BaseModel):
    """A lease file. machine: where `pid` is valid; started: when that process started; beat: grows at each renewal."""

    model_config = ConfigDict(extra="forbid")

    host: str
    machine: str
    pid: int
    started: str
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
        of life. Raises LeaseHeld where another driver is alive.
        """
        note = _this_process()
        while True:
            epoch, path = _newest(folder)
            if path is not None:
                _wait_for_silence(path)
            epoch = max(epoch + 1, least_epoch)
            claimed = _claim(folder, epoch, note)
            if claimed is not None:
                for old in list(_leases(folder))[:-2]:
                    old.unlink(missing_ok=True)
                return cls(folder, claimed, epoch, note)

    def check(self) -> None:
        """Raise LeaseLost where another driver has taken the run over."""
        if self._lost:
            raise LeaseLost(self._lost)

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
                    owner = _read(path)
                    who = f"process {owner.pid} on {owner.host}" if owner else "another driver"
                    self._lost = (
                        f"{self.folder}: {who} has taken this run over, as this process gave no sign of life for "
                        f"{SILENT_SECONDS:.0f} s; nothing is lost: the scenes committed before count, and the new "
                        "driver fits the rest"
                    )
                    return
                self._note.beat += 1
                replace_file(self.path, self._note.model_dump_json().encode())
            except OSError:  # a full disk, a network: the driver's own writes fail, too, and report it
                continue


def holder(folder: AnyPath) -> str:
    """Who holds the lease, in words, from its file alone."""
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
            raise LeaseHeld(
                f"{path.parent.parent}: process {now.pid} on {now.host} works on this run, and only one driver can: "
                "wait for it, stop it (kill -TERM; it finishes its batches and goes), or choose another --run"
            )
        if not told and time.monotonic() > deadline - SILENT_SECONDS + 2 * RENEW_SECONDS:
            told = True
            print(
                f"no sign of life of process {now.pid} on {now.host}: after {SILENT_SECONDS:.0f} s without one its run "
                "is taken over"
            )
        time.sleep(RENEW_SECONDS / 10)


def _leases(folder: AnyPath) -> list[AnyPath]:
    return sorted(folder.glob("lease-*.json"), key=lambda path: path.name)


def _epoch(path: AnyPath) -> int:
    digits = path.name.removeprefix("lease-")[:6]
    return int(digits) if digits.isdecimal() else 0


def _newest(folder: AnyPath) -> tuple[int, AnyPath | None]:
    paths = _leases(folder)
    return (_epoch(paths[-1]), paths[-1]) if paths else (0, None)


def _read(path: AnyPath | None) -> _Note | None:
    """The content of a lease file; None where the file is gone or unreadable: then nobody holds the lease."""
    try:
        return _Note.model_validate_json(path.read_bytes()) if path else None
    except (OSError, ValidationError):
        return None


def _this_process() -> _Note:
    return _Note(host=socket.gethostname(), machine=_machine(), pid=os.getpid(), started=_started(os.getpid()))


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
