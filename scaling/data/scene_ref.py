"""References to scenes of a source, and the error that says what is wrong with one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MAX_TEXT = 4000  # letters of a file's name or a reason


def printable(text: str) -> str:
    """Replace what UTF-8 cannot encode, as it may occur in file names and in JSON, by escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class SceneError(ValueError):
    """One scene cannot be used. scene_id, source: which scene; file: where the error is; reason: what is wrong."""

    def __init__(self, scene_id: str, file: str, reason: str, source: str = "") -> None:
        file, reason = file[:MAX_TEXT], reason[:MAX_TEXT]  # libraries repeat what they were given
        super().__init__(scene_id, file, reason, source)  # all of them: another process rebuilds the error from these
        self.scene_id, self.file, self.reason, self.source = map(printable, (scene_id, file, reason, source))

    def __str__(self) -> str:
        where = f" (source {self.source})" if self.source else ""
        file = f"{self.file}: " if self.file else ""
        return f"scene {self.scene_id}{where}: {file}{self.reason}"


@dataclass(frozen=True)
class SceneRef:
    """Where a scene is, in plain values that travel between processes.

    folder: its path, which may lead through a zip file; "" where the id is bad or the path is not UTF-8. layout: the
    name of its reader. source: its path relative to --source. split: train, val or test, where the source has splits.
    poses, axes: in place of the reader's own convention. follow_links: whether links may lead out of the source.
    """

    scene_id: str
    category: str
    folder: str
    layout: str
    source: str
    split: str = ""
    poses: str | None = None
    axes: str | None = None
    follow_links: bool = False

    def error(self, file: str, reason: str) -> SceneError:
        return SceneError(self.scene_id, file, reason, self.source)

    def check_link(self, path: Path) -> None:
        """Raise SceneError where a link on the way to a file leads out of the source, unless links are followed."""
        if self.follow_links:
            return
        root = Path(self.folder)
        for _ in PurePosixPath(self.source).parts:
            root = root.parent
        try:
            ends = path.resolve()
        except (RuntimeError, OSError) as error:
            raise self.error(str(path), f"is a link that cannot be followed ({error})") from error
        except ValueError:
            return  # no file has such a name: reading it tells
        if not ends.is_relative_to(root.resolve()):
            raise self.error(str(path), f"is a link that leads out of the source, to {ends}: give --follow-links")
