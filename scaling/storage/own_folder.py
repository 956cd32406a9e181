"""Output folders: this program writes and deletes only in folders that were empty when it came, or bear its mark.

The mark is a small JSON file that is written before anything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scaling.storage.commit import commit_file
from scaling.storage.json_yaml import parse_json
from scaling.storage.lease import Lease
from scaling.storage.limited import read_limited
from scaling.storage.paths import AnyPath

MARK = "scaling-folder.json"
MAX_MARK_BYTES = 4096
_HALF_WRITTEN = re.compile(r"\..+\.[0-9a-f]{32}")  # see `atomic.write_beside`


def claim_folder(folder: AnyPath, holds: str) -> None:
    """Make `folder` a folder of this program's for `holds` ("planes", …): create it where it is missing, and mark it.

    Raises FileExistsError where it holds files and no mark, or the mark of something else.
    """
    try:
        mark = parse_json(read_limited(folder / MARK, MAX_MARK_BYTES))
        found = str(mark.get("holds")) if isinstance(mark, dict) else "?"
    except FileNotFoundError:
        found = None
    except ValueError:
        found = "?"
    if found is None and not any(True for path in folder.glob("*") if not is_chaff(path.name)):
        mark = json.dumps({"written_by": "scaling", "holds": holds}).encode() + b"\n"
        if not commit_file(folder / MARK, mark):  # another process was faster
            return claim_folder(folder, holds)
        found = holds
    if found != holds:
        what = f"files and no {MARK}, this program's mark" if found is None else f"what its {MARK} calls {found!r:.80}"
        raise FileExistsError(f"{folder} holds {what}, and nothing of that is written over: name a new or empty folder")


def is_chaff(name: str) -> bool:
    """Whether a file means nothing: what a killed process of this program left half written, or what systems make."""
    return name in ("lost+found", ".DS_Store", "Thumbs.db") or bool(_HALF_WRITTEN.fullmatch(name))


@contextmanager
def own_folder(folder: Path, holds: str) -> Iterator[None]:
    """Claim a folder on a disk, and keep other processes from writing there meanwhile. Raises what `claim_folder` and
    `Lease.take` raise."""
    claim_folder(folder, holds)
    lease = Lease.take(folder / ".leases", 1)  # hidden: readers of layouts do not take it for a scene
    try:
        yield
        lease.check_now()
    finally:
        with suppress(OSError):
            lease.release()


def new_folder(folder: Path, holds: str) -> None:
    """Claim a folder on a disk that must be new or empty. Raises FileExistsError where it is not: somebody may have put
    files of his own beside those of an earlier benchmark, so that none is removed."""
    if folder.is_dir() and any(not is_chaff(path.name) for path in folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty, and nothing in it is removed: name a new or empty folder")
    claim_folder(folder, holds)
