"""Parse JSON and YAML of unknown origin. Errors are ValueError and give only the reason: the caller knows the file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import yaml
from pydantic import ValidationError

MAX_JSON_VALUES = 5_000_000  # a value takes a hundred bytes of memory and more
MAX_YAML_BYTES = 256 << 10  # a hundred times what settings need; the parser takes seconds for a megabyte


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def parse_json(data: bytes | str, constant: Callable[[str], Any] = _refuse) -> Any:
    """Parse a JSON text. constant: converts the words NaN, Infinity and -Infinity; by default they are refused.

    Raises ValueError where the text is not valid JSON, its bytes are not UTF-8, UTF-16 or UTF-32, an object has a key
    twice, an integer has thousands of digits, or the nesting is too deep.
    """
    try:
        text = data.decode(json.detect_encoding(data), "surrogatepass") if isinstance(data, bytes) else data
        if sum(map(text.count, "{[,")) > MAX_JSON_VALUES:
            raise ValueError(f"it has more than {MAX_JSON_VALUES} values")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from error


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text:.40} is too large")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {twice!r:.80} is there twice")
    return values


def first_fault(error: ValueError) -> str:
    """What is wrong, in one line: of a model's faults the first one, with its key."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first = error.errors()[0]
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")]))


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read")
        return super().compose_node(parent, index)


def parse_yaml(text: bytes | str) -> Any:
    """Parse a YAML text of plain values; None for an empty text.

    Python tags are refused. So are aliases, with which a short text can stand for an endless one. Raises ValueError
    that says in one line where the text is wrong.
    """
    try:
        loader = _PlainLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("not readable as YAML (nested too deeply)") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(f"not readable as YAML ({' '.join(str(error).split())})") from error
