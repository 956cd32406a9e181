"""How a file becomes part of a run on a local disk: whole or not at all, and never changed afterwards."""

from __future__ import annotations

import os
from pathlib import Path

from scaling.files import make_folder, sync_folder, write_beside


def commit_file(path: Path, data: bytes) -> bool:
    """Writes a new file: temporary file, fsync, link to the final name, fsync the folder. OSError names `path`.

    → False where the name exists already: somebody committed it before; nothing is changed then.
    """
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
