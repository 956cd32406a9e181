"""The pulse of a computation: long loops beat, and a watchdog can tell a slow process from a hung one."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

_last = time.monotonic()


def beat() -> None:
    """Called once a step of any long loop."""
    global _last
    _last = time.monotonic()


class Watchdog:
    """A context manager that ends this process where no `beat` came for `seconds`.

    A device that hangs cannot be interrupted from Python: the process must go, and somebody else try again.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._done = threading.Event()

    def __enter__(self) -> Watchdog:
        beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - _last > self.seconds:
                print(f"watchdog: no step within {self.seconds:.0f} s; this process ends itself", file=sys.stderr)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)
