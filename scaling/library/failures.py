"""The failures of a run: events in JSON lines; a scene's latest event is the one that counts.

RUN/failures/events-<epoch>-<number>-<writer>.jsonl, a new file for each call, as an object store cannot append. Events
of epochs that are closed are read from the manifest (`manifest.py`); those of the epoch in force from their files.
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
    """An event of now. kind: `retry` (it will be tried again) or the reason that it was given up (`bad input`, …)."""
    when = datetime.now(UTC).isoformat()
    return Event(scene_id=scene_id, attempt=attempt, kind=kind, message=message, when=when)


class FailureLog:
    """Writes events, each call to a file of its own, under the epoch of the driver that this process works for."""

    def __init__(self, folder: AnyPath, epoch: int = 0) -> None:
        self.folder, self.epoch = folder, epoch
        self.writer, self.number = uuid.uuid4().hex[:8], 0

    def add(self, events: Iterable[Event]) -> None:
        """Raises OSError naming the file where it cannot be written."""
        lines = "".join(event.model_dump_json() + "\n" for event in events)
        if lines:
            name = f"events-{self.epoch:06d}-{self.number:06d}-{self.writer}.jsonl"
            self.number += 1
            commit_file(self.folder / name, lines.encode())


def read_failures(folder: AnyPath, manifest: Manifest) -> dict[str, Event]:
    """The latest event of each scene that has one. A line that is none, as one cut short by a crash, is passed over:
    its scene is tried again."""
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
