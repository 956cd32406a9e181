"""Scene ids: names that are safe as names of files."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator

_SCENE_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


def is_scene_id(scene_id: Any) -> bool:
    """Whether the id is a string of 1 to 200 ASCII letters, digits, `.`, `_` and `-` that does not begin with `.`."""
    return isinstance(scene_id, str) and bool(_SCENE_ID.fullmatch(scene_id))


def check_scene_id(scene_id: str) -> str:
    """Return the id. Raises ValueError where it is not a scene id (see `is_scene_id`)."""
    if not is_scene_id(scene_id):
        raise ValueError(
            f"bad scene id {scene_id!r:.220}: use 1 to 200 ASCII letters, digits, '.', '_' and '-', no '.' first"
        )
    return scene_id


SceneId = Annotated[str, AfterValidator(check_scene_id)]  # the type of ids in pydantic models
