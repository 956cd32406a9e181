"""CPU time of a command and all processes that it starts, by their role."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
SECONDS = 0.25  # between two looks: what a process does after the last one before its end is not seen
ROLES = (  # the first one whose text is in a process' command line, or its title
    ("ray::ClockedFitter", "actors"), ("ray::", "readers (Ray Data)"), ("raylet", "Ray: raylet"),
    ("gcs_server", "Ray: gcs"), ("--drive", "driver"), ("", "Ray: other"),
)  # fmt: skip


class Watch:
    """Context manager: watches the descendants of the process `root`, in a thread."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.seen: dict[int, tuple[str, float]] = {}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def seconds(self) -> dict[str, float]:
        """CPU-seconds of each role."""
        total: dict[str, float] = defaultdict(float)
        for role, seconds in self.seen.values():
            total[role] += seconds
        return dict(total)

    def _watch(self) -> None:
        while not self.ended.wait(SECONDS):
            self._look()

    def _look(self) -> None:
        parents, times = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = int(fields[1])
                times[int(folder.name)] = (int(fields[11]) + int(fields[12])) / TICKS
            except (OSError, IndexError):  # it has just ended
                continue
        for pid, seconds in times.items():
            # A child may outlive its parent, and belongs to the first process then: once seen, it stays ours.
            if pid in self.seen or self._descends(pid, parents):
                role = self.seen[pid][0] if pid in self.seen else ""
                # A worker gets its title when it begins to work.
                self.seen[pid] = (_role(pid) or role, seconds)

    def _descends(self, pid: int, parents: dict[int, int]) -> bool:
        while pid > 1:
            if pid == self.root:
                return True
            pid = parents.get(pid, 0)
        return False


def _role(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
    # An idle worker may have been an actor or a reader, or become one; one that has ended has no command line.
    if "ray::IDLE" in command or not command:
        return ""
    return next(role for text, role in ROLES if text in command)
