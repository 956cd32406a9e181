"""Commit files to a run: whole or not at all, and never changed afterwards."""

from __future__ import annotations

import os
from pathlib import Path

from scaling.storage.atomic import make_folder, naming, replace_file, sync_folder, write_beside
from scaling.storage.paths import AnyPath


def commit_file(path: AnyPath, data: bytes) -> bool:
    """Write a new file: temporary file, fsync, hard link to the final name, fsync of the folder.

    → False, with nothing changed, where the name exists already: it was committed before. An object store has no
    exclusive write, so there concurrent writers must use different names (see `library.parts.part_name`). Raises
    OSError naming `path`.
    """
    if not isinstance(path, Path):
        if path.is_file():
            return False
        replace_file(path, data)
        return True
    make_folder(path.parent)
    temporary = write_beside(path, data)
    try:
        try:
            with naming(path):
                os.link(temporary, path)
        except FileExistsError:
            return False
        sync_folder(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)
