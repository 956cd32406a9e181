"""Progress for people: a bar in a terminal, elsewhere a plain line now and then; and a word about long waits."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 30.0  # between lines of a log file
WAIT_SECONDS = 10.0  # before the first word about a wait
PLAIN = "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} left{postfix}"


class Progress(tqdm):
    """A tqdm bar that, where standard error is not a terminal, writes a line every LINE_SECONDS and one at the end."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._plain = not sys.stderr.isatty()
        self._last_line = -LINE_SECONDS
        if self._plain:
            options |= {"bar_format": PLAIN, "mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS}
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or write a line if it is time."""
        if not self._plain:
            super().display(msg, pos)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            print(self, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Draw the bar, or write the line, for the last time."""
        if self._plain and not self.disable:
            self._last_line = -LINE_SECONDS
            self.display()
            self.disable = True  # the rest of what tqdm does is for terminals
            type(self)._decr_instances(self)  # type: ignore[attr-defined]
        super().close()


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Say, after WAIT_SECONDS and then every LINE_SECONDS, that the block still waits for something outside."""
    done = threading.Event()

    def tell() -> None:
        start, pause = time.monotonic(), WAIT_SECONDS
        while not done.wait(pause):
            print(f"still waiting for {what} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
            pause = LINE_SECONDS

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()
