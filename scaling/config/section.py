"""Building blocks of the settings: value types, the base class of sections, merging and flattening."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
# A shared model's file brings its own settings. Sizes have a limit far above any useful value, so that no file can ask
# for all memory.
Size = Annotated[int, Field(ge=1, le=4096)]
SizeOrZero = Annotated[int, Field(ge=0, le=4096)]
Channels = Annotated[list[Size], Field(min_length=1, max_length=8)]
PlaneAxes = Literal["xy", "xz", "yz", "yx", "zx", "zy"]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the settings; unknown keys are errors, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge `over` on top of `base`, section by section, into new values."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
