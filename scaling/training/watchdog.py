"""End a process that hangs: long loops call `beat`, and `faulthandler` ends the process after too long without one."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time

_seconds: float | None = None  # the longest time allowed without a beat; None: no watchdog runs
_armed = 0.0  # when the timer was last started
_entered = 0  # blocks that run now, in threads of their own
_lock = threading.Lock()


def beat() -> None:
    """Tell the watchdog that this process makes progress. Every long loop calls this once a step."""
    if _seconds is not None and time.monotonic() - _armed > _seconds / 8:  # each start of the timer costs a thread
        _arm(_seconds)


class Watchdog:
    """Context manager that ends this process when no `beat` has come for `seconds`, or for up to an eighth less.

    The exit status is 1, and the stacks of all threads go to standard error. Python cannot interrupt a device that
    hangs, so the process must end, and another process must try again. Of blocks in several threads, the beats of any
    one count for all: one that hangs is found when the others end or wait for it.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> Watchdog:
        global _entered
        with _lock:
            _entered += 1
            _arm(self.seconds)
        return self

    def __exit__(self, *_: object) -> None:
        global _seconds, _entered
        with _lock:
            _entered -= 1
            if not _entered:
                _seconds = None
                faulthandler.cancel_dump_traceback_later()


def _arm(seconds: float) -> None:
    global _seconds, _armed
    _seconds, _armed = seconds, time.monotonic()
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
