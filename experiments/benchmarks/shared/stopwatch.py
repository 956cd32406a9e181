"""What step.py, encode.py, gpu_fit.py and others measure with: the time of an action, and a Markdown table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from tabulate import tabulate


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds on the clock that suits a device, when all that it was asked for is done: CPU time on a CPU, which other
    programs may keep busy too, else wall time."""
    wait_for(device)
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def seconds_of(action: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Seconds that an action takes once, on that clock."""
    start = now(torch.device(device))
    action()
    return now(torch.device(device)) - start


def wall_seconds(action: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Seconds that an action takes once, on the wall."""
    wait_for(torch.device(device))
    start = time.perf_counter()
    action()
    wait_for(torch.device(device))
    return time.perf_counter() - start


def median_ms(action: Callable[[], Any], device: torch.device | str = "cpu", repeats: int = 10) -> float:
    """The median of `repeats` times that an action took, in ms, after two that are not counted."""
    times = [seconds_of(action, device) for _ in range(repeats + 2)]
    return 1000 * median(times[2:])


def table_text(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as a Markdown table; floats with three significant digits at least, None as a dash."""
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
    """Times of the parts of a step that is done again and again; the first two steps are not counted."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.times: dict[str, list[float]] = {}
        self.start()

    def start(self) -> None:
        """A step begins."""
        self._last = now(self.device)

    def lap(self, name: str) -> None:
        """A part of it is done."""
        here = now(self.device)
        self.times.setdefault(name, []).append(here - self._last)
        self._last = here

    def medians_ms(self) -> dict[str, float]:
        """ms of each part."""
        return {name: 1000 * median(times[2:]) for name, times in self.times.items()}
