"""The memory and disk that the object store of a local Ray takes. Read from /proc and the session's folder, because Ray
itself reports them only through its dashboard."""

from __future__ import annotations

import os
import re
from pathlib import Path


class StoreUse:
    """The object store of the Ray that this process started.

    peak_bytes: the most memory that the store has touched; spilled_bytes: the most that lay on disk; both at one of the
    samples. Raises RuntimeError where this process has started no local Ray, or Ray's session folder is not known.
    """

    def __init__(self) -> None:
        self.raylet = _raylet_of(os.getpid())
        command = (self.raylet / "cmdline").read_bytes().decode().replace("\0", " ")
        found = re.search(r"--session[_-]dir=(\S+)", command)
        if found is None:
            raise RuntimeError(f"{self.raylet}: no session folder in its command line")
        self.session = Path(found[1])
        self.peak_bytes = self.spilled_bytes = 0

    def sample(self) -> None:
        """Take one sample."""
        blocks = {handle.stat().st_ino: handle.stat().st_blocks for handle in self._arenas()}
        self.peak_bytes = max(self.peak_bytes, 512 * sum(blocks.values()))
        spilled = sum(_size(path) for path in self.session.glob("ray_spilled_objects*/**/*"))
        self.spilled_bytes = max(self.spilled_bytes, spilled)

    def _arenas(self) -> list[Path]:
        """The raylet's open files that hold the store's memory; pages that it never touched take up no blocks."""
        return [handle for handle in (self.raylet / "fd").iterdir() if "plasma" in str(handle.readlink())]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # deleted meanwhile
        return 0


def _raylet_of(parent: int) -> Path:
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if text.startswith("Name:\traylet\n") and f"\nPPid:\t{parent}\n" in text:
            return status.parent
    raise RuntimeError("this process has started no local Ray")
