"""The failures of a run: events as JSON lines; a scene's latest event counts.

RUN/failures/events-<epoch>-<number>-<writer>.jsonl: each call writes a new file, as an object store cannot append.
Events of closed epochs are read from the manifest (`manifest.py`), events of the epoch in force from their files.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime

from scaling.library.manifest import Event, Manifest
from scaling.storage.atomic import read_limited
from scaling.storage.commit import commit_file
from scaling.storage.json_yaml import parse_json
from scaling.storage.paths import AnyPath

_NAME = re.compile(r"events-(?:(\d{6})-(\d{6})-[0-9a-f]{8}|\d{8}T\d+-\d+)\.jsonl")
RETRY = "retry"


def event(scene_id: str, attempt: int, kind: str, message: str) -> Event:
    """An event of now. kind: `retry` (the scene will be tried again), or why it was given up (`bad input`, …)."""
    when = datetime.now(UTC).isoformat()
    return Event(scene_id=scene_id, attempt=attempt, kind=kind, message=message, when=when)


class FailureLog:
    """Writes events under the epoch of the driver that this process works for, each call to a file of its own."""

    def __init__(self, folder: AnyPath, epoch: int = 0) -> None:
        self.folder, self.epoch = folder, epoch
        self.writer, self.number = uuid.uuid4().hex[:8], 0

    def add(self, events: Iterable[Event]) -> None:
        """Write the events to a new file. Raises OSError naming the file where it cannot be written."""
        lines = "".join(event.model_dump_json() + "\n" for event in events)
        if lines:
            name = f"events-{self.epoch:06d}-{self.number:06d}-{self.writer}.jsonl"
            self.number += 1
            commit_file(self.folder / name, lines.encode())


def read_failures(folder: AnyPath, manifest: Manifest) -> dict[str, Event]:
    """The latest event of each scene that has one.

    A line that is no event is skipped (a crash may cut a line short): its scene is tried again.
    """
    latest = dict(manifest.failures)
    paths: Iterable[AnyPath] = folder.glob("events-*.jsonl")
    for path in sorted(paths, key=lambda path: path.name):
        match = _NAME.fullmatch(path.name)
        if match is None or int(match[1] or 0) != manifest.epoch:
            continue
        for line in read_limited(path).splitlines():
            found = _event(line)
            if found and (found.scene_id not in latest or found.when >= latest[found.scene_id].when):
                latest[found.scene_id] = found
    return latest


def _event(line: bytes) -> Event | None:
    try:
        return Event.model_validate(parse_json(line), strict=True)
    except ValueError:  # neither JSON nor UTF-8, or other keys
        return None
