"""Mirror a folder of an object store on a local disk, while one process changes the folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scaling.storage.atomic import make_folder, replace_file
from scaling.storage.links import refuse_links
from scaling.storage.paths import AnyPath, ObjectPath, local_path


@contextmanager
def mirrored(folder: AnyPath) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yield a local copy of the folder, and a function that copies changes back to the folder.

    Raises ValueError, before anything is copied, where an object's name would lead out of the copy. A folder on a local
    disk is not copied: it is yielded itself, with a function that does nothing. Raises ValueError where that is a link.
    """
    refuse_links(folder)
    if isinstance(folder, Path):
        yield folder, lambda: None
        return
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary)
        for into, path in [(local_path(local, name), path) for name, path in _files(folder).items()]:
            make_folder(into.parent)
            into.write_bytes(path.read_bytes())
        yield local, lambda: _bring_back(local, folder)


def _bring_back(local: Path, folder: ObjectPath) -> None:
    """Copy new files, remove deleted ones. Names are enough to find them: files of checkpoints never change."""
    here, there = _files(local), _files(folder)
    for name in here.keys() - there:
        into: AnyPath = folder
        for step in name.split("/"):
            into = into / step
        replace_file(into, here[name].read_bytes())
    for name in there.keys() - here:
        there[name].unlink(missing_ok=True)


def _files(folder: AnyPath) -> dict[str, AnyPath]:
    """Path in the folder → file, for all files below the folder."""
    start = len(folder.path if isinstance(folder, ObjectPath) else str(folder)) + 1
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[(path.path if isinstance(path, ObjectPath) else str(path))[start:]] = path
    return found
