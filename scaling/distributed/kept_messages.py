"""The files in RUN/mlflow/ of what MLflow was not told yet; see outbox.py. Somebody else may have written them."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from scaling.library.run_folder import RunFolder
from scaling.storage.json_yaml import parse_json
from scaling.storage.limited import read_limited
from scaling.storage.paths import AnyPath

MAX_KEPT_BYTES = 16 << 20
MOST_FILES = 100  # of kept messages, that are read
MOST_WAITING = 20_000  # messages: some megabytes
DIGITS = 20  # of a file's number
# The files of a run folder that are logged: names from a file must not lead to others.
LOGGED = re.compile(
    r"(?:metrics\.json|scenes\.parquet|sweep\.json|pictures/pareto\.png|trials/\w[\w.=,+-]*/metrics\.json)"
)


def new_file(run: RunFolder, name: str) -> AnyPath:
    """A file for one more command's messages, after those of earlier ones, whatever the clock says."""
    number = min(1 + max(map(_number, _kept_files(run, name)), default=-1), 10**DIGITS - 1)
    return run.path / "mlflow" / f"{slug(name)}-{number:0{DIGITS}d}-{secrets.token_hex(4)}.json"


def kept_messages(run: RunFolder, name: str) -> list[tuple[AnyPath, list[dict[str, Any]]]]:
    """The files of messages that earlier commands have kept for one run, oldest first. Messages that this program would
    not write are left out."""
    found: list[tuple[AnyPath, list[dict[str, Any]]]] = []
    for path in _kept_files(run, name)[-MOST_FILES:]:
        messages = read_note(path).get("messages")
        if isinstance(messages, list):  # what cannot be read stays where it is
            found.append((path, [message for message in messages[-MOST_WAITING:] if _is_sound(message)]))
    return found


def _kept_files(run: RunFolder, name: str) -> list[AnyPath]:
    names = re.compile(rf"{slug(name)}-(?:[0-9]{{{DIGITS}}}-)?[0-9a-f]{{8}}\.json")
    paths = [path for path in (run.path / "mlflow").glob("*.json") if names.fullmatch(path.name) and path.is_file()]
    return sorted(paths, key=lambda path: (_number(path), path.name))


def _number(path: AnyPath) -> int:
    parts = path.name.split("-")
    return int(parts[1]) if len(parts) == 3 else -1  # older files have no number


MESSAGES = ("params", "tag", "metrics", "file", "end")  # that are kept
_EXACT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_NAME = Annotated[str, Field(pattern=f"^{LOGGED.pattern}$")]
_WHOLE = Annotated[int, Field(ge=-(2**53), le=2**53)]
_STATUS = Literal["FINISHED", "FAILED", "KILLED"]
_ARGUMENTS: dict[str, type[BaseModel]] = {
    "params": create_model("Params", __config__=_EXACT, values=(dict[str, str], ...)),
    "tag": create_model("Tag", __config__=_EXACT, key=(str, ...), value=(str, ...)),
    "metrics": create_model(
        "Metrics", __config__=_EXACT, values=(dict[str, float], ...), when=(_WHOLE, ...), step=(_WHOLE, ...)
    ),
    "file": create_model("File", __config__=_EXACT, name=(_NAME, ...)),
    "end": create_model("End", __config__=_EXACT, status=(_STATUS, ...)),
}


def _is_sound(message: Any) -> bool:
    """Whether a message from a file is one of ours, with arguments of the right types."""
    if not isinstance(message, dict) or message.get("do") not in _ARGUMENTS:
        return False
    try:
        _ARGUMENTS[message["do"]].model_validate({key: value for key, value in message.items() if key != "do"})
    except ValidationError:
        return False
    return True


def read_note(path: AnyPath) -> dict[str, Any]:
    """A small JSON object; {} where it cannot be read."""
    try:
        found = parse_json(read_limited(path, MAX_KEPT_BYTES))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def slug(name: str) -> str:
    """What the files about a run of MLflow begin with."""
    return hash_of(name)[:16]


def hash_of(text: str) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()
