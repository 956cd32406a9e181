"""What may be the id of a scene: a name that is safe wherever it becomes a file's."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator

_SCENE_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


def is_scene_id(scene_id: Any) -> bool:
    """Whether it is a string of 1 to 200 letters, digits, `.`, `_` and `-` that does not begin with `.`."""
    return isinstance(scene_id, str) and bool(_SCENE_ID.fullmatch(scene_id))


def check_scene_id(scene_id: str) -> str:
    """The id itself, if `is_scene_id`; else ValueError."""
    if not is_scene_id(scene_id):
        raise ValueError(
            f"bad scene id {scene_id!r:.220}: use 1 to 200 ASCII letters, digits, '.', '_' and '-', no '.' first"
        )
    return scene_id


SceneId = Annotated[str, AfterValidator(check_scene_id)]  # in what pydantic reads
