"""Loops over numbers that Numba compiles; the compiled code is cached on disk, as Python caches its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: Numba compiles the loop at its first call, and caches the compiled code beside its file.

    A loop is compiled again when its own file, or that of a loop that it calls, has changed.
    """

    # Where loops were not inlined, a process that compiles would run a called loop as it was compiled alone, and one
    # that reads the cache would run it as its caller was optimised: the last digits would differ.
    options |= {"nogil": True, "error_model": "numpy", "forceinline": True}

    def decorate(loop: Callable[..., Any]) -> Callable[..., Any]:
        try:
            dispatcher = njit(cache=True, **options)(loop)
        except RuntimeError:  # no folder for the cache is writable, neither beside this file nor the user's
            return njit(**options)(loop)
        _forget_what_is_unreadable(dispatcher)
        dispatcher.sources = _sources(loop)
        _forget_what_is_older(dispatcher, loop)
        return dispatcher

    return decorate


def _forget_what_is_unreadable(dispatcher: Any) -> None:
    """Let a loop be compiled where its cache names types that no longer exist, as after an update: Numba would raise
    what unpickling raises."""
    cache = dispatcher._cache
    load = cache.load_overload

    def load_or_forget(*args: Any) -> Any:
        try:
            return load(*args)
        except (ImportError, AttributeError):
            cache.flush()
            return None

    cache.load_overload = load_or_forget


def _sources(loop: Callable[..., Any]) -> frozenset[str]:
    """The files of a loop and of all loops that are compiled into it."""
    called = (loop.__globals__.get(name) for name in loop.__code__.co_names)
    found: list[frozenset[str]] = [getattr(other, "sources", frozenset()) for other in called]
    return frozenset({loop.__code__.co_filename}).union(*found)


def _forget_what_is_older(dispatcher: Any, loop: Callable[..., Any]) -> None:
    """Remove a loop's index of compiled code where a source is newer: Numba looks at the loop's own file alone."""
    name = f"{Path(loop.__code__.co_filename).stem}.{loop.__qualname__}-{loop.__code__.co_firstlineno}."
    with contextlib.suppress(OSError):  # another process removed it, or made a new one
        newest = max(Path(source).stat().st_mtime for source in dispatcher.sources)
        for index in Path(dispatcher.stats.cache_path).glob("*.nbi"):
            if index.name.startswith(name) and index.stat().st_mtime < newest:
                index.unlink()
