"""Files that are whole or not there, and errors that name the file and say what to do."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports pyarrow, which not every command needs
    from scaling.storage.paths import AnyPath

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
ADVICE = {  # errors that another try does not mend, and what does
    **dict.fromkeys(FULL, "make room there, then the same command goes on where this one stopped"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "give yourself the right to use it, or name another folder"
    ),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "a file is where a folder is needed; name another folder"),
}


def told(error: OSError) -> str:
    """The error in one line: where, what, and for common ones what to do."""
    where = f"{error.filename}: " if error.filename is not None else ""
    what = f"{where}{error.strerror}" if error.strerror else str(error)
    return f"{what}; {ADVICE[error.errno]}" if error.errno in ADVICE else what


MAX_FILE_BYTES = 128 << 20


def read_limited(path: AnyPath, most: int = MAX_FILE_BYTES) -> bytes:
    """A file's bytes. ValueError with the reason where it is no plain file or has more than `most` bytes: it is not
    read then; OSError where there is none."""
    size = path.stat().st_size
    if not path.is_file():  # a pipe would never end
        raise ValueError("is no plain file")
    if size > most:
        raise ValueError(f"has {size} bytes; at most {most} are read")
    return path.read_bytes()


def replace_file(path: AnyPath, data: bytes) -> None:
    """Writes a file in one step; one of its name that is there already is replaced. OSError names `path`."""
    if not isinstance(path, Path):
        with naming(path):
            path.write_bytes(data)
        return
    make_folder(path.parent)
    temporary = write_beside(path, data)
    try:
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; their names last through a loss of power, as those of files do."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def write_beside(path: Path, data: bytes) -> Path:
    """Writes and syncs a temporary file in the folder of `path`. → the file; nothing is left where that fails."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
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
    """Lets an OSError name `path`: a write to a full disk names no file at all."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # an object store's
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last through a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(handle)
    finally:
        os.close(handle)
