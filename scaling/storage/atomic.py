"""Write files atomically, whole or not at all; make errors name the file and say what to do."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # paths imports pyarrow, which not every command needs
    from scaling.storage.paths import AnyPath

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
ADVICE = {  # errno → advice, for errors that a retry does not fix
    **dict.fromkeys(FULL, "make room there, then the same command goes on where this one stopped"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "give yourself the right to use it, or name another folder"
    ),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "a file is where a folder is needed; name another folder"),
}


def described(error: OSError) -> str:
    """Describe an error in one line: where, what, and for common errors what to do."""
    where = f"{error.filename}: " if error.filename is not None else ""
    what = f"{where}{error.strerror}" if error.strerror else str(error)
    return f"{what}; {ADVICE[error.errno]}" if error.errno in ADVICE else what


def replace_file(path: AnyPath, data: bytes) -> None:
    """Write a file in one step; replace an existing file of that name. Raises OSError naming `path`."""
    if not isinstance(path, Path):
        with naming(path):
            path.write_bytes(data)
        return
    make_folder(path.parent)
    temporary = write_beside(path, data)
    try:
        with naming(path):  # where a folder has that name already
            temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents. Their names survive a power loss, like those of files."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def write_beside(path: Path, data: bytes) -> Path:
    """Write and sync a temporary file in the folder of `path` → the temporary file.

    Raises OSError naming `path`; nothing is left behind then.
    """
    temporary = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}")  # a name may be as long as names can be
    try:
        with naming(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


@contextmanager
def naming(path: AnyPath) -> Iterator[None]:
    """Make an OSError in the block name `path`: the error of a write to a full disk names no file at all."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by an object store
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that the names in it survive a power loss."""
    sync_file(folder)


def sync_file(path: Path | str) -> None:
    """Sync a file that is written and closed, so that its bytes survive a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(Path(path)):
            os.fsync(handle)
    finally:
        os.close(handle)
