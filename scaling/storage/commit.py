"""How a file becomes part of a run: whole or not at all, and never changed afterwards."""

from __future__ import annotations

import os
from pathlib import Path

from scaling.storage.atomic import make_folder, replace_file, sync_folder, write_beside
from scaling.storage.paths import AnyPath


def commit_file(path: AnyPath, data: bytes) -> bool:
    """Writes a new file: temporary file, fsync, link to the final name, fsync the folder. OSError names `path`.

    → False where the name exists already: somebody committed it before; nothing is changed then. An object store has
    no exclusive write, so there names must differ between writers that could meet (see `library.parts.part_name`).
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
            os.link(temporary, path)
        except FileExistsError:
            return False
        sync_folder(path.parent)
        return True
    finally:
        temporary.unlink(missing_ok=True)
