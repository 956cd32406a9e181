"""Ends a process that hangs: long loops beat, and `faulthandler` ends the process where no beat came for too long."""

from __future__ import annotations

import faulthandler
import sys
import time

_seconds: float | None = None  # between two beats at most; None: nobody watches
_armed = 0.0  # when the timer was started last


def beat() -> None:
    """Called once a step of any long loop."""
    if _seconds is not None and time.monotonic() - _armed > _seconds / 8:  # to start a timer costs a thread
        _arm(_seconds)


class Watchdog:
    """A context manager that ends this process, with exit status 1 and the stacks of its threads on standard error,
    where no `beat` came for `seconds`, or for an eighth less.

    A device that hangs cannot be interrupted from Python: the process must go, and somebody else try again.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> Watchdog:
        _arm(self.seconds)
        return self

    def __exit__(self, *_: object) -> None:
        global _seconds
        _seconds = None
        faulthandler.cancel_dump_traceback_later()


def _arm(seconds: float) -> None:
    global _seconds, _armed
    _seconds, _armed = seconds, time.monotonic()
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
