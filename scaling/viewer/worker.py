"""The viewer's work: one job at a time in a thread of its own; stale jobs are dropped."""

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
    """Runs jobs one at a time. Of the jobs with the same key only the latest waits; urgent jobs go first."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="viewer")
        self._waiting: OrderedDict[str, _Asked] = OrderedDict()
        self._lock = threading.Lock()

    def ask(self, key: str, job: Callable[[], Any], urgent: bool = False) -> Future[Any]:
        """Queue a job. → its future: the result or the exception, or None where a newer job with the same key came
        before it began."""
        asked = _Asked(job, urgent)
        with self._lock:
            stale = self._waiting.pop(key, None)
            self._waiting[key] = asked
        _dismiss(stale)
        self._thread.submit(self._run_next)
        return asked.answer

    def drop(self, key: str) -> None:
        """Forget the job with this key if it still waits; its future gives None."""
        with self._lock:
            stale = self._waiting.pop(key, None)
        _dismiss(stale)

    def close(self) -> None:
        """Wait for the job that runs; waiting jobs are dropped."""
        self._thread.shutdown(cancel_futures=True)

    def _run_next(self) -> None:
        """Run the next job. There is one call for each job that was queued, so after dropped jobs the last calls find
        nothing to do."""
        with self._lock:
            key = next((key for key, asked in self._waiting.items() if asked.urgent), next(iter(self._waiting), None))
            if key is None:
                return
            asked = self._waiting.pop(key)
        if not asked.answer.set_running_or_notify_cancel():
            return  # the caller has cancelled it
        try:
            asked.answer.set_result(asked.job())
        except BaseException as error:
            asked.answer.set_exception(error)


def _dismiss(stale: _Asked | None) -> None:
    if stale is not None and stale.answer.set_running_or_notify_cancel():
        stale.answer.set_result(None)
