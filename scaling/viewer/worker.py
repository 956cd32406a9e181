"""The viewer's work: one render at a time in a thread of its own, stale ones dropped."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Asked:
    job: Callable[[], Any]
    urgent: bool
    answer: Future[Any] = field(default_factory=Future)


class Worker:
    """Runs jobs one at a time. Of jobs with one key only the latest waits; urgent ones go before the others."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="viewer")
        self._waiting: OrderedDict[str, _Asked] = OrderedDict()
        self._lock = threading.Lock()

    def ask(self, key: str, job: Callable[[], Any], urgent: bool = False) -> Future[Any]:
        """The job's future: its result or exception, or None where a newer one of its key came before it began."""
        asked = _Asked(job, urgent)
        with self._lock:
            stale = self._waiting.pop(key, None)
            self._waiting[key] = asked
        _dismiss(stale)
        self._thread.submit(self._run_next)
        return asked.answer

    def drop(self, key: str) -> None:
        """Forgets a job that still waits; its future gives None."""
        with self._lock:
            stale = self._waiting.pop(key, None)
        _dismiss(stale)

    def close(self) -> None:
        """Waits for the job that runs; those that wait are dropped."""
        self._thread.shutdown(cancel_futures=True)

    def _run_next(self) -> None:
        """One call for each job that was asked for, dropped ones too: the last calls then find nothing to do."""
        with self._lock:
            key = next((key for key, asked in self._waiting.items() if asked.urgent), next(iter(self._waiting), None))
            if key is None:
                return
            asked = self._waiting.pop(key)
        if not asked.answer.set_running_or_notify_cancel():
            return  # who asked is gone
        try:
            asked.answer.set_result(asked.job())
        except BaseException as error:
            asked.answer.set_exception(error)


def _dismiss(stale: _Asked | None) -> None:
    if stale is not None and stale.answer.set_running_or_notify_cancel():
        stale.answer.set_result(None)
