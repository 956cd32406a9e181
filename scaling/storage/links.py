"""Links in folders that somebody else may have made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # paths imports pyarrow, which not every command needs
    from scaling.storage.paths import AnyPath


def refuse_links(*paths: AnyPath) -> None:
    """Raise ValueError naming a path that is a symbolic link: what it leads to may be anybody's."""
    for path in paths:
        if isinstance(path, Path) and path.is_symlink():
            raise ValueError(f"{path} is a link: nothing is written where it leads; put the folder itself there")
