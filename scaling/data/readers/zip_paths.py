"""Read the files of a source. A .zip file counts as the folder that it holds; it is never unpacked to disk.

A path may lead through a zip: DIR/cars_train.zip/cars_train/ID/rgb/000000.png. So every scene has one path, and the
readers of layouts need not know about zips. Errors give only the reason: the caller knows the path.
"""

from __future__ import annotations

import zipfile
import zlib
from functools import lru_cache
from pathlib import Path, PurePosixPath

from scaling.storage.limited import read_limited

# Limits above what a valid file needs; they are checked before anything is read or unpacked.
MAX_IMAGE_BYTES = 128 << 20  # the largest 8-bit PNG that is accepted has 48 to 64 MiB if it does not compress
MAX_JSON_BYTES = 32 << 20
MAX_NUMBERS_BYTES = 64 << 10  # a text file with a pose or intrinsics
MAX_NAME_LENGTH, MAX_NAME_PARTS = 1024, 32  # of a zip's member: each folder of its path takes memory
MAX_LIST_BYTES = 256 << 20  # of a zip: some 2 million members
MAX_FOLDERS = 200_000  # of a zip: twenty times those of the largest release
# A member may unpack to this many bytes, or to this many times its packed size; images hardly shrink in a zip.
FREE_BYTES, MAX_GROWTH = 4 << 20, 50
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # for these, zipfile can limit the output while it unpacks


def is_zip(path: Path) -> bool:
    """Whether a path names a file that ends in .zip. Opening it tells whether it is a valid zip."""
    return path.suffix.lower() == ".zip" and path.is_file()


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the subfolders and the files of a folder, each sorted by name, without hidden ones and macOS's __MACOSX.

    Raises ValueError where there is no such folder, or where it cannot be read.
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
    """Whether a path names a folder. False also where this cannot be determined: listing or reading it reports why."""
    try:
        archive, inside = _find_archive(path)
        return path.is_dir() if archive is None else archive.is_folder(inside)
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether a path names a file. False also where this cannot be determined."""
    try:
        archive, inside = _find_archive(path)
        return path.is_file() if archive is None else archive.is_file(inside)
    except (OSError, ValueError):
        return False


def read_file(path: Path, most: int = MAX_IMAGE_BYTES) -> bytes:
    """Read a file's bytes.

    Raises ValueError where it is missing, unreadable, not a regular file, over `most` bytes, or damaged in its zip.
    """
    try:
        archive, inside = _find_archive(path)
        return read_limited(path, most) if archive is None else archive.read(inside, most)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error


def _member_name(text: str) -> PurePosixPath:
    name = PurePosixPath(text)
    if not name.parts:
        raise ValueError("has a member without a name: pack it again")
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"its member {text!r:.200} leads out of the archive: do not trust this file")
    if len(text) > MAX_NAME_LENGTH or len(name.parts) > MAX_NAME_PARTS:
        raise ValueError(f"the name of its member {text!r:.80}… is too long or too deep: do not trust this file")
    return name


def _check_directory(path: Path) -> None:
    """Raise ValueError where the list of a zip's members would take too much memory: zipfile reads it as a whole.

    zipfile's own function finds the end record, so that both speak of the same one.
    """
    with path.open("rb") as file:
        record = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    length = record[zipfile._ECD_SIZE] if record else 0  # type: ignore[attr-defined]
    if length > MAX_LIST_BYTES:
        raise ValueError(f"the list of its members has {length:,} bytes; at most {MAX_LIST_BYTES:,} are read")


class _Archive:
    """The members of a zip, as a tree.

    Raises ValueError where the file is not a readable zip, or where the name of a member leads out of it or is too long
    or too deep.
    """

    def __init__(self, path: Path) -> None:
        try:
            _check_directory(path)
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise ValueError(f"is not a readable zip file ({error}): fetch it again, or remove it") from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._folders: dict[str, set[str]] = {".": set()}
        for member in self._zip.infolist():
            name = _member_name(member.filename)
            if member.is_dir():
                self._folders.setdefault(str(name), set())
            else:
                self._members[str(name)] = member
            self._link(name)
            if len(self._folders) > MAX_FOLDERS:
                raise ValueError(f"its members lie in more than {MAX_FOLDERS} folders: pack it again, in several files")

    def _link(self, name: PurePosixPath) -> None:
        """Enter a name into its parent folder, and so on upwards; most zips do not list their folders."""
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
        """(name, whether it is a folder) of each entry. Raises FileNotFoundError where there is no such folder."""
        if folder not in self._folders:
            raise FileNotFoundError(folder)
        prefix = "" if folder == "." else f"{folder}/"
        return [(name, prefix + name in self._folders) for name in self._folders[folder]]

    def read(self, name: str, most: int) -> bytes:
        if name not in self._members:
            raise ValueError("the zip file holds no such member")
        member = self._members[name]
        if member.file_size > most:
            raise ValueError(f"has {member.file_size} bytes; at most {most} are read")
        if member.file_size > max(FREE_BYTES, MAX_GROWTH * member.compress_size):
            raise ValueError(
                f"unpacks from {member.compress_size} to {member.file_size} bytes, more than an image or a text does: "
                "do not trust this file"
            )
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
    """Open a zip and keep it open, because its list of members is long.

    `changed` (nanoseconds) and `size` (bytes) distinguish a file from another one that replaced it.
    """
    return _Archive(path)
