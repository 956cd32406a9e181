"""Loops over numbers that Numba compiles; the compiled code is cached on disk, as Python caches its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: Numba compiles the loop at its first call, and caches the compiled code beside its file."""

    def decorate(loop: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(cache=True, nogil=True, error_model="numpy", **options)(loop)
        except RuntimeError:  # no folder for the cache is writable, neither beside this file nor the user's
            return njit(nogil=True, error_model="numpy", **options)(loop)

    return decorate
