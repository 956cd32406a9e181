"""Reading a source's files. A .zip file counts as the folder that it holds; nothing of it is unpacked to disk.

A path may lead through a zip: DIR/cars_train.zip/cars_train/ID/rgb/000000.png. So a scene is named by one path
wherever it lies, and the layouts need not know. Errors give the reason only: who asked knows the path.
"""

from __future__ import annotations

import stat
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path, PurePosixPath

MAX_FILE_BYTES = 128 << 20  # more than a PNG of the largest size that is read; checked before anything is read
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # those whose output zipfile bounds as it unpacks


def is_zip(path: Path) -> bool:
    """Whether a path names a file that ends in .zip; whether it is a sound one shows when it is opened."""
    return path.suffix.lower() == ".zip" and path.is_file()


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """The subfolders and the files of a folder, each sorted by name, without hidden ones.

    ValueError: there is no such folder, or it cannot be read.
    """
    try:
        archive, inside = _find_archive(folder)
        if archive is None:
            entries = [(path, path.is_dir()) for path in folder.iterdir()]
        else:
            entries = [(folder / name, is_dir) for name, is_dir in archive.children(inside)]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError("no such folder") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    shown = sorted(entry for entry in entries if not entry[0].name.startswith((".", "__MACOSX")))
    return [path for path, is_dir in shown if is_dir], [path for path, is_dir in shown if not is_dir]


def is_folder(path: Path) -> bool:
    """Whether a path names a folder. False also where that cannot be told: listing or reading it says why."""
    try:
        archive, inside = _find_archive(path)
        return path.is_dir() if archive is None else archive.is_folder(inside)
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether a path names a file. False also where that cannot be told."""
    try:
        archive, inside = _find_archive(path)
        return path.is_file() if archive is None else archive.is_file(inside)
    except (OSError, ValueError):
        return False


def read_file(path: Path) -> bytes:
    """A file's bytes. ValueError: missing, not readable, no plain file, over 128 MiB, or damaged in its zip."""
    try:
        archive, inside = _find_archive(path)
        if archive is not None:
            return archive.read(inside)
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is no plain file")
        _check_size(status.st_size)
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error


def _check_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ValueError(f"has {size} bytes; at most {MAX_FILE_BYTES} are read")


class _Archive:
    """A zip's members as a tree. ValueError: no readable zip, or a member's name leads out of it."""

    def __init__(self, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise ValueError(f"is not a readable zip file ({error}): fetch it again, or remove it") from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._folders: dict[str, set[str]] = {".": set()}
        for member in self._zip.infolist():
            name = PurePosixPath(member.filename)
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(
                    f"its member {member.filename!r:.200} leads out of the archive: do not trust this file"
                )
            if member.is_dir():
                self._folders.setdefault(str(name), set())
            else:
                self._members[str(name)] = member
            self._link(name)

    def _link(self, name: PurePosixPath) -> None:
        """Enters a name into its parent; most zips do not list their folders."""
        while name.name:
            parent = str(name.parent)
            if parent in self._folders and name.name in self._folders[parent]:
                return
            self._folders.setdefault(parent, set()).add(name.name)
            name = name.parent

    def is_folder(self, name: str) -> bool:
        return name in self._folders

    def is_file(self, name: str) -> bool:
        return name in self._members

    def children(self, folder: str) -> list[tuple[str, bool]]:
        """(name, whether it is a folder) of what lies in a folder. FileNotFoundError where there is none."""
        if folder not in self._folders:
            raise FileNotFoundError(folder)
        prefix = "" if folder == "." else f"{folder}/"
        return [(name, prefix + name in self._folders) for name in self._folders[folder]]

    def read(self, name: str) -> bytes:
        if name not in self._members:
            raise ValueError("the zip file holds no such member")
        member = self._members[name]
        _check_size(member.file_size)
        if member.compress_type not in _ZIP_METHODS:
            raise ValueError("is not stored or deflated in its zip file: pack it again")
        try:
            with self._zip.open(member) as stream:
                return stream.read(member.file_size + 1)  # bounded: a member may hold more than it declares
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"cannot be read from its zip file ({error})") from error


def _find_archive(path: Path) -> tuple[_Archive | None, str]:
    """The zip that a path leads through and the rest of the path; (None, "") where there is none."""
    for place in (path, *path.parents):
        if is_zip(place):
            status = place.stat()
            return _open_archive(place, status.st_mtime_ns, status.st_size), path.relative_to(place).as_posix()
    return None, ""


@lru_cache(maxsize=64)
def _open_archive(path: Path, changed: int, size: int) -> _Archive:
    """Kept open: the list of a zip's members is long. `changed` and `size` tell a file from one that replaced it."""
    return _Archive(path)
