"""Paths in an object store: the part of pathlib.Path that runs and stores need, on top of pyarrow's file systems.

`to_path` converts what a user names to a pathlib.Path or, for a URI (s3://, gs://, …), to an `ObjectPath`; code for an
`AnyPath` works on both.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pyarrow import fs

from scaling.storage.addresses import check_no_secret
from scaling.storage.progress import waiting_for


def open_uri(uri: str | Path) -> tuple[fs.FileSystem, str]:
    """Open a local path, or a URI that pyarrow knows (file://, s3://, gs://, …) → (file system, path on it).

    Raises ValueError where a URI holds a key or a password.
    """
    if "://" in str(uri):
        check_no_secret(str(uri))
        filesystem, path = fs.FileSystem.from_uri(str(uri))
        return filesystem, path.rstrip("/")
    return fs.LocalFileSystem(), Path(uri).expanduser().absolute().as_posix()


SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")


@lru_cache(maxsize=32)
def _filesystem(root: str) -> fs.FileSystem:
    return open_uri(root)[0]


@dataclass(frozen=True)
class ObjectPath:
    """A file or folder in an object store: `bucket/path` on the file system of `root` (`s3://bucket?endpoint_…`).

    Its methods behave like those of pathlib.Path. A write is whole or not at all; there is no exclusive write and no
    rename.
    """

    root: str
    path: str

    @classmethod
    def of(cls, uri: str) -> ObjectPath:
        """Parse a URI, without contacting the store.

        Raises ValueError where the scheme is unknown, the bucket is missing, or there is a key or a password in it.
        """
        check_no_secret(uri)
        scheme, _, rest = uri.partition("://")
        place, question, options = rest.partition("?")
        bucket = place.split("/")[0]
        if scheme not in SCHEMES or not bucket:
            raise ValueError(f"expected a folder, or SCHEME://BUCKET/PATH with one of {', '.join(SCHEMES)}")
        return cls(f"{scheme}://{bucket}{question}{options}", place.rstrip("/"))

    @property
    def filesystem(self) -> fs.FileSystem:
        """The pyarrow file system. Raises OSError where the store does not answer."""
        return _filesystem(self.root)

    def as_uri(self) -> str:
        """The URI from which `of` makes this path."""
        scheme, _, rest = self.root.partition("://")
        _, question, options = rest.partition("?")
        return f"{scheme}://{self.path}{question}{options}"

    def __str__(self) -> str:
        return f"{self.root.partition('://')[0]}://{self.path}"

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.root, f"{self.path}/{name}")

    def __lt__(self, other: ObjectPath) -> bool:
        return self.path < other.path

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.root, self.path.rpartition("/")[0])

    def absolute(self) -> ObjectPath:
        return self

    def exists(self) -> bool:
        return self._info().type != fs.FileType.NotFound

    def is_file(self) -> bool:
        return self._info().type == fs.FileType.File

    def is_dir(self) -> bool:
        return self._info().type == fs.FileType.Directory

    def stat(self) -> _Stat:
        """The size of the file, as st_size. Raises FileNotFoundError where there is no such file."""
        info = self._info()
        if info.type != fs.FileType.File:
            raise FileNotFoundError(2, "No such file", str(self))
        return _Stat(info.size)

    def read_bytes(self) -> bytes:
        """Read the object. Raises FileNotFoundError where there is none."""
        with self.open_input() as stream:
            return stream.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> int:
        """Write the object in one put; readers see the old object or the new one."""
        with self.filesystem.open_output_stream(self.path) as out:
            return out.write(data)

    def open_input(self) -> Any:
        """Open the object as a pyarrow file, for random access."""
        return self.filesystem.open_input_file(self.path)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: an object store has folders only in its names."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object. Raises OSError where there is none, unless missing_ok."""
        if missing_ok and not self.is_file():
            return
        self.filesystem.delete_file(self.path)

    def iterdir(self) -> Iterator[ObjectPath]:
        yield from self._list(recursive=False)

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Yield the files and folders directly in this folder whose names match."""
        yield from (path for path in self._list(recursive=False) if fnmatch.fnmatchcase(path.name, pattern))

    def rglob(self, pattern: str) -> Iterator[ObjectPath]:
        """Yield the files and folders anywhere below this folder whose names match."""
        yield from (path for path in self._list(recursive=True) if fnmatch.fnmatchcase(path.name, pattern))

    def _list(self, recursive: bool) -> Iterator[ObjectPath]:
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        with waiting_for(f"the object store at {self}"):
            found = self.filesystem.get_file_info(selector)
        for info in found:
            yield ObjectPath(self.root, info.path.rstrip("/"))

    def _info(self) -> fs.FileInfo:
        with waiting_for(f"the object store at {self}"):
            return self.filesystem.get_file_info(self.path)


@dataclass(frozen=True)
class _Stat:
    st_size: int


AnyPath = Path | ObjectPath


def to_path(text: str) -> AnyPath:
    """Convert what a user names: a local path, where ~ is the home folder, or the URI of a place in an object store.

    Raises ValueError where it is neither, where the path is not valid UTF-8, or where the URI holds a secret.
    """
    if "://" not in text:
        return local(text)
    if text.startswith("file://"):
        return Path(open_uri(text)[1])
    return ObjectPath.of(text)


def local(text: str) -> Path:
    """Convert the name of a file or folder on this machine; ~ is the home folder.

    Raises ValueError where the path is not valid UTF-8: databases and Parquet files could not name it.
    """
    try:
        path = Path(text).expanduser()
        str(path.absolute()).encode()
        return path
    except RuntimeError as error:  # ~NAME of nobody
        raise ValueError(str(error)) from None
    except UnicodeEncodeError:
        name = os.fsencode(Path(text).absolute())
        raise ValueError(f"the path {name!r} is not valid UTF-8: rename the folder") from None


def uri_of(path: AnyPath) -> str:
    """The text from which `to_path` makes this path in any process, whatever its working directory."""
    return path.as_uri() if isinstance(path, ObjectPath) else str(path.absolute())


def file_of(path: AnyPath) -> tuple[fs.FileSystem, str]:
    """(file system, path on it), for pyarrow."""
    if isinstance(path, ObjectPath):
        return path.filesystem, path.path
    return fs.LocalFileSystem(), str(path)


def local_path(folder: Path, name: str) -> Path:
    """The place on a disk, below `folder`, of an object whose name comes from an object store: "a/b" → folder/a/b.

    Raises ValueError where a step of the name is empty, `.` or `..`, or where a link lies on the way: the owner of a
    bucket must not choose where on this machine something is written.
    """
    path, steps = folder, name.split("/")
    for step in steps:
        if step in ("", ".", "..") or "\0" in step:
            raise ValueError(f"{name!r:.200} is the name of an object that leads out of its folder: do not trust it")
        path = path / step
        if path.is_symlink():
            raise ValueError(f"{path} is a link: nothing is written where it leads")
    return path


def remove_tree(folder: AnyPath) -> None:
    """Remove a folder and all that it holds; do nothing where there is none."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.filesystem.delete_dir(folder.path)
