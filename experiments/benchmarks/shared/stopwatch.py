"""What step.py, encode.py, gpu_fit.py and others measure with: the time of an action, and a Markdown table."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds on the clock that suits the device, once its queued work is finished: wall time on a GPU; CPU time on a
    CPU, which other programs may use at the same time."""
    wait_for(device)
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def seconds_of(action: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Seconds of one call of the action, on the clock of `now`."""
    start = now(torch.device(device))
    action()
    return now(torch.device(device)) - start


def wall_seconds(action: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Wall seconds of one call of the action."""
    wait_for(torch.device(device))
    start = time.perf_counter()
    action()
    wait_for(torch.device(device))
    return time.perf_counter() - start


def median_ms(action: Callable[[], Any], device: torch.device | str = "cpu", repeats: int = 10) -> float:
    """The median of `repeats` calls of the action, in ms, after two calls that are not counted."""
    times = [seconds_of(action, device) for _ in range(repeats + 2)]
    return 1000 * median(times[2:])


def cpu_model() -> str:
    """The processor's name, as the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())


def table_text(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as a Markdown table: floats with about three significant digits, None as a dash."""
    return tabulate([list(map(_cell, row)) for row in rows], columns, "github", disable_numparse=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


class Laps:
    """Times of the parts of a step that is repeated; the first two steps are not counted."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.times: dict[str, list[float]] = {}
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self._last = now(self.device)

    def lap(self, name: str) -> None:
        """Note the time of the part of the step that has just ended."""
        here = now(self.device)
        self.times.setdefault(name, []).append(here - self._last)
        self._last = here

    def medians_ms(self) -> dict[str, float]:
        """The median of each part, in ms."""
        return {name: 1000 * median(times[2:]) for name, times in self.times.items()}
