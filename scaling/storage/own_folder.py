"""Output folders: this program writes and deletes only in folders that were empty when it came, or bear its mark.

The mark is a small JSON file that is written before anything else.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from scaling.storage.commit import commit_file
from scaling.storage.json_yaml import parse_json
from scaling.storage.limited import read_limited
from scaling.storage.paths import AnyPath

MARK = "scaling-folder.json"
MAX_MARK_BYTES = 4096


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
    if found is None and not any(True for _ in folder.glob("*")):
        commit_file(folder / MARK, json.dumps({"written_by": "scaling", "holds": holds}).encode() + b"\n")
        found = holds
    if found != holds:
        what = "files that this program did not write" if found is None else f"what its {MARK} calls {found!r:.80}"
        raise FileExistsError(f"{folder} holds {what}, and nothing of that is written over: name a new or empty folder")


def empty_folder(folder: Path, holds: str) -> None:
    """Claim a folder on a disk, and remove what this program left in it. Raises what `claim_folder` raises."""
    claim_folder(folder, holds)
    shutil.rmtree(folder)
    claim_folder(folder, holds)


def refuse_links(*folders: AnyPath) -> None:
    """Raise ValueError naming a folder that is a symbolic link: what it leads to may be anybody's."""
    for folder in folders:
        if isinstance(folder, Path) and folder.is_symlink():
            raise ValueError(f"{folder} is a link: nothing is written where it leads; put the folder itself there")
