"""Read files that anybody may have written: regular files alone, as a pipe is never at its end, and only up to a size.

Errors are ValueError and give only the reason: the caller knows the file and what to do.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:  # paths imports pyarrow, which not every command needs
    from scaling.storage.paths import AnyPath

MAX_FILE_BYTES = 128 << 20


def read_limited(path: AnyPath, most: int = MAX_FILE_BYTES) -> bytes:
    """Read a file's bytes.

    Raises ValueError where it is not a regular file or has more than `most` bytes, before they take memory; OSError
    where it does not exist or cannot be read.
    """
    if not isinstance(path, Path):  # objects have a size and are never pipes
        _check_size(path.stat().st_size, most)
        return path.read_bytes()
    with open_regular(path) as file:
        _check_size(os.fstat(file.fileno()).st_size, most)
        data = file.read(most + 1)  # the file may have grown
    _check_size(len(data), most)
    return data


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, never waiting for a writer. Raises ValueError where it is a pipe, a device, a socket or
    a folder; OSError where it does not exist or cannot be opened."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise ValueError("is no plain file") from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("is no plain file")
    return os.fdopen(handle, "rb")


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"has {size} bytes; at most {most} are read")
